"""Activations in host memory and in float8 on CUDA: the same gradients, less of the GPU."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainer.config import RunConfig
from trainer.data.sampler import collate
from trainer.data.types import PackedBatch
from trainer.loss import PackedCausalLM
from trainer.model.kernels.float8 import dequantize_rows, quantize_rows
from trainer.model.load import load_model
from trainer.model.recompute import decoder_layers, keep_in_float8, offload_activations, set_recompute
from trainer.planning.levels import read_levels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CUDA = torch.device("cuda")
LAYERS, TOKENS = 8, 8192
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"adapter": {"r": 16}},
    "qlora": {"adapter": {"r": 16}, "quantization": {"type": "nf4", "double_quant": True}},
}
Recipe = Callable[..., RunConfig]


@pytest.fixture
def deep_recipe(toy_recipe: Recipe, toy_model_dir: Path, tmp_path: Path) -> Recipe:
    """Random weights of eight layers, wide enough that activations outweigh all else."""
    shape = json.loads((toy_model_dir / "config.json").read_text())
    shape |= {"num_hidden_layers": LAYERS, "hidden_size": 1024, "intermediate_size": 2816}
    shape |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    return partial(toy_recipe, model={"path": str(tmp_path), "dtype": "bfloat16", "init": "random"})


def build(recipe: Recipe, method: str, level: Any) -> Any:
    """A model whose adapters are away from their first values."""
    model = load_model(recipe(**METHODS[method]), CUDA).model.train()
    set_recompute(model, read_levels(level, LAYERS))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    return model


def batch(seed: int, tokens: int = TOKENS) -> PackedBatch:
    """Documents of 64 tokens: in longer ones the backward of flash attention adds in no certain order."""
    ids = torch.randint(5, 300, (tokens,), generator=torch.Generator().manual_seed(seed))
    documents = [part.tolist() for part in ids.split(64)]
    return collate([[(part, part) for part in documents]]).to(CUDA)


def train(model: nn.Module, batches: list[PackedBatch]) -> dict[str, torch.Tensor]:
    """Gradients accumulated over the batches."""
    root = PackedCausalLM(model, torch.bfloat16)
    model.zero_grad()
    for micro_batch in batches:
        (root(micro_batch) / TOKENS).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("level", ["none", "norms", "full", {"full": 3, "mlp": 3, "none": 2}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_bit_for_bit_the_same(method: str, level: Any, deep_recipe: Recipe) -> None:
    model = build(deep_recipe, method, level)
    batches = [batch(seed, tokens) for seed, tokens in ((1, TOKENS), (2, TOKENS - 130), (3, 4099), (4, TOKENS))]
    wanted, again = train(model, batches), train(model, batches)
    offload_activations(model, CUDA)
    for _ in range(2):  # the second time pages are used again
        found = train(model, batches)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert torch.equal(again[name], gradient), f"{name} differs from run to run without offload"
            assert torch.equal(found[name], gradient), name


def peak_and_kept(model: nn.Module) -> tuple[int, int]:
    """Bytes allocated at most in a step, and those that wait for backward after the forward."""
    root = PackedCausalLM(model, torch.bfloat16)
    for _ in range(2):  # the first makes what stays, such as gradients
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss = root(batch(1))
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
        peak = torch.cuda.max_memory_allocated() - before
    return peak, kept


@pytest.mark.parametrize(("level", "share"), [("none", 0.6), ("norms", 0.6), ("full", 0.35)])
def test_most_activations_leave_the_gpu(level: Any, share: float, deep_recipe: Recipe) -> None:
    model = build(deep_recipe, "qlora", level)
    peak, kept = peak_and_kept(model)
    offload_activations(model, CUDA)
    own_peak, own_kept = peak_and_kept(model)
    # The last layer's stay and another's are on their way, as is what the loss keeps: of inputs alone a larger share.
    assert kept - own_kept > share * kept
    assert peak - own_peak > share * kept


def test_a_step_that_runs_out_of_memory_leaves_nothing_behind(deep_recipe: Recipe) -> None:
    model = build(deep_recipe, "qlora", "none")
    offload_activations(model, CUDA)
    wanted = train(model, [batch(1)])
    before = torch.cuda.memory_allocated()

    def fail(grad: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("as if")

    def fail_in_backward(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        output.register_hook(fail)

    hook = decoder_layers(model)[4].register_forward_hook(fail_in_backward)
    with pytest.raises(torch.OutOfMemoryError):
        train(model, [batch(2)])
    hook.remove()
    model.zero_grad()
    gc.collect()
    found = train(model, [batch(1)])
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())
    del found
    model.zero_grad()
    assert torch.cuda.memory_allocated() <= before


@pytest.fixture
def slow_link(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Copies to the host and back that take much longer than what is computed meanwhile."""
    copy = torch.Tensor.copy_

    def slowly(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if non_blocking and self.device != source.device:
            torch.cuda._sleep(500_000)
        return copy(self, source, non_blocking)

    monkeypatch.setattr(torch.Tensor, "copy_", slowly)
    yield
    torch.cuda.synchronize()


def test_nothing_is_used_before_it_has_arrived(deep_recipe: Recipe, slow_link: None) -> None:
    model = build(deep_recipe, "lora", "none")
    wanted = train(model, [batch(1), batch(2)])
    offload_activations(model, CUDA)
    found = train(model, [batch(1), batch(2)])
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


# ----------------------------------------------------------------------------------------------- gate and up in float8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1023), (5, 11008)], ids=str)
def test_rows_come_back_as_on_the_cpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, device=CUDA, dtype=dtype)
    shares, scales = quantize_rows(x)
    found = dequantize_rows(shares, scales, dtype)
    assert torch.equal(found.cpu(), dequantize_rows(shares.cpu(), scales.cpu(), dtype))
    assert ((found - x).float().norm() / x.float().norm()).item() < 0.03


@pytest.mark.parametrize("level", ["none", "norms"])
def test_gradients_with_gate_and_up_in_float8(level: Any, deep_recipe: Recipe) -> None:
    model = build(deep_recipe, "qlora", level)
    wanted, (_, kept) = train(model, [batch(1)]), peak_and_kept(model)
    keep_in_float8(model)
    found, (_, own_kept) = train(model, [batch(1)]), peak_and_kept(model)
    assert kept - own_kept == pytest.approx(LAYERS * TOKENS * (2 * 2816 - 8), rel=0.02)
    difference = torch.cat([(found[name] - gradient).float().flatten() for name, gradient in wanted.items()])
    assert difference.norm() < 0.05 * torch.cat([gradient.float().flatten() for gradient in wanted.values()]).norm()
