"""``silu(gate) * up`` (arXiv:2002.05202) in one pass over memory forward and one backward."""

from __future__ import annotations

import torch
from torch.nn import functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs comes without
    triton = None

BLOCK = 1024  # elements a program computes


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``; both contiguous, of one shape and dtype."""
    if triton is None or not gate.is_cuda:
        return F.silu(gate) * up
    output = torch.empty_like(gate)
    _forward_kernel[_grid(gate)](gate, up, output, gate.numel(), BLOCK)
    return output


def swiglu_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and up, of their product's."""
    if triton is None or not gate.is_cuda:
        sigmoid = torch.sigmoid(gate)
        return grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    _backward_kernel[_grid(gate)](grad.contiguous(), gate, up, grad_gate, grad_up, gate.numel(), BLOCK)
    return grad_gate, grad_up


def _grid(tensor: torch.Tensor) -> tuple[int]:
    return (triton.cdiv(tensor.numel(), BLOCK),)


if triton is not None:

    @triton.jit
    def _forward_kernel(gate_ptr, up_ptr, output_ptr, size, BLOCK: tl.constexpr):
        offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < size
        gate = tl.load(gate_ptr + offsets, mask=inside).to(tl.float32)
        up = tl.load(up_ptr + offsets, mask=inside).to(tl.float32)
        output = gate * tl.sigmoid(gate) * up
        tl.store(output_ptr + offsets, output.to(output_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def _backward_kernel(grad_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, size, BLOCK: tl.constexpr):
        offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < size
        grad = tl.load(grad_ptr + offsets, mask=inside).to(tl.float32)
        gate = tl.load(gate_ptr + offsets, mask=inside).to(tl.float32)
        up = tl.load(up_ptr + offsets, mask=inside).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
        grad_up = grad * gate * sigmoid
        tl.store(grad_gate_ptr + offsets, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=inside)
        tl.store(grad_up_ptr + offsets, grad_up.to(grad_up_ptr.dtype.element_ty), mask=inside)
