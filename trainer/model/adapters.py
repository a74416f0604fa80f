"""Adapters as decoder layers multiply by them: in the dtype of the matmuls, A scaled, those that share an input in one
piece. All at once, as a kernel for each of a model's hundreds of small matrices would take longer to start than to run.
"""

from __future__ import annotations

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
    filled = [group for group in groups if group]
    if not filled:
        return [SharedAdapters(None, []) for _ in groups]
    weights = [weight for group in filled for weight in (*(one.a for one in group), *(one.b for one in group))]
    factors = [factor for group in filled for factor in (*(one.scaling for one in group), *(1.0 for _ in group))]
    sizes = [len(group) for group in filled]
    cast = iter(_Cast.apply(dtype, factors, sizes, *weights))
    return [
        SharedAdapters(next(cast), [next(cast) for _ in group]) if group else SharedAdapters(None, [])
        for group in groups
    ]


class _Cast(torch.autograd.Function):
    """Of each group all A and then all B come in; all its A as one matrix and then all B go out."""

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, factors: list[float], sizes: list[int], *weights: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        shapes = [weight.shape for weight in weights]
        flat, own = _laid_out(shapes, dtype, weights[0].device)
        torch._foreach_copy_(own, torch._foreach_mul(weights, factors))
        ctx.shapes, ctx.dtype, ctx.factors, ctx.sizes = shapes, weights[0].dtype, factors, sizes
        outputs, at, begin = list[torch.Tensor](), 0, 0
        for size in sizes:
            ranks = sum(shape[0] for shape in shapes[at : at + size])
            columns = shapes[at][1]
            outputs += [flat[begin : begin + ranks * columns].view(ranks, columns), *own[at + size : at + 2 * size]]
            begin += sum(shape.numel() for shape in shapes[at : at + 2 * size])
            at += 2 * size
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        pieces, rest, at = list[torch.Tensor](), iter(grads), 0
        for size in ctx.sizes:
            pieces += next(rest).split([shape[0] for shape in ctx.shapes[at : at + size]])
            pieces += [next(rest) for _ in range(size)]
            at += 2 * size
        _, own = _laid_out(ctx.shapes, ctx.dtype, grads[0].device)
        torch._foreach_copy_(own, pieces)
        torch._foreach_mul_(own, ctx.factors)
        return None, None, None, *own


def _laid_out(
    shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One empty line of numbers, and its parts in these shapes."""
    sizes = [shape.numel() for shape in shapes]
    flat = torch.empty(sum(sizes), dtype=dtype, device=device)
    return flat, [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
