"""Adapters as decoder layers multiply by them: in the dtype of the matmuls, A scaled, those that share an input in one
piece. Many at once: a kernel for each of a model's hundreds of small matrices would take longer to start than to run.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class Adapter(NamedTuple):
    """Of one linear layer, in their own dtype: ``a [r, in]``, ``b [out, r]``."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


class SharedAdapters(NamedTuple):
    """Of linears that read one input, in the dtype of the matmuls.

    Attributes:
        a: ``scaling * A`` one below the other, ``[total_rank, in]``; None where no linear has an adapter.
        b: of each ``[out, r]``.
    """

    a: torch.Tensor | None
    b: list[torch.Tensor]


def cast_adapters(groups: Sequence[Sequence[Adapter]], dtype: torch.dtype) -> list[SharedAdapters]:
    """For each group of linears that read one input its adapters in `dtype`; differentiable."""
    adapters = [one for group in groups for one in group]
    sizes = [len(group) for group in groups if group]
    cast: tuple[torch.Tensor, ...] = ()
    if adapters:
        scalings = [one.scaling for one in adapters]
        cast = _Cast.apply(dtype, sizes, scalings, *(one.a for one in adapters), *(one.b for one in adapters))
    stacked, b = iter(cast[: len(sizes)]), iter(cast[len(sizes) :])
    return [SharedAdapters(next(stacked) if group else None, [next(b) for _ in group]) for group in groups]


class _Cast(torch.autograd.Function):
    """All A and then all B come in; of each group its A as one matrix, and then all B, go out."""

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, sizes: list[int], scalings: list[float], *weights: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """
        Args:
            sizes: adapters of each group.
            weights: A of each adapter, and then B of each, all in one dtype.
        """
        shapes, factors = [weight.shape for weight in weights], [*scalings, *[1.0] * len(scalings)]
        flat, own = _laid_out(shapes, dtype, weights[0].device)
        torch._foreach_copy_(own, torch._foreach_mul(weights, factors))
        ctx.shapes, ctx.dtype, ctx.factors, ctx.sizes = shapes, weights[0].dtype, factors, sizes
        of_groups = _cut(shapes, sizes)
        lines = flat[: sum(shape.numel() for shape in shapes[: len(scalings)])]
        parts = lines.split([sum(shape.numel() for shape in group) for group in of_groups])
        stacked = [part.view(-1, group[0][1]) for part, group in zip(parts, of_groups, strict=True)]
        return *stacked, *own[len(scalings) :]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        num_groups = len(ctx.sizes)
        of_groups = zip(grads[:num_groups], _cut(ctx.shapes, ctx.sizes), strict=True)
        pieces = [piece for grad, group in of_groups for piece in grad.split([shape[0] for shape in group])]
        _, own = _laid_out(ctx.shapes, ctx.dtype, grads[0].device)
        torch._foreach_copy_(own, [*pieces, *grads[num_groups:]])
        torch._foreach_mul_(own, ctx.factors)
        return None, None, None, *own


def _cut(shapes: Sequence[torch.Size], sizes: Sequence[int]) -> list[Sequence[torch.Size]]:
    """The first shapes, so many for each group."""
    ends = [*itertools.accumulate(sizes)]
    return [shapes[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _laid_out(
    shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One empty line of numbers, and its parts in these shapes."""
    sizes = [shape.numel() for shape in shapes]
    flat = torch.empty(sum(sizes), dtype=dtype, device=device)
    return flat, [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
