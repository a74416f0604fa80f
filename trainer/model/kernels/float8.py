"""Matrices as float8 (e4m3, arXiv:2209.05433) with one scale a row, and their product on the tensor cores.

A share of its row's largest magnitude keeps three bits of mantissa. Shares and scales are computed in float32; products
are added up as fast as the tensor cores can, in less than float32.
"""

from __future__ import annotations

import torch

from trainer.model.kernels.rows import scale_rows

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs comes without
    triton = None

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST = 1e-30  # magnitude that is divided by
BLOCK = 4096  # columns a program quantises at a time


def quantize_rows(x: torch.Tensor, column_scales: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """``x * column_scales`` as shares of each row's largest magnitude.

    Args:
        x: ``[rows, columns]``, whose rows may lie apart.
        column_scales: float32 ``[columns]``.

    Returns:
        Shares ``[rows, columns]`` in float8, and the rows' scales ``[rows, 1]`` float32.
    """
    shares = torch.empty(x.shape, dtype=DTYPE, device=x.device)
    scales = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    if triton is None or not x.is_cuda or x.stride(1) != 1:
        scaled = x.float() if column_scales is None else x.float() * column_scales
        write_float8(scaled, shares, scales.view(-1), transposed=False)
        return shares, scales
    _quantize_kernel[(len(x),)](
        x, x if column_scales is None else column_scales, shares, scales, x.stride(0), x.shape[1],
        SCALED=column_scales is not None, BLOCK=min(BLOCK, triton.next_power_of_2(x.shape[1])), num_warps=8,
    )  # fmt: skip
    return shares, scales


def dequantize_rows(shares: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[rows, columns]`` in `dtype` of what `quantize_rows` gave."""
    if triton is None or not shares.is_cuda:
        return (shares.float() * scales).to(dtype)
    output = torch.empty(shares.shape, dtype=dtype, device=shares.device)
    grid = (len(shares), triton.cdiv(shares.shape[1], BLOCK))
    _dequantize_kernel[grid](shares, scales, output, shares.stride(0), shares.shape[1], BLOCK=BLOCK, num_warps=8)
    return output


def write_float8(weight: torch.Tensor, out: torch.Tensor, row_scales: torch.Tensor, transposed: bool) -> None:
    """As `trainer.model.format.Format.to_float8`, of a matrix ``[out, in]`` in 16 or 32 bit."""
    torch.linalg.vector_norm(weight, torch.inf, dim=1, dtype=torch.float32, out=row_scales)
    row_scales.clamp_(min=SMALLEST).div_(LARGEST)
    scale_rows(weight, row_scales.reciprocal(), out, transposed)


def multiply(
    x: torch.Tensor, x_scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """``(x * x_scales) @ (weight * weight_scales).T`` in `dtype`.

    Args:
        x: ``[rows, in]`` in float8, x_scales: float32 ``[rows, 1]``.
        weight: ``[out, in]`` in float8, weight_scales: float32 ``[out]``.
    """
    if not can_multiply(x.device) or x.shape[1] % 16 or len(weight) % 16:
        return ((x.float() * x_scales) @ (weight.float() * weight_scales[:, None]).t()).to(dtype)
    return torch._scaled_mm(x, weight.t(), x_scales, weight_scales[None], out_dtype=dtype, use_fast_accum=True)


def can_multiply(device: torch.device) -> bool:
    """Whether the device has float8 tensor cores (Ada, Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


if triton is not None:

    @triton.jit
    def _quantize_kernel(
        x_ptr, column_scales_ptr, output_ptr, scales_ptr, x_stride, columns,
        SCALED: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        largest = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, columns, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + row * x_stride + at, mask=at < columns, other=0.0).to(tl.float32)
            if SCALED:
                x *= tl.load(column_scales_ptr + at, mask=at < columns, other=0.0)
            largest = tl.maximum(largest, tl.abs(x))
        scale = tl.maximum(tl.max(largest), 1e-30) / 448
        tl.store(scales_ptr + row, scale)
        for start in range(0, columns, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + row * x_stride + at, mask=at < columns, other=0.0).to(tl.float32)
            if SCALED:
                x *= tl.load(column_scales_ptr + at, mask=at < columns, other=0.0)
            tl.store(output_ptr + row * columns + at, (x / scale).to(output_ptr.dtype.element_ty), mask=at < columns)

    @triton.jit
    def _dequantize_kernel(shares_ptr, scales_ptr, output_ptr, stride, columns, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < columns
        shares = tl.load(shares_ptr + row * stride + at, mask=inside, other=0.0).to(tl.float32)
        output = (shares * tl.load(scales_ptr + row)).to(output_ptr.dtype.element_ty)
        tl.store(output_ptr + row * columns + at, output, mask=inside)
