"""A decoder layer as three autograd nodes around its attention, each of which knows what it may compute again.

``x -> norm -> q, k, v, rotated`` | attention | ``x + output projection`` | ``x + down(silu(gate(norm)) * up(norm))``

Between them autograd keeps the residual stream twice a layer, q, k, v and the attention's output. A node keeps its
linears' parameters themselves (a view of one would pin a gathered base) and the rank-r products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trainer.config import RecomputeLevel
from trainer.model.kernels.rms_norm import rms_norm, rms_norm_backward, rms_norm_weight_grad
from trainer.model.kernels.rope import rotate
from trainer.model.kernels.swiglu import swiglu, swiglu_backward
from trainer.model.linears import LinearSpec, low_rank_product, project, project_backward, unflatten

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
            specs, tensors: of q, k and v, see `trainer.model.linears.unflatten`.

        Returns:
            q, k and v as ``[rows, heads, head_dim]``, and `x` itself: what the residual stream goes on from, so that
            its gradient comes back here and is added where the norm's is computed.
        """
        normed = rms_norm(x, norm_weight, eps)
        outputs, low_rank = project(normed, unflatten(specs, tensors))
        q, k, v = (output.view(len(x), -1, cos.shape[-1]) for output in outputs)
        rotate(q, cos, sin, out=q)
        rotate(k, cos, sin, out=k)
        kept = normed if recompute == "none" else None
        ctx.save_for_backward(x, norm_weight, cos, sin, low_rank, kept, *tensors)
        ctx.eps, ctx.specs = eps, specs
        return q, k, v, x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Grads:
        x, norm_weight, cos, sin, low_rank, normed, *tensors = ctx.saved_tensors
        normed = rms_norm(x, norm_weight, ctx.eps) if normed is None else normed
        grad_q, grad_k = (rotate(grad, cos, sin, inverse=True) for grad in grads[:2])
        grad_heads = [_rows(grad, x) for grad in (grad_q, grad_k, grads[2])]
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_normed, grad_tensors = project_backward(
            grad_heads, normed, low_rank, unflatten(ctx.specs, tensors), needs_grad
        )
        grad_x, grad_weight = _norm_backward(ctx, grad_normed, x, norm_weight, _rows(grads[3], x))
        return grad_x, grad_weight, None, None, None, None, None, *grad_tensors


class AddProjection(torch.autograd.Function):
    """``residual + linear(x)``."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor, spec: LinearSpec, *tensors: torch.Tensor
    ) -> torch.Tensor:
        """``x [rows, in]``, ``residual [rows, out]``, and the linear's tensors."""
        (output,), low_rank = project(x, unflatten([spec], tensors), residual)
        ctx.save_for_backward(x, low_rank, *tensors)
        ctx.spec = spec
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Grads:
        x, low_rank, *tensors = ctx.saved_tensors
        grad = _rows(grads[0], x)
        linears = unflatten([ctx.spec], tensors)
        grad_x, grad_tensors = project_backward([grad], x, low_rank, linears, ctx.needs_input_grad[0])
        return grad_x, grad, None, *grad_tensors


class FeedForward(torch.autograd.Function):
    """``x + down(silu(gate(norm(x))) * up(norm(x)))``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        recompute: RecomputeLevel,
        specs: Sequence[LinearSpec],
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        """
        Args:
            x: ``[rows, hidden]`` in the dtype of the matmuls.
            recompute: ``none`` keeps all matmuls' inputs; ``norms`` keeps gate and up; ``mlp`` keeps `x` alone.
            specs, tensors: of gate, up and down.
        """
        *inner, down = unflatten(specs, tensors)
        normed = rms_norm(x, norm_weight, eps)
        (gate, up), low_rank = project(normed, inner)
        product = swiglu(gate, up)
        (output,), low_rank_down = project(product, [down], residual=x)
        kept: list[torch.Tensor | None] = [normed, product, gate, up, low_rank, low_rank_down]
        if recompute != "none":
            kept[:2] = None, None
        if recompute == "mlp":
            kept[2:] = [None] * 4
        ctx.save_for_backward(x, norm_weight, *kept, *tensors)
        ctx.eps, ctx.specs = eps, specs
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Grads:
        x, norm_weight, normed, product, gate, up, low_rank, low_rank_down, *tensors = ctx.saved_tensors
        *inner, down = unflatten(ctx.specs, tensors)
        grad = _rows(grads[0], x)
        normed = rms_norm(x, norm_weight, ctx.eps) if normed is None else normed
        if gate is None:
            (gate, up), low_rank = project(normed, inner)
            low_rank_down = None
        if product is None:
            product = swiglu(gate, up)
        if low_rank_down is None:
            low_rank_down = low_rank_product(product, [down])
        grad_product, grads_down = project_backward([grad], product, low_rank_down, [down], needs_grad_x=True)
        assert grad_product is not None
        del product
        grad_inner = swiglu_backward(grad_product, gate, up)
        del grad_product, gate, up
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_normed, grads_inner = project_backward(grad_inner, normed, low_rank, inner, needs_grad)
        grad_x, grad_weight = _norm_backward(ctx, grad_normed, x, norm_weight, grad)
        return grad_x, grad_weight, None, None, None, *grads_inner, *grads_down


class SwiGLU(torch.autograd.Function):
    """``silu(gate) * up``, keeping both; what lies between is computed again in backward."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Grads:
        return swiglu_backward(grads[0], *ctx.saved_tensors)


def _norm_backward(
    ctx: Any, grad: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, residual_grad: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the norm's input, the residual stream's own added, and of its weight; None where not needed."""
    if grad is None:
        return None, None
    grad_weight = rms_norm_weight_grad(grad, x, weight, ctx.eps) if ctx.needs_input_grad[1] else None
    grad_x = rms_norm_backward(grad, x, weight, ctx.eps, residual_grad) if ctx.needs_input_grad[0] else None
    return grad_x, grad_weight


def _rows(grad: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``[rows, columns]`` in the dtype of `like`."""
    return grad.reshape(len(like), -1).to(like.dtype)
