"""Linear layers that read one input, with their adapters (LoRA, arXiv:2106.09685): forward and backward spelled out.

Plain functions on tensors, of which `trainer.model.blocks` makes autograd functions. A rank of 16 beside a side of 4096
costs few operations but much memory traffic, if the adapters' products are matmuls of their own. So they become part of
the large one, as further columns of its inner dimension:

    outputs = [x | low rank] @ [W | B].T       with low rank = scaling * x @ A.T
    grad x  = [grad outputs | grad low rank] @ [W / scaling * A]

where ``|`` lays side by side and ``/`` one below the other, over all linears that share x. A quantised weight is
dequantised into such a matrix for each matmul and kept by nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trainer.model.format import Format, lay_beside
from trainer.model.kernels import float8
from trainer.model.kernels.rows import copy_rows


@dataclass(frozen=True)
class LinearSpec:
    """What is not a tensor of a linear layer without bias.

    Attributes:
        format: of a quantised weight; None: the weight is a matrix.
        rank: of its adapter; 0: none.
        float8: multiply the frozen weight in float8, the adapter as ever.
    """

    format: Format | None
    rank: int = 0
    float8: bool = False

    @property
    def num_base(self) -> int:
        return 1 if self.format is None else 2


class Linears:
    """Linear layers that read one input.

    Args:
        specs: one of each.
        tensors: of each its base, ``weight [out, in]`` or ``packed, scales`` of a quantised one, frozen then, and B of
            its adapter, ``[out, r]``; last, where there is any adapter, ``scaling * A`` of all, one below the other,
            ``[total_rank, in]``. Adapters are in the dtype of the matmuls.
    """

    def __init__(self, specs: Sequence[LinearSpec], tensors: Sequence[torch.Tensor]) -> None:
        self.specs, self.bases, self.lora_b = specs, list[tuple[torch.Tensor, ...]](), list[torch.Tensor | None]()
        rest = iter(tensors)
        for spec in specs:
            self.bases.append((next(rest),) if spec.format is None else (next(rest), next(rest)))
            self.lora_b.append(next(rest) if spec.rank else None)
        self.outs, self.ranks = [base[0].shape[0] for base in self.bases], [spec.rank for spec in specs]
        self.total_out, self.total_rank = sum(self.outs), sum(self.ranks)
        self.lora_a = next(rest) if self.total_rank else None

    @property
    def in_float8(self) -> bool:
        """Whether all of them are multiplied so."""
        return self.specs[0].float8

    def weight(self, index: int, dtype: torch.dtype) -> torch.Tensor:
        """A weight ``[out, in]``, dequantised where it has to be."""
        format, base = self.specs[index].format, self.bases[index]
        return base[0].to(dtype) if format is None else format.dequantize(base[0], base[1], dtype)

    def write_weight(self, index: int, out: torch.Tensor) -> None:
        """Writes a weight into ``[out, in]``, whose rows may lie apart."""
        format, base = self.specs[index].format, self.bases[index]
        if format is None:
            out.copy_(base[0])
        else:
            format.dequantize(base[0], base[1], out.dtype, out)

    def write_float8(self, index: int, out: torch.Tensor, row_scales: torch.Tensor, transposed: bool) -> None:
        """See `Format.to_float8`."""
        format, base = self.specs[index].format, self.bases[index]
        if format is None:
            float8.write_float8(base[0], out, row_scales, transposed)
        else:
            format.to_float8(base[0], base[1], out, row_scales, transposed)


def num_tensors(specs: Sequence[LinearSpec]) -> int:
    """Of `Linears`."""
    return sum(spec.num_base + bool(spec.rank) for spec in specs) + any(spec.rank for spec in specs)


def widened(x: torch.Tensor, columns: int, linears: Linears) -> torch.Tensor:
    """Empty ``[rows of x, columns + total_rank]``, in the dtype of `x`."""
    return x.new_empty(len(x), columns + linears.total_rank)


def beside(x: torch.Tensor, linears: Linears) -> torch.Tensor:
    """``[rows, columns + total_rank]``: a copy of `x` with room for the linears' rank-r products beside it."""
    wide = widened(x, x.shape[1], linears)
    copy_rows(x, wide[:, : x.shape[1]])
    return wide


def project(wide: torch.Tensor, linears: Linears, residual: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ W.T + scaling * x @ A.T @ B.T`` of all linears side by side, ``[rows, total_out]``.

    Args:
        wide: ``[rows, in + total_rank]`` in the dtype of the matmuls; its first columns are x, its last are written
            here with the products ``scaling * x @ A.T``, which backward needs.
        residual: ``[rows, out]``, added to the output of a single linear.
    """
    num_inputs = wide.shape[1] - linears.total_rank
    x, low_rank = wide[:, :num_inputs], wide[:, num_inputs:]
    if linears.lora_a is not None:
        torch.mm(x, linears.lora_a.t(), out=low_rank)
    if linears.in_float8:
        return _project_float8(x, low_rank, linears, residual)
    if linears.lora_a is not None:
        weights = _beside_b(linears, num_inputs, wide)
        return wide @ weights.t() if residual is None else torch.addmm(residual, wide, weights.t())
    if residual is not None:
        return torch.addmm(residual, x, linears.weight(0, x.dtype).t())
    outputs = x.new_empty(len(x), linears.total_out)
    for index, output in enumerate(outputs.split(linears.outs, 1)):
        torch.mm(x, linears.weight(index, x.dtype).t(), out=output)
    return outputs


def project_backward(
    grads: torch.Tensor, x: torch.Tensor, low_rank: torch.Tensor, linears: Linears, needs_grad_x: bool
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """Gradients of the input, and of the linears' tensors in the order of `Linears`, None where frozen.

    Args:
        grads: ``[rows, total_out + total_rank]``; its first columns are the outputs' gradients, its last are written
            here with those of the rank-r products.
        x: ``[rows, in]``, low_rank: ``[rows, total_rank]``, as in `project`.
    """
    own_grads, low_rank_grads = grads[:, : linears.total_out].split(linears.outs, 1), grads[:, linears.total_out :]
    found: list[torch.Tensor | None] = []
    for base, lora_b, grad, own, low_rank_grad in zip(
        linears.bases,
        linears.lora_b,
        own_grads,
        low_rank.split(linears.ranks, 1),
        low_rank_grads.split(linears.ranks, 1),
        strict=True,
    ):
        found += [(grad.t() @ x).to(tensor.dtype) if tensor.requires_grad else None for tensor in base]
        if lora_b is not None:
            torch.mm(grad, lora_b, out=low_rank_grad)
            found.append(grad.t() @ own)
    if linears.lora_a is not None:
        found.append(low_rank_grads.t() @ x)
    return _grad_x(grads, own_grads, low_rank_grads, x, linears) if needs_grad_x else None, found


def _grad_x(
    grads: torch.Tensor,
    own_grads: Sequence[torch.Tensor],
    low_rank_grads: torch.Tensor,
    x: torch.Tensor,
    linears: Linears,
) -> torch.Tensor:
    if linears.in_float8:
        return _grad_x_float8(grads[:, : linears.total_out], low_rank_grads, x, linears)
    if linears.lora_a is not None:
        return grads @ _above_a(linears, x)
    grad_x = own_grads[0] @ linears.weight(0, x.dtype)
    for index, grad in enumerate(own_grads[1:], start=1):
        grad_x.addmm_(grad, linears.weight(index, x.dtype))
    return grad_x


def _project_float8(
    x: torch.Tensor, low_rank: torch.Tensor, linears: Linears, residual: torch.Tensor | None
) -> torch.Tensor:
    """As `project`; the adapters' products are added in the dtype of `x`."""
    weights = torch.empty(linears.total_out, x.shape[1], dtype=float8.DTYPE, device=x.device)
    scales = torch.empty(linears.total_out, dtype=torch.float32, device=x.device)
    for index, (rows, own) in enumerate(zip(weights.split(linears.outs), scales.split(linears.outs), strict=True)):
        linears.write_float8(index, rows, own, transposed=False)
    outputs = float8.multiply(*float8.quantize_rows(x), weights, scales, x.dtype)
    products = zip(linears.lora_b, outputs.split(linears.outs, 1), low_rank.split(linears.ranks, 1), strict=True)
    for lora_b, output, own in products:
        if lora_b is not None:
            output.addmm_(own, lora_b.t())
    return outputs if residual is None else outputs.add_(residual)


def _grad_x_float8(
    grads: torch.Tensor, low_rank_grads: torch.Tensor, x: torch.Tensor, linears: Linears
) -> torch.Tensor:
    """``grads @ W``: what W's rows are scaled by goes to the columns of `grads` before those are quantised."""
    weights = torch.empty(x.shape[1], linears.total_out, dtype=float8.DTYPE, device=x.device)
    scales = torch.empty(linears.total_out, dtype=torch.float32, device=x.device)
    columns = zip(weights.split(linears.outs, 1), scales.split(linears.outs), strict=True)
    for index, (own_columns, own) in enumerate(columns):
        linears.write_float8(index, own_columns, own, transposed=True)
    ones = torch.ones(x.shape[1], device=x.device)
    grad_x = float8.multiply(*float8.quantize_rows(grads, scales), weights, ones, x.dtype)
    return grad_x if linears.lora_a is None else grad_x.addmm_(low_rank_grads, linears.lora_a)


def _beside_b(linears: Linears, num_inputs: int, like: torch.Tensor) -> torch.Tensor:
    """``[W | B]`` of each linear one below the other, ``[total_out, in + total_rank]``; no B beside another's W."""
    stacked, first = like.new_empty(linears.total_out, num_inputs + linears.total_rank), 0
    parts = zip(linears.specs, linears.bases, linears.lora_b, stacked.split(linears.outs), strict=True)
    for spec, base, lora_b, rows in parts:
        if spec.format is None:
            rows[:, :num_inputs].copy_(base[0])
            lay_beside(rows[:, num_inputs:], lora_b, first)
        else:
            spec.format.dequantize_beside(base[0], base[1], rows, linears.total_rank, lora_b, first)
        first += spec.rank
    return stacked


def _above_a(linears: Linears, x: torch.Tensor) -> torch.Tensor:
    """All W above all ``scaling * A``, ``[total_out + total_rank, in]``."""
    stacked = x.new_empty(linears.total_out + linears.total_rank, x.shape[1])
    for index, rows in enumerate(stacked[: linears.total_out].split(linears.outs)):
        linears.write_weight(index, rows)
    assert linears.lora_a is not None
    stacked[linears.total_out :].copy_(linears.lora_a)
    return stacked
