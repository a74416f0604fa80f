"""What waits for backward: in host memory bit for bit the same, in float8 nearly."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from trainer.config import RunConfig
from trainer.data.sampler import collate
from trainer.data.types import PackedBatch
from trainer.errors import UserError
from trainer.loss import PackedCausalLM
from trainer.model.load import load_model
from trainer.model.offload import PAGES_A_BLOCK, ActivationOffload
from trainer.model.recompute import decoder_layers, keep_in_float8, set_recompute
from trainer.model.shapes import published_shape
from trainer.planner import plan
from trainer.planning.hardware import CPU as CPU_AS_GPU
from trainer.planning.hardware import find_gpu
from trainer.planning.host import predict_host
from trainer.planning.job import Job, Setting
from trainer.planning.levels import read_levels
from trainer.planning.memory import predict_memory, waiting_bytes
from trainer.planning.shape import ModelShape

CPU = torch.device("cpu")
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"adapter": {"r": 4}},
    "qlora": {"adapter": {"r": 4}, "quantization": {"type": "nf4", "double_quant": True}},
    "dropout": {"adapter": {"r": 4, "dropout": 0.1}},
    "dora": {"adapter": {"r": 4, "dora": True}},
}
LAYERS, PAGE = 5, 4096
Recipe = Callable[..., RunConfig]


@pytest.fixture
def deep_recipe(toy_recipe: Recipe, toy_model_dir: Path, tmp_path: Path) -> Recipe:
    """`toy_recipe` on random weights of the toy's shape with five layers."""
    shape = json.loads((toy_model_dir / "config.json").read_text()) | {"num_hidden_layers": LAYERS}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    return partial(toy_recipe, model={"path": str(tmp_path), "dtype": "float32", "init": "random"})


def build(recipe: Recipe, method: str) -> Any:
    """A model whose adapters are away from their first values."""
    model = load_model(recipe(**METHODS[method]), CPU).model.train()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=generator)
    return model


def batch(seed: int, tokens: int = 96) -> PackedBatch:
    ids = torch.randint(5, 300, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    return collate([[(ids[:40], ids[:40]), (ids[40:], ids[40:])]])


def train(model: nn.Module, batches: list[PackedBatch]) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Losses, and gradients accumulated over the batches."""
    root, losses = PackedCausalLM(model, torch.float32), []
    model.zero_grad()
    for micro_batch in batches:
        torch.manual_seed(0)
        losses.append(root(micro_batch))
        losses[-1].backward()
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def offload(model: nn.Module) -> ActivationOffload:
    offload = ActivationOffload(decoder_layers(model), CPU, PAGE)
    for layer in decoder_layers(model):
        layer.offload = offload
    return offload


@pytest.mark.parametrize("level", ["none", "norms", "mlp", "full", {"full": 2, "none": 3}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_offloaded_steps_are_bit_for_bit_the_same(method: str, level: Any, deep_recipe: Recipe) -> None:
    model = build(deep_recipe, method)
    set_recompute(model, read_levels(level, LAYERS))
    batches = [batch(1), batch(2, tokens=128), batch(3)]
    losses, gradients = train(model, batches)
    used = offload(model)

    own_losses, own = train(model, batches)

    assert used.host_bytes > 0
    assert [loss.item() for loss in own_losses] == [loss.item() for loss in losses]
    assert own.keys() == gradients.keys()
    assert all(torch.equal(own[name], gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize("level", ["none", "full"])
@pytest.mark.parametrize("offloaded", [False, True])
def test_the_device_is_free_of_what_waits(offloaded: bool, level: Any, deep_recipe: Recipe) -> None:
    """Inputs of layers, which autograd keeps at every level; those of the last stay."""
    model = build(deep_recipe, "qlora")
    set_recompute(model, read_levels(level, LAYERS))
    inputs: list[StorageWeakRef] = []
    for layer in decoder_layers(model)[1:]:
        layer.register_forward_pre_hook(lambda module, args: inputs.append(StorageWeakRef(args[0].untyped_storage())))
    if offloaded:
        offload(model)
    loss = PackedCausalLM(model, torch.float32)(batch(1))
    assert [gone.expired() for gone in inputs] == [offloaded] * (LAYERS - 2) + [False]
    loss.backward()
    assert all(gone.expired() for gone in inputs)


def test_host_memory_is_used_again(deep_recipe: Recipe) -> None:
    model = build(deep_recipe, "lora")
    used = offload(model)
    train(model, [batch(1, tokens=128)])
    pinned = used.host_bytes
    for seed in range(4):
        train(model, [batch(seed, tokens=90 + seed), batch(seed, tokens=128)])
    PackedCausalLM(model, torch.float32)(batch(1))  # as a failed step, which has no backward
    train(model, [batch(2, tokens=128)])
    assert used.host_bytes == pinned


@pytest.mark.parametrize("level", ["none", "norms", "full"])
def test_the_plan_knows_what_lies_where(level: Any, deep_recipe: Recipe) -> None:
    model = build(deep_recipe, "qlora")
    levels = read_levels(level, LAYERS)
    set_recompute(model, levels)
    used = offload(model)
    train(model, [batch(1, tokens=128)])  # a pack of the recipe
    setting = Setting("single", 1, levels)
    plain, asked = (planned(deep_recipe, "qlora", model, offload_activations=is_asked) for is_asked in (False, True))

    on_host = predict_host(asked, "single", setting).activations
    waiting = [predict_memory(one, setting).activations for one in (plain, asked)]

    # pages that are not full, and small tensors that stay
    assert on_host == pytest.approx(used.host_bytes, rel=0.3, abs=PAGES_A_BLOCK * PAGE)
    assert predict_host(plain, "single", setting).activations == 0
    assert waiting[0] - waiting[1] > on_host / 2  # a layer's come while the one above it computes


def test_a_sequence_that_fits_no_gpu_fits_with_the_host(toy_recipe: Recipe) -> None:
    shape = published_shape("meta-llama/Llama-2-7b-hf")
    assert shape is not None
    found = []
    for is_asked in (False, True):
        train = {"offload_activations": is_asked, "recompute": "auto", "micro_batch": "auto"}
        sections = {**METHODS["qlora"], "model": {"dtype": "bfloat16"}, "data": {"pack_length": 393216}}
        recipe = toy_recipe(**sections, train=train)
        found.append(plan(Job(recipe, ModelShape.build(shape), find_gpu("H200")))[0])
    assert [best.fits for best in found] == [False, True]
    assert "none" not in found[1].setting.levels.counts, "more than the link to the host carries meanwhile"


def test_evaluation_keeps_nothing(deep_recipe: Recipe) -> None:
    model = build(deep_recipe, "full")
    used = offload(model)
    with torch.no_grad():
        PackedCausalLM(model.eval(), torch.float32)(batch(1))
    assert used.host_bytes == 0


# ---------------------------------------------------------------------------------------------- gate and up in float8


def kept_bytes(model: Any) -> int:
    """Bytes that a forward of 96 tokens keeps for backward."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = PackedCausalLM(model, torch.float32)(batch(1))
    del loss  # its graph has held them all until here
    return sum(kept.values())


@pytest.mark.parametrize("level", ["none", "norms"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_float8_keeps_a_quarter_of_float32s_bytes(method: str, level: Any, toy_recipe: Recipe) -> None:
    model = build(toy_recipe, method)
    set_recompute(model, read_levels(level, 2))
    before, (losses, gradients) = kept_bytes(model), train(model, [batch(1)])
    keep_in_float8(model)

    saved, (own_losses, own) = before - kept_bytes(model), train(model, [batch(1)])

    of_a_row = 2 * model.config.intermediate_size * (4 - 1) - 2 * 4  # less two scales
    assert saved == 2 * 96 * of_a_row
    plain, asked = (planned(toy_recipe, method, model, keep_in_float8=is_asked) for is_asked in (False, True))
    assert waiting_bytes(plain, "single", level) - waiting_bytes(asked, "single", level) == of_a_row
    assert own_losses[0].item() == losses[0].item()
    differences = {name: own[name] - gradient for name, gradient in gradients.items()}
    assert 1e-3 < norm(differences) / norm(gradients) < 0.03
    assert all(differences[name].norm() < 0.06 * gradient.norm() for name, gradient in gradients.items())


def planned(recipe: Recipe, method: str, model: Any, **train: Any) -> Job:
    """What the planner is asked about such a run."""
    return Job(recipe(**METHODS[method], train=train), ModelShape.build(model.config.to_dict()), CPU_AS_GPU)


def norm(gradients: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())


@pytest.mark.parametrize("level", ["mlp", "full"])
def test_a_layer_that_computes_gate_and_up_again_loses_nothing(level: Any, toy_recipe: Recipe) -> None:
    model = build(toy_recipe, "lora")
    set_recompute(model, read_levels(level, 2))
    _, gradients = train(model, [batch(1)])
    keep_in_float8(model)
    _, own = train(model, [batch(1)])
    assert all(torch.equal(own[name], gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize("method", ["dropout", "dora"])
def test_modules_keep_gate_and_up_as_they_are(method: str, toy_recipe: Recipe) -> None:
    with pytest.raises(UserError, match="train.keep_in_float8"):
        keep_in_float8(build(toy_recipe, method))
