"""``train.float8``: frozen weights multiplied in float8, emulated on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from trainer.checkpoint.layout import RunDir
from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.metrics.trackers import read_metrics
from trainer.model.build import build_model
from trainer.model.format import Format
from trainer.model.int8 import Int8
from trainer.model.kernels.float8 import write_float8
from trainer.model.load import load_model
from trainer.model.nf4 import FourBit
from trainer.model.recompute import use_float8
from trainer.run import train

CPU = torch.device("cpu")
QLORA: dict[str, Any] = {"adapter": {"r": 4}, "quantization": {"type": "nf4"}}
Recipe = Callable[..., RunConfig]


def outputs_and_gradients(config: RunConfig, float8: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model: Any = load_model(config, CPU).model.train()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # of zeros the other matrix has no gradient
            parameter.data.normal_(0.0, 0.1, generator=generator)
    if float8:
        use_float8(model, CPU, config.compute_dtype)
    ids = torch.randint(5, 60, (1, 32), generator=generator)
    positions = torch.arange(32)[None]
    lengths = torch.tensor([0, 32], dtype=torch.int32)
    decoder = model.get_base_model().model
    hidden = decoder(ids, position_ids=positions, use_cache=False, cu_seq_lens_q=lengths, max_length_q=32)[0]
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    return hidden.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("sections", [QLORA, {"adapter": {"r": 4, "targets": ["q_proj", "down_proj"]}}], ids=str)
def test_outputs_and_gradients_stay_close(sections: dict[str, Any], toy_recipe: Recipe) -> None:
    config = toy_recipe(**sections)
    hidden, gradients = outputs_and_gradients(config, float8=True)
    exact, exact_gradients = outputs_and_gradients(config, float8=False)
    assert 0 < (hidden - exact).norm() / exact.norm() < 0.05
    assert gradients.keys() == exact_gradients.keys() and gradients
    for name, gradient in gradients.items():
        assert F.cosine_similarity(gradient.flatten(), exact_gradients[name].flatten(), 0) > 0.95, name


def check_shares(shares: torch.Tensor, row_scales: torch.Tensor, exact: torch.Tensor) -> None:
    """Each weight is the nearest of float8's three bits of mantissa, and each row reaches the end of its range."""
    values, exact, scales = shares.double(), exact.double(), row_scales.double()[:, None]
    assert ((values * scales - exact).abs() <= (2**-4 + 2**-8) * exact.abs() + 2**-10 * scales).all()
    assert torch.equal(values.abs().amax(1) == 448, exact.abs().amax(1) > 1e-30)


def as_float8(
    format: Format | None, weight: torch.Tensor, transposed: bool, beside: int = 8
) -> tuple[torch.Tensor, ...]:
    """Shares and scales laid into something wider, by `beside` columns on both sides, and the weights in float32."""
    out, inner = weight.shape[::-1] if transposed else weight.shape
    wide = torch.zeros(out, inner + 2 * beside, dtype=torch.float8_e4m3fn, device=weight.device)
    place = wide[:, beside : beside + inner]
    row_scales = torch.empty(len(weight), device=weight.device)
    if format is None:
        exact = weight
        write_float8(weight, place, row_scales, transposed)
    else:
        stored = format.quantize(weight)
        exact = format.dequantize(*stored, torch.float32)
        format.to_float8(*stored, place, row_scales, transposed)
    assert not wide[:, :beside].float().any() and not wide[:, beside + inner :].float().any()
    return (place.t() if transposed else place).float(), row_scales, exact


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("format", [None, Int8(), FourBit("nf4", False), FourBit("fp4", True)], ids=str)
def test_weights_are_shares_of_their_rows_largest(format: Format | None, transposed: bool) -> None:
    weight = torch.randn(75, 192, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight[1], weight[2] = 0, 1e-3 * weight[2]
    check_shares(*as_float8(format, weight, transposed))


@pytest.mark.parametrize("adapter", [{"dropout": 0.1}, {"dora": True}], ids=str)
def test_layers_that_compute_by_their_modules_are_refused(adapter: dict[str, Any], toy_recipe: Recipe) -> None:
    model = build_model(toy_recipe(adapter=adapter), CPU).model
    with pytest.raises(UserError, match=r"train.float8: true on layers .*(.|\n)*dropout and DoRA"):
        use_float8(model, CPU, "bfloat16")


@pytest.mark.parametrize(
    ("capability", "dtype", "said"), [((8, 0), "bfloat16", "Ada, Hopper and later"), ((9, 0), "float16", "in float16")]
)
def test_gpus_that_cannot_are_refused(
    capability: tuple[int, int], dtype: str, said: str, toy_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    model = build_model(toy_recipe(**QLORA), CPU).model
    with pytest.raises(UserError, match=said):
        use_float8(model, torch.device("cuda"), dtype)


def test_a_run_says_so_and_does_so(toy_recipe: Recipe, tmp_path: Path) -> None:
    losses = {}
    for float8 in (False, True):
        run = RunDir(tmp_path / str(float8))
        train(toy_recipe(**QLORA, train={"max_steps": 2, "float8": float8}), run.path)
        records = list(read_metrics(run.metrics))
        losses[float8] = [record["loss"] for record in records if record["kind"] == "step"]
        (text,) = [record["text"] for record in records if record.get("event") == "micro_batch"]
        assert ("emulated float8 matmuls" in text) == float8
    # before the first update the adapter adds nothing: what differs is the frozen weights' products
    assert losses[True][0] != losses[False][0]
    assert losses[True] == pytest.approx(losses[False], rel=0.02)
    with pytest.raises(UserError, match=r"train.float8 \(was True, now False\)"):
        train(toy_recipe(**QLORA, train={"max_steps": 2}), run.path)
