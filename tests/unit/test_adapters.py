"""Adapters cast for all layers at once: values and gradients of casting each by itself."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from tests.unit.test_gradients import make_rows, pack
from trainer.config import RunConfig
from trainer.loss import PackedCausalLM
from trainer.model import layers
from trainer.model.adapters import Adapter, cast_adapters
from trainer.model.load import load_model

Recipe = Callable[..., RunConfig]
CPU = torch.device("cpu")

GROUPS = [[(8, 24, 40, 2.0), (4, 24, 16, 0.5)], [], [(8, 40, 24, 1.0)]]  # of each adapter r, in, out, scaling


def build(dtype: torch.dtype) -> list[list[Adapter]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    return [[Adapter(draw(r, inner), draw(out, r), scaling) for r, inner, out, scaling in group] for group in GROUPS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16], ids=str)
def test_all_at_once_is_each_by_itself(own: torch.dtype, dtype: torch.dtype) -> None:
    one, other = build(own), build(own)
    for group, alone, (a, b) in zip(one, other, cast_adapters(one, dtype), strict=True):
        if not group:
            assert a is None and b == []
            continue
        assert a is not None
        wanted_a = torch.cat([(adapter.a.float() * adapter.scaling).to(dtype) for adapter in alone])
        wanted_b = [adapter.b.to(dtype) for adapter in alone]
        assert torch.equal(a, wanted_a) and a.dtype == dtype
        assert all(torch.equal(*pair) for pair in zip(b, wanted_b, strict=True))
    shared = cast_adapters(one, dtype)
    pairs = [(a, b) for a, b in shared if a is not None]
    sum((a.sin().sum() + sum(x.cos().sum() for x in b)) for a, b in pairs).backward()
    for group in other:
        for adapter in group:
            ((adapter.a.float() * adapter.scaling).to(dtype).sin().sum() + adapter.b.to(dtype).cos().sum()).backward()
    for group, alone in zip(one, other, strict=True):
        for found, wanted in zip(group, alone, strict=True):
            for left, right in ((found.a, wanted.a), (found.b, wanted.b)):
                assert left.grad is not None and right.grad is not None and left.grad.dtype == own
                torch.testing.assert_close(left.grad, right.grad)


def test_gradients_come_as_their_layers_are_done(toy_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not all at the end, when they would lie there in two dtypes, and no process could send its own before."""
    monkeypatch.setattr(layers, "LAYERS_AT_ONCE", 1)
    model = load_model(toy_recipe(adapter={"r": 4}), CPU).model
    came: list[str] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer = re.findall(r"layers\.(\d+)", name)[0]
            parameter.register_post_accumulate_grad_hook(lambda _, layer=layer: came.append(layer))
    PackedCausalLM(model, torch.float32).train()(pack(make_rows([20, 12]))).backward()
    assert len(set(came)) > 1 and came == sorted(came, reverse=True)


def test_nothing_to_cast() -> None:
    assert cast_adapters([[], []], torch.bfloat16) == [(None, []), (None, [])]
