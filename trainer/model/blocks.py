"""A decoder layer as three autograd nodes around its attention, each of which knows what it may compute again.

``x -> norm -> q, k, v, rotated`` | attention | ``x + output projection`` | ``x + down(silu(gate(norm)) * up(norm))``

Between them autograd keeps the residual stream twice a layer, q, k, v and the attention's output. A node keeps its
linears' bases themselves (a view of one would pin a gathered base), their adapters and the rank-r products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trainer.config import RecomputeLevel
from trainer.model.kernels.float8 import dequantize_rows, quantize_rows
from trainer.model.kernels.rms_norm import rms_norm, rms_norm_backward, rms_norm_weight_grad
from trainer.model.kernels.rope import rotate
from trainer.model.kernels.rows import copy_rows
from trainer.model.kernels.swiglu import swiglu, swiglu_backward
from trainer.model.linears import Linears, LinearSpec, beside, num_tensors, project, project_backward, widened

Grads = tuple[torch.Tensor | None, ...]


class QueryKeyValue(torch.autograd.Function):
    """Norm, the three projections, and rotary positions on q and k."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        cos: torch.Tensor,
        sin: torch.Tensor,
        recompute: RecomputeLevel,
        specs: Sequence[LinearSpec],
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """
        Args:
            x: ``[rows, hidden]`` in the dtype of the matmuls.
            cos, sin: ``[rows, head_dim]``.
            specs, tensors: of q, k and v, see `trainer.model.linears.Linears`.

        Returns:
            q, k and v as ``[rows, heads, head_dim]``, and `x` itself: what the residual stream goes on from, so that
            its gradient comes back here and is added where the norm's is computed.
        """
        linears, head_dim = Linears(specs, tensors), cos.shape[-1]
        wide = _normed(x, norm_weight, eps, linears)
        outputs = project(wide, linears)
        rotated = outputs[:, : -linears.outs[-1]].unflatten(1, (-1, head_dim))  # q and k, which lie side by side
        rotate(rotated, cos, sin, out=rotated)
        q, k, v = (output.unflatten(1, (-1, head_dim)) for output in outputs.split(linears.outs, 1))
        ctx.save_for_backward(x, norm_weight, cos, sin, *_kept(wide, x.shape[1], recompute), *tensors)
        ctx.eps, ctx.specs = eps, specs
        return q, k, v, x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Grads:
        x, norm_weight, cos, sin, normed, low_rank, *tensors = ctx.saved_tensors
        linears = Linears(ctx.specs, tensors)
        if normed is None:
            normed = rms_norm(x, norm_weight, ctx.eps)
        wide = widened(x, linears.total_out, linears)
        own_grads = wide[:, : linears.total_out].split(linears.outs, 1)
        q, k, v = (own.unflatten(1, (-1, cos.shape[-1])) for own in own_grads)
        rotate(grads[0], cos, sin, inverse=True, out=q)
        rotate(grads[1], cos, sin, inverse=True, out=k)
        copy_rows(grads[2].flatten(1), v.flatten(1))
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_normed, grad_tensors = project_backward(wide, normed, low_rank, linears, needs_grad)
        grad_x, grad_weight = _norm_backward(ctx, grad_normed, x, norm_weight, grads[3])
        return grad_x, grad_weight, None, None, None, None, None, *grad_tensors


class AddProjection(torch.autograd.Function):
    """``residual + linear(x)``."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor, spec: LinearSpec, *tensors: torch.Tensor
    ) -> torch.Tensor:
        """``x [rows, in]``, ``residual [rows, out]``, and the linear's tensors."""
        linears = Linears([spec], tensors)
        wide = beside(x, linears)
        output = project(wide, linears, residual)
        ctx.save_for_backward(x, wide[:, x.shape[1] :].clone(), *tensors)
        ctx.spec = spec
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Grads:
        x, low_rank, *tensors = ctx.saved_tensors
        linears = Linears([ctx.spec], tensors)
        wide = beside(grads[0], linears)
        grad_x, grad_tensors = project_backward(wide, x, low_rank, linears, ctx.needs_input_grad[0])
        return grad_x, grads[0], None, *grad_tensors


class FeedForward(torch.autograd.Function):
    """``x + down(silu(gate(norm(x))) * up(norm(x)))``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        recompute: RecomputeLevel,
        keep_in_float8: bool,
        specs: Sequence[LinearSpec],
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        """
        Args:
            x: ``[rows, hidden]`` in the dtype of the matmuls.
            recompute: ``none`` keeps all matmuls' inputs; ``norms`` keeps gate and up; ``mlp`` keeps `x` and the rank-r
                products alone.
            keep_in_float8: gate and up, where they are kept, with a scale each for every row. The gradient of adapters
                then differs by some 3%, that of a whole model by 1% (norm of the difference against the norm).
            specs, tensors: of gate and up, which read one input, and then of down.
        """
        inner, down = _read_mlp(specs, tensors)
        wide = _normed(x, norm_weight, eps, inner)
        both = project(wide, inner)
        wide_product = _product(both, down)
        output = project(wide_product, down, residual=x)
        kept = _kept(wide, x.shape[1], recompute) + _kept(wide_product, both.shape[1] // 2, recompute)
        stored = (None, None) if recompute == "mlp" else _shrunk(both) if keep_in_float8 else (both, None)
        ctx.save_for_backward(x, norm_weight, *stored, *kept, *tensors)
        ctx.eps, ctx.specs = eps, specs
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Grads:
        x, norm_weight, both, scales, normed, low_rank, product, low_rank_down, *tensors = ctx.saved_tensors
        inner, down = _read_mlp(ctx.specs, tensors)
        if both is None:
            wide = _normed(x, norm_weight, ctx.eps, inner)
            both, normed = project(wide, inner), wide[:, : x.shape[1]]
        elif scales is not None:
            both = dequantize_rows(both, scales, x.dtype).view(len(x), -1)
        if normed is None:
            normed = rms_norm(x, norm_weight, ctx.eps)
        gate, up = both.chunk(2, 1)
        if product is None:
            product = swiglu(gate, up)
        grad_product, grads_down = project_backward(beside(grads[0], down), product, low_rank_down, down, True)
        assert grad_product is not None
        del product
        grad_both = widened(x, both.shape[1], inner)
        swiglu_backward(grad_product, gate, up, *grad_both[:, : both.shape[1]].chunk(2, 1))
        del grad_product, both, gate, up
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_normed, grads_inner = project_backward(grad_both, normed, low_rank, inner, needs_grad)
        grad_x, grad_weight = _norm_backward(ctx, grad_normed, x, norm_weight, grads[0])
        return grad_x, grad_weight, None, None, None, None, *grads_inner, *grads_down


class SwiGLU(torch.autograd.Function):
    """``silu(gate) * up``, keeping both; what lies between is computed again in backward."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return swiglu(gate.view(-1, gate.shape[-1]), up.view(-1, up.shape[-1])).view_as(gate)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Grads:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        flat = [x.view(-1, x.shape[-1]) for x in (grads[0].contiguous(), gate, up, grad_gate, grad_up)]
        swiglu_backward(*flat)
        return grad_gate, grad_up


def _read_mlp(specs: Sequence[LinearSpec], tensors: Sequence[torch.Tensor]) -> tuple[Linears, Linears]:
    """Gate and up, and down."""
    count = num_tensors(specs[:-1])
    return Linears(specs[:-1], tensors[:count]), Linears(specs[-1:], tensors[count:])


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float, linears: Linears) -> torch.Tensor:
    """The norm of `x` with room for the linears' rank-r products beside it."""
    wide = widened(x, x.shape[1], linears)
    rms_norm(x, weight, eps, out=wide[:, : x.shape[1]])
    return wide


def _product(both: torch.Tensor, down: Linears) -> torch.Tensor:
    """``silu(gate) * up`` of gate and up side by side, with room for the rank-r product of `down` beside it."""
    gate, up = both.chunk(2, 1)
    wide = widened(both, gate.shape[1], down)
    swiglu(gate, up, out=wide[:, : gate.shape[1]])
    return wide


def _shrunk(both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up side by side as float8, each row's gate above its up, with a scale for either."""
    return quantize_rows(both.view(2 * len(both), -1))


def _kept(wide: torch.Tensor, columns: int, recompute: RecomputeLevel) -> tuple[torch.Tensor | None, ...]:
    """What backward is given of a linear's input and of the rank-r products beside it."""
    if recompute == "none":
        return wide[:, :columns], wide[:, columns:]
    return None, wide[:, columns:].clone()  # a view would keep all of it


def _norm_backward(
    ctx: Any, grad: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, residual_grad: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the norm's input, the residual stream's own added, and of its weight; None where not needed."""
    if grad is None:
        return None, None
    grad_weight = rms_norm_weight_grad(grad, x, weight, ctx.eps) if ctx.needs_input_grad[1] else None
    grad_x = rms_norm_backward(grad, x, weight, ctx.eps, residual_grad) if ctx.needs_input_grad[0] else None
    return grad_x, grad_weight
