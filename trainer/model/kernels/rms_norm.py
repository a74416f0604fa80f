"""Root mean square norm (arXiv:1910.07467); its backward takes the residual stream's gradient along."""

from __future__ import annotations

import torch
from torch.nn import functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs comes without
    triton = None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` of each row.

    Args:
        x: ``[rows, hidden]``.
        weight: ``[hidden]``.
        out: of the shape and dtype of `x`, whose rows may lie apart; default: a new tensor.

    Returns:
        ``[rows, hidden]`` in the dtype of `x`.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    if triton is None or not x.is_cuda:
        return out.copy_(F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps))
    _forward_kernel[(x.shape[0],)](x.contiguous(), weight, out, x.shape[1], out.stride(0), eps, **_launch(x.shape[1]))
    return out


def rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, residual_grad: torch.Tensor
) -> torch.Tensor:
    """Gradient of `x`, through the norm and past it.

    Args:
        grad: of the norm's output ``[rows, hidden]``.
        residual_grad: of `x` from elsewhere ``[rows, hidden]``, added in the same pass.
    """
    if triton is None or not x.is_cuda:
        wide = x.float() if x.dtype != torch.float64 else x
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        normed, scaled = wide * rstd, grad * weight.to(wide.dtype)
        through = rstd * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
        return (through + residual_grad).to(x.dtype)
    x, grad, residual_grad = x.contiguous(), grad.contiguous(), residual_grad.contiguous()
    output = torch.empty_like(x)
    _backward_kernel[(x.shape[0],)](grad, x, weight, residual_grad, output, x.shape[1], eps, **_launch(x.shape[1]))
    return output


def rms_norm_weight_grad(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Gradient ``[hidden]`` of `weight`."""
    ones = torch.ones((), dtype=x.dtype, device=x.device).expand(x.shape[-1]).contiguous()
    return (grad * rms_norm(x, ones, eps)).sum(0, dtype=torch.float32).to(weight.dtype)


def _launch(hidden: int) -> dict[str, int]:
    block = triton.next_power_of_2(hidden)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


if triton is not None:

    @triton.jit
    def _forward_kernel(x_ptr, weight_ptr, output_ptr, hidden, output_stride, eps, BLOCK: tl.constexpr):
        columns = tl.arange(0, BLOCK)
        inside = columns < hidden
        row = tl.program_id(0).to(tl.int64)
        x = tl.load(x_ptr + row * hidden + columns, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        rstd = 1 / tl.sqrt(tl.sum(x * x) / hidden + eps)
        output = (x * rstd * weight).to(output_ptr.dtype.element_ty)
        tl.store(output_ptr + row * output_stride + columns, output, mask=inside)

    @triton.jit
    def _backward_kernel(grad_ptr, x_ptr, weight_ptr, residual_ptr, output_ptr, hidden, eps, BLOCK: tl.constexpr):
        columns = tl.arange(0, BLOCK)
        inside = columns < hidden
        at = tl.program_id(0).to(tl.int64) * hidden + columns
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        scaled = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32) * weight
        residual = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rstd = 1 / tl.sqrt(tl.sum(x * x) / hidden + eps)
        normed = x * rstd
        through = rstd * (scaled - normed * (tl.sum(scaled * normed) / hidden))
        tl.store(output_ptr + at, (through + residual).to(output_ptr.dtype.element_ty), mask=inside)
