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
from typing import NamedTuple

import torch

from trainer.model.format import Format
from trainer.model.kernels import float8
from trainer.model.kernels.rows import copy_rows


@dataclass(frozen=True)
class LinearSpec:
    """What is not a tensor of a linear layer.

    Attributes:
        format: of a quantised weight; None: the weight is a matrix.
        scaling: of the adapter's product; None: no adapter.
        float8: multiply the frozen weight in float8, the adapter as ever.
    """

    format: Format | None
    scaling: float | None
    float8: bool = False

    @property
    def num_base(self) -> int:
        return 1 if self.format is None else 2

    @property
    def num_tensors(self) -> int:
        return self.num_base + (0 if self.scaling is None else 2)


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

    @property
    def out_features(self) -> int:
        return self.base[0].shape[0]

    @property
    def rank(self) -> int:
        return 0 if self.lora_a is None else self.lora_a.shape[0]

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight ``[out, in]``, dequantised where it has to be."""
        format = self.spec.format
        return self.base[0].to(dtype) if format is None else format.dequantize(self.base[0], self.base[1], dtype)

    def write_weight(self, out: torch.Tensor) -> None:
        """Writes the weight into ``[out, in]``, whose rows may lie apart."""
        if self.spec.format is None:
            out.copy_(self.base[0])
        else:
            self.spec.format.dequantize(self.base[0], self.base[1], out.dtype, out)

    def write_float8(self, out: torch.Tensor, row_scales: torch.Tensor, transposed: bool) -> None:
        """See `Format.to_float8`."""
        if self.spec.format is None:
            float8.write_float8(self.base[0], out, row_scales, transposed)
        else:
            self.spec.format.to_float8(self.base[0], self.base[1], out, row_scales, transposed)

    def write_scaled_a(self, out: torch.Tensor) -> None:
        """Writes ``scaling * A`` into ``[r, in]``, multiplied in A's own dtype; nothing where there is no adapter."""
        if self.lora_a is not None and self.spec.scaling is not None:
            torch.mul(self.lora_a, self.spec.scaling, out=out)


def unflatten(specs: Sequence[LinearSpec], tensors: Sequence[torch.Tensor]) -> list[Linear]:
    """Linears of their tensors one after the other: base, then A and B of the adapter."""
    linears, rest = [], list(tensors)
    for spec in specs:
        own, rest = rest[: spec.num_tensors], rest[spec.num_tensors :]
        a, b = (None, None) if spec.scaling is None else own[-2:]
        linears.append(Linear(spec, tuple(own if spec.scaling is None else own[:-2]), a, b))
    return linears


def total_rank(linears: Sequence[Linear]) -> int:
    return sum(linear.rank for linear in linears)


def total_out(linears: Sequence[Linear]) -> int:
    return sum(linear.out_features for linear in linears)


def widened(x: torch.Tensor, columns: int, linears: Sequence[Linear]) -> torch.Tensor:
    """Empty ``[rows of x, columns + total_rank]``, in the dtype of `x`."""
    return x.new_empty(len(x), columns + total_rank(linears))


def beside(x: torch.Tensor, linears: Sequence[Linear]) -> torch.Tensor:
    """``[rows, columns + total_rank]``: a copy of `x` with room for the linears' rank-r products beside it."""
    wide = widened(x, x.shape[1], linears)
    copy_rows(x, wide[:, : x.shape[1]])
    return wide


def project(wide: torch.Tensor, linears: Sequence[Linear], residual: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ W.T + scaling * x @ A.T @ B.T`` of all linears side by side, ``[rows, total_out]``.

    Args:
        wide: ``[rows, in + total_rank]`` in the dtype of the matmuls; its first columns are x, its last are written
            here with the products ``scaling * x @ A.T``, which backward needs.
        residual: ``[rows, out]``, added to the output of a single linear.
    """
    num_inputs = wide.shape[1] - total_rank(linears)
    x, low_rank = wide[:, :num_inputs], wide[:, num_inputs:]
    if low_rank.shape[1]:
        torch.mm(x, _stacked_a(linears, x).t(), out=low_rank)
    if linears[0].spec.float8:
        return _project_float8(x, low_rank, linears, residual)
    if low_rank.shape[1]:
        weights = _beside_b(linears, num_inputs, wide)
        return wide @ weights.t() if residual is None else torch.addmm(residual, wide, weights.t())
    if residual is not None:
        (linear,) = linears
        return torch.addmm(residual, x, linear.weight(x.dtype).t())
    outputs = x.new_empty(len(x), total_out(linears))
    for linear, output in zip(linears, outputs.split([linear.out_features for linear in linears], 1), strict=True):
        torch.mm(x, linear.weight(x.dtype).t(), out=output)
    return outputs


def project_backward(
    grads: torch.Tensor, x: torch.Tensor, low_rank: torch.Tensor, linears: Sequence[Linear], needs_grad_x: bool
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """Gradients of the input, and of the linears' tensors in the order of `unflatten`, None where frozen.

    Args:
        grads: ``[rows, total_out + total_rank]``; its first columns are the outputs' gradients, its last are written
            here with those of the rank-r products.
        x: ``[rows, in]``, low_rank: ``[rows, total_rank]``, as in `project`.
    """
    ranks, outs = [linear.rank for linear in linears], [linear.out_features for linear in linears]
    own_grads, low_rank_grads = grads[:, : sum(outs)].split(outs, 1), grads[:, sum(outs) :]
    for linear, grad, low_rank_grad in zip(linears, own_grads, low_rank_grads.split(ranks, 1), strict=True):
        if linear.lora_b is not None:
            torch.mm(grad, linear.lora_b.to(x.dtype), out=low_rank_grad)
    grads_a = (low_rank_grads.t() @ x).split(ranks)
    found: list[torch.Tensor | None] = []
    for linear, grad, own, grad_a in zip(linears, own_grads, low_rank.split(ranks, 1), grads_a, strict=True):
        found += [(grad.t() @ x).to(tensor.dtype) if tensor.requires_grad else None for tensor in linear.base]
        if linear.lora_a is not None and linear.lora_b is not None:
            found.append(grad_a.to(linear.lora_a.dtype).mul_(linear.spec.scaling))
            found.append((grad.t() @ own).to(linear.lora_b.dtype))
    if not needs_grad_x:
        return None, found
    if linears[0].spec.float8:
        return _grad_x_float8(grads[:, : sum(outs)], low_rank_grads, x, linears), found
    if sum(ranks):
        return grads @ _above_a(linears, x), found
    grad_x = own_grads[0] @ linears[0].weight(x.dtype)
    for linear, grad in zip(linears[1:], own_grads[1:], strict=True):
        grad_x.addmm_(grad, linear.weight(x.dtype))
    return grad_x, found


def _project_float8(
    x: torch.Tensor, low_rank: torch.Tensor, linears: Sequence[Linear], residual: torch.Tensor | None
) -> torch.Tensor:
    """As `project`; the adapters' products are added in the dtype of `x`."""
    outs, ranks = [linear.out_features for linear in linears], [linear.rank for linear in linears]
    weights = torch.empty(sum(outs), x.shape[1], dtype=float8.DTYPE, device=x.device)
    scales = torch.empty(sum(outs), dtype=torch.float32, device=x.device)
    for linear, rows, own in zip(linears, weights.split(outs), scales.split(outs), strict=True):
        linear.write_float8(rows, own, transposed=False)
    outputs = float8.multiply(*float8.quantize_rows(x), weights, scales, x.dtype)
    for linear, output, own in zip(linears, outputs.split(outs, 1), low_rank.split(ranks, 1), strict=True):
        if linear.lora_b is not None:
            output.addmm_(own, linear.lora_b.to(x.dtype).t())
    return outputs if residual is None else outputs.add_(residual)


def _grad_x_float8(
    grads: torch.Tensor, low_rank_grads: torch.Tensor, x: torch.Tensor, linears: Sequence[Linear]
) -> torch.Tensor:
    """``grads @ W``: what W's rows are scaled by goes to the columns of `grads` before those are quantised."""
    outs = [linear.out_features for linear in linears]
    weights = torch.empty(x.shape[1], sum(outs), dtype=float8.DTYPE, device=x.device)
    scales = torch.empty(sum(outs), dtype=torch.float32, device=x.device)
    for linear, columns, own in zip(linears, weights.split(outs, 1), scales.split(outs), strict=True):
        linear.write_float8(columns, own, transposed=True)
    ones = torch.ones(x.shape[1], device=x.device)
    grad_x = float8.multiply(*float8.quantize_rows(grads, scales), weights, ones, x.dtype)
    return grad_x.addmm_(low_rank_grads, _stacked_a(linears, x)) if low_rank_grads.shape[1] else grad_x


def _beside_b(linears: Sequence[Linear], num_inputs: int, like: torch.Tensor) -> torch.Tensor:
    """``[W | B]`` of each linear one below the other, ``[total_out, in + total_rank]``; no B beside another's W."""
    stacked = like.new_empty(total_out(linears), num_inputs + total_rank(linears))
    if len(linears) > 1:
        stacked[:, num_inputs:].zero_()
    column = num_inputs
    for linear, rows in zip(linears, stacked.split([linear.out_features for linear in linears]), strict=True):
        linear.write_weight(rows[:, :num_inputs])
        if linear.lora_b is not None:
            rows[:, column : column + linear.rank].copy_(linear.lora_b)
        column += linear.rank
    return stacked


def _above_a(linears: Sequence[Linear], x: torch.Tensor) -> torch.Tensor:
    """All W above all ``scaling * A``, ``[total_out + total_rank, in]``."""
    outs = [linear.out_features for linear in linears]
    stacked = x.new_empty(sum(outs) + total_rank(linears), x.shape[1])
    for linear, rows in zip(linears, stacked[: sum(outs)].split(outs), strict=True):
        linear.write_weight(rows)
    _write_scaled_a(linears, stacked[sum(outs) :])
    return stacked


def _stacked_a(linears: Sequence[Linear], x: torch.Tensor) -> torch.Tensor:
    """``scaling * A`` of all linears one below the other, ``[total_rank, in]``, in the dtype of `x`."""
    stacked = x.new_empty(total_rank(linears), x.shape[1])
    _write_scaled_a(linears, stacked)
    return stacked


def _write_scaled_a(linears: Sequence[Linear], out: torch.Tensor) -> None:
    for linear, rows in zip(linears, out.split([linear.rank for linear in linears]), strict=True):
        linear.write_scaled_a(rows)
