"""``silu(gate) * up`` (arXiv:2002.05202) in one pass over memory forward and one backward."""

from __future__ import annotations

import torch
from torch.nn import functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs comes without
    triton = None

BLOCK = 1024  # columns a program computes


def swiglu(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``silu(gate) * up``; all ``[rows, columns]`` of one dtype, whose rows may lie apart."""
    out = torch.empty_like(gate, memory_format=torch.contiguous_format) if out is None else out
    if triton is None or not gate.is_cuda:
        return torch.mul(F.silu(gate), up, out=out)
    strides = (gate.stride(0), up.stride(0), out.stride(0))
    _forward_kernel[_grid(gate)](gate, up, out, *strides, gate.shape[1], BLOCK)
    return out


def swiglu_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, grad_gate: torch.Tensor, grad_up: torch.Tensor
) -> None:
    """Writes the gradients of gate and up, given their product's; shapes and strides as in `swiglu`."""
    if triton is None or not gate.is_cuda:
        sigmoid = torch.sigmoid(gate)
        grad_gate.copy_(grad * up * sigmoid * (1 + gate * (1 - sigmoid)))
        grad_up.copy_(grad * gate * sigmoid)
        return
    tensors = (grad, gate, up, grad_gate, grad_up)
    strides = (tensor.stride(0) for tensor in tensors)
    _backward_kernel[_grid(gate)](*tensors, *strides, gate.shape[1], BLOCK)


def _grid(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.shape[0], triton.cdiv(tensor.shape[1], BLOCK)


if triton is not None:

    @triton.jit
    def _forward_kernel(
        gate_ptr, up_ptr, output_ptr, gate_stride, up_stride, output_stride, columns, BLOCK: tl.constexpr
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < columns
        gate = tl.load(gate_ptr + row * gate_stride + at, mask=inside).to(tl.float32)
        up = tl.load(up_ptr + row * up_stride + at, mask=inside).to(tl.float32)
        output = (gate * tl.sigmoid(gate) * up).to(output_ptr.dtype.element_ty)
        tl.store(output_ptr + row * output_stride + at, output, mask=inside)

    @triton.jit
    def _backward_kernel(
        grad_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr,
        grad_stride, gate_stride, up_stride, grad_gate_stride, grad_up_stride, columns, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < columns
        grad = tl.load(grad_ptr + row * grad_stride + at, mask=inside).to(tl.float32)
        gate = tl.load(gate_ptr + row * gate_stride + at, mask=inside).to(tl.float32)
        up = tl.load(up_ptr + row * up_stride + at, mask=inside).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        grad_gate = (grad * up * sigmoid * (1 + gate * (1 - sigmoid))).to(grad_gate_ptr.dtype.element_ty)
        grad_up = (grad * gate * sigmoid).to(grad_up_ptr.dtype.element_ty)
        tl.store(grad_gate_ptr + row * grad_gate_stride + at, grad_gate, mask=inside)
        tl.store(grad_up_ptr + row * grad_up_stride + at, grad_up, mask=inside)
