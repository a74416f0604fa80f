"""Adapters cast for all layers at once: values and gradients of casting each by itself."""

from __future__ import annotations

import pytest
import torch

from trainer.model.adapters import Adapter, cast_adapters

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


def test_nothing_to_cast() -> None:
    assert cast_adapters([[], []], torch.bfloat16) == [(None, []), (None, [])]
