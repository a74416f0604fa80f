"""Linear layers that read one input, with their adapters (LoRA, arXiv:2106.09685): forward and backward spelled out.

Plain functions on tensors, of which `trainer.model.blocks` makes autograd functions. A quantised weight is dequantised
for each matmul and kept by nobody. The adapters' products are written where the large matmul then adds its own, and one
matmul serves the A of all layers that share an input: a rank of 16 next to 4096 costs memory traffic and little else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from trainer.model.format import Format


@dataclass(frozen=True)
class LinearSpec:
    """What is not a tensor of a linear layer.

    Attributes:
        format: of a quantised weight; None: the weight is a matrix.
        scaling: of the adapter's product; None: no adapter.
    """

    format: Format | None
    scaling: float | None

    @property
    def num_tensors(self) -> int:
        return (1 if self.format is None else 2) + (0 if self.scaling is None else 2)


class Linear(NamedTuple):
    """A linear layer without bias.

    Attributes:
        base: ``weight [out, in]``, or ``packed, scales`` of a quantised one, frozen then.
        lora_a: ``[r, in]``, lora_b: ``[out, r]``, in their own dtype; None without adapter.
    """

    spec: LinearSpec
    base: tuple[torch.Tensor, ...]
    lora_a: torch.Tensor | None
    lora_b: torch.Tensor | None

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight ``[out, in]``, dequantised where it has to be."""
        format = self.spec.format
        return self.base[0].to(dtype) if format is None else format.dequantize(self.base[0], self.base[1], dtype)

    @property
    def scaling(self) -> float:
        return self.spec.scaling or 0.0

    @property
    def rank(self) -> int:
        return 0 if self.lora_a is None else self.lora_a.shape[0]


def unflatten(specs: Sequence[LinearSpec], tensors: Sequence[torch.Tensor]) -> list[Linear]:
    """Linears of their tensors one after the other: base, then A and B of the adapter."""
    linears, rest = [], list(tensors)
    for spec in specs:
        own, rest = rest[: spec.num_tensors], rest[spec.num_tensors :]
        a, b = (None, None) if spec.scaling is None else own[-2:]
        linears.append(Linear(spec, tuple(own if spec.scaling is None else own[:-2]), a, b))
    return linears


def project(
    x: torch.Tensor, linears: Sequence[Linear], residual: torch.Tensor | None = None
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """``x @ W.T + scaling * x @ A.T @ B.T`` of each linear.

    Args:
        x: ``[rows, in]`` in the dtype of the matmuls.
        residual: ``[rows, out]``, added to the outputs.

    Returns:
        Outputs ``[rows, out]``, and ``scaling * x @ A.T`` of all linears side by side, ``[rows, sum of r]``.
    """
    low_rank = low_rank_product(x, linears)
    outputs = []
    for linear, own in zip(linears, low_rank.split([linear.rank for linear in linears], dim=1), strict=True):
        output = None
        if linear.lora_b is not None:
            b = linear.lora_b.to(x.dtype).t()
            output = own @ b if residual is None else torch.addmm(residual, own, b)
        elif residual is not None:
            output = residual.clone()  # the caller's own
        outputs.append(_add_matmul(output, x, linear.weight(x.dtype).t()))
    return outputs, low_rank


def low_rank_product(x: torch.Tensor, linears: Sequence[Linear]) -> torch.Tensor:
    """``scaling * x @ A.T`` of all linears side by side, ``[rows, sum of r]``."""
    return x @ _stacked_a(linears, x).t()


def project_backward(
    grads: Sequence[torch.Tensor],
    x: torch.Tensor,
    low_rank: torch.Tensor,
    linears: Sequence[Linear],
    needs_grad_x: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """Gradients of the input, and of the linears' tensors in the order of `unflatten`, None where frozen.

    Args:
        grads: of the outputs, ``[rows, out]`` each, in the dtype of `x`.
        x, low_rank: as given to and by `project`.
    """
    ranks = [linear.rank for linear in linears]
    grad_low_rank = torch.empty_like(low_rank)
    for grad, linear, own in zip(grads, linears, grad_low_rank.split(ranks, dim=1), strict=True):
        if linear.lora_b is not None:
            torch.mm(grad, linear.lora_b.to(x.dtype), out=own)
    grads_a = (grad_low_rank.t() @ x).split(ranks)
    found: list[torch.Tensor | None] = []
    for grad, linear, own, grad_a in zip(grads, linears, low_rank.split(ranks, dim=1), grads_a, strict=True):
        found += [(grad.t() @ x).to(tensor.dtype) if tensor.requires_grad else None for tensor in linear.base]
        if linear.lora_a is not None and linear.lora_b is not None:
            found.append(grad_a.to(linear.lora_a.dtype) * linear.scaling)
            found.append((grad.t() @ own).to(linear.lora_b.dtype))
    if not needs_grad_x:
        return None, found
    grad_x = grad_low_rank @ _stacked_a(linears, x) if any(ranks) else None
    for grad, linear in zip(grads, linears, strict=True):
        grad_x = _add_matmul(grad_x, grad, linear.weight(x.dtype))
    return grad_x, found


def _add_matmul(sum_: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``sum_ + left @ right`` in the memory of `sum_`."""
    return left @ right if sum_ is None else sum_.addmm_(left, right)


def _stacked_a(linears: Sequence[Linear], x: torch.Tensor) -> torch.Tensor:
    """``scaling * A`` of all linears one below the other, ``[sum of r, in]``, in the dtype of `x`."""
    scaled = [(linear.lora_a * linear.scaling).to(x.dtype) for linear in linears if linear.lora_a is not None]
    return torch.cat(scaled) if scaled else x.new_zeros(0, x.shape[1])
