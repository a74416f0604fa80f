"""Matrices copied or scaled by row. Where rows lie apart or dtypes differ torch's own goes element by element."""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs comes without
    triton = None

BLOCK = 4096  # columns a program copies
ROWS_AT_ONCE, COLUMNS_AT_ONCE = 64, 128  # that a program scales


def copy_rows(x: torch.Tensor, out: torch.Tensor) -> None:
    """Copies ``[rows, columns]`` `x` into `out` of the same dtype, whose rows may lie apart."""
    if triton is None or not x.is_cuda or x.stride(1) != 1:  # an expanded gradient, say
        out.copy_(x)
        return
    grid = (x.shape[0], triton.cdiv(x.shape[1], BLOCK))
    _copy_kernel[grid](x, out, x.stride(0), out.stride(0), x.shape[1], BLOCK, num_warps=8)


def scale_rows(x: torch.Tensor, factors: torch.Tensor, out: torch.Tensor, transposed: bool = False) -> None:
    """Writes ``x * factors`` into `out`: products in float32, rounded once.

    Args:
        x: ``[rows, columns]`` of any real dtype.
        factors: float32 ``[rows]``.
        out: ``[rows, columns]``, or ``[columns, rows]`` where `transposed`; its rows may lie apart. The products keep
            to the range of its dtype.
    """
    if triton is None or not x.is_cuda:
        torch.mul(x, factors[:, None], out=out.t() if transposed else out)
        return
    rows, columns = x.shape
    strides = (1, out.stride(0)) if transposed else (out.stride(0), 1)
    _scale_kernel[(triton.cdiv(rows, ROWS_AT_ONCE), triton.cdiv(columns, COLUMNS_AT_ONCE))](
        x, factors, out, rows, columns, *x.stride(), *strides,
        TRANSPOSED=transposed, ROWS=ROWS_AT_ONCE, COLUMNS=COLUMNS_AT_ONCE,
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _copy_kernel(x_ptr, output_ptr, x_stride, output_stride, columns, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < columns
        tl.store(output_ptr + row * output_stride + at, tl.load(x_ptr + row * x_stride + at, mask=inside), mask=inside)

    @triton.jit
    def _scale_kernel(
        x_ptr, factors_ptr, output_ptr, rows, columns, x_row_stride, x_column_stride, row_stride, column_stride,
        TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_row_stride + column[None, :] * x_column_stride, mask=inside, other=0)
        products = x.to(tl.float32) * tl.load(factors_ptr + row, mask=row < rows, other=0.0)[:, None]
        products = products.to(output_ptr.dtype.element_ty)
        if TRANSPOSED:
            at = column[:, None] * column_stride + row[None, :] * row_stride
            tl.store(output_ptr + at, tl.trans(products), mask=tl.trans(inside))
        else:
            at = row[:, None] * row_stride + column[None, :] * column_stride
            tl.store(output_ptr + at, products, mask=inside)
