"""Rotary position embeddings (arXiv:2104.09864) in the layout of Llama's checkpoints: halves of a head are rotated."""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs comes without
    triton = None


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool = False, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Rotates each head of each row by its position's angles.

    Args:
        x: ``[rows, heads, head_dim]``.
        cos, sin: ``[rows, head_dim]``, whose halves are equal, as transformers makes them.
        inverse: rotate back, which is also the gradient.
        out: of the shape and dtype of `x`, which it may be; default: a new tensor.

    Rows of `x` and `out` may lie apart; the heads of a row lie together.

    Returns:
        ``[rows, heads, head_dim]`` in the dtype of `x`.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    half = x.shape[-1] // 2
    if triton is None or not x.is_cuda:
        wide = torch.promote_types(x.dtype, torch.float32)
        c, s = (table[:, None, :half].to(wide) for table in (cos, -sin if inverse else sin))
        first, second = x.to(wide).split(half, dim=-1)
        return out.copy_(torch.cat([first * c - second * s, second * c + first * s], dim=-1))
    rows, heads, dim = x.shape
    if x.stride()[1:] != (dim, 1):
        x = x.contiguous()
    sizes = {"HEADS": triton.next_power_of_2(heads), "HALF": triton.next_power_of_2(half)}
    cos, sin, strides = cos.contiguous(), sin.contiguous(), (x.stride(0), out.stride(0))
    _kernel[(rows,)](x, cos, sin, out, *strides, heads, half, INVERSE=inverse, **sizes, num_warps=8)
    return out


if triton is not None:

    @triton.jit
    def _kernel(
        x_ptr, cos_ptr, sin_ptr, output_ptr, x_stride, output_stride, heads, half,
        INVERSE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, HALF)
        angle = row * 2 * half + columns
        cos = tl.load(cos_ptr + angle, mask=columns < half, other=0.0).to(tl.float32)[None, :]
        sin = tl.load(sin_ptr + angle, mask=columns < half, other=0.0).to(tl.float32)[None, :]
        if INVERSE:
            sin = -sin
        head = tl.arange(0, HEADS)[:, None]
        inside = (head < heads) & (columns < half)[None, :]
        at = head * 2 * half + columns[None, :]
        source, target = x_ptr + row * x_stride + at, output_ptr + row * output_stride + at
        first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
        tl.store(target, (first * cos - second * sin).to(output_ptr.dtype.element_ty), mask=inside)
        tl.store(target + half, (second * cos + first * sin).to(output_ptr.dtype.element_ty), mask=inside)
