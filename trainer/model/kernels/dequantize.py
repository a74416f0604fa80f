"""4-bit weights of `trainer.model.nf4` on CUDA back to 16 bit, or to float8, scales and all in one pass.

bitsandbytes has kernels for the scales and the codes one after the other, and writes a matrix of its own. The numbers
in 16 bit are the same to the bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs comes without
    triton = None

BLOCK_SIZE = 64  # weights that share one scale
BYTES_AT_ONCE = 2048  # of a row
ROWS_AT_ONCE, BLOCKS_AT_ONCE = 128, 2  # of what is transposed


class FourBitWeights(NamedTuple):
    """A matrix ``[out, in]`` in 4 bit.

    Attributes:
        packed: two codes a byte, the first in the high half, ``[out, in / 2]`` uint8.
        scales: bytes of them, beginning where floats may. Of each block its own, float32; or, with `has_codes`, of each
            256 their own scale and last the mean that is added to all, float32, and then a code of each, uint8.
        has_codes: scales are in 8 bit themselves.
        values: of the 4-bit codes, float32 ``[16]``.
        scale_values: of the codes of scales, float32 ``[256]``.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    has_codes: bool
    values: torch.Tensor
    scale_values: torch.Tensor

    @property
    def blocks_a_row(self) -> int:
        return self.packed.shape[1] * 2 // BLOCK_SIZE

    @property
    def num_groups(self) -> int:
        """Of 256 scales."""
        return -(-self.packed.shape[0] * self.blocks_a_row // 256)

    @property
    def scale_arguments(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Of a kernel."""
        return self.scales, self.scale_values, self.num_groups


def can_dequantize(packed: torch.Tensor) -> bool:
    """Whether these kernels take ``packed [out, in / 2]``: on CUDA, rows of whole blocks."""
    return triton is not None and packed.is_cuda and packed.shape[1] * 2 % BLOCK_SIZE == 0


def dequantize(weights: FourBitWeights, out: torch.Tensor) -> None:
    """Writes ``value * scale`` of each weight into ``[out, in]``, whose rows may lie apart."""
    _write_rows(weights, out)


def dequantize_beside(weights: FourBitWeights, out: torch.Tensor, b: torch.Tensor | None, first: int) -> None:
    """As `dequantize`, into ``[out, in + columns]``; its last columns are zeros but for `b`.

    Args:
        b: ``[out, r]`` in the dtype of `out`; its columns begin at the `first` of the last.
    """
    _write_rows(weights, out, b=b, first=first, beside=out.shape[1] - 2 * weights.packed.shape[1])


def to_float8(weights: FourBitWeights, out: torch.Tensor, row_scales: torch.Tensor, transposed: bool) -> None:
    """Writes the weights as shares of their row's largest magnitude.

    Args:
        out: ``[out, in]`` in float8_e4m3fn, or ``[in, out]`` where `transposed`; its rows may lie apart.
        row_scales: float32 ``[out]``, written: a weight is its share times its row's.
    """
    rows, width = len(weights.packed), triton.next_power_of_2(weights.blocks_a_row)
    _row_scale_kernel[(rows,)](
        *weights.scale_arguments, row_scales, weights.blocks_a_row, HAS_CODES=weights.has_codes, BLOCKS=width
    )
    if transposed:
        _write_transposed(weights, out, row_scales)
    else:
        _write_rows(weights, out, row_scales)


def _write_rows(
    weights: FourBitWeights,
    out: torch.Tensor,
    row_scales: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    first: int = 0,
    beside: int = 0,
) -> None:
    rows, columns = weights.packed.shape
    b, rank = (out, 0) if b is None else (b.contiguous(), b.shape[1])
    width = min(BYTES_AT_ONCE, triton.next_power_of_2(columns))
    _rows_kernel[(rows, triton.cdiv(columns, width))](
        weights.packed, *weights.scale_arguments, weights.values, row_scales, b, out, columns, out.stride(0),
        rank, first, beside,
        HAS_CODES=weights.has_codes, SHARES=row_scales is not None, BYTES=width,
        BESIDE=triton.next_power_of_2(beside) if beside else 0, enable_fp_fusion=False,
    )  # fmt: skip


def _write_transposed(weights: FourBitWeights, out: torch.Tensor, row_scales: torch.Tensor) -> None:
    rows, blocks = len(weights.packed), weights.blocks_a_row
    _transposed_kernel[(triton.cdiv(rows, ROWS_AT_ONCE), triton.cdiv(blocks, BLOCKS_AT_ONCE))](
        weights.packed, *weights.scale_arguments, weights.values, row_scales, out, rows, blocks, out.stride(0),
        HAS_CODES=weights.has_codes, ROWS=ROWS_AT_ONCE, BLOCKS=BLOCKS_AT_ONCE, enable_fp_fusion=False,
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _block_scales(scales_ptr, scale_values_ptr, num_groups, block, inside, HAS_CODES: tl.constexpr):
        floats_ptr = scales_ptr.to(tl.pointer_type(tl.float32), bitcast=True)
        if HAS_CODES:
            code = tl.load(scales_ptr + (num_groups + 1) * 4 + block, mask=inside, other=0)
            scale = tl.load(scale_values_ptr + code.to(tl.int32))
            scale = scale * tl.load(floats_ptr + block // 256, mask=inside, other=0.0)
            scale = scale + tl.load(floats_ptr + num_groups)  # not fused: the two are rounded apart elsewhere
        else:
            scale = tl.load(floats_ptr + block, mask=inside, other=0.0)
        return scale

    @triton.jit
    def _row_scale_kernel(
        scales_ptr, scale_values_ptr, num_groups, row_scales_ptr,
        blocks_a_row, HAS_CODES: tl.constexpr, BLOCKS: tl.constexpr,
    ):  # fmt: skip
        column, row = tl.arange(0, BLOCKS), tl.program_id(0).to(tl.int64)
        inside = column < blocks_a_row
        block = row * blocks_a_row + column
        scale = _block_scales(scales_ptr, scale_values_ptr, num_groups, block, inside, HAS_CODES)
        largest = tl.max(tl.where(inside, tl.abs(scale), 0.0))
        tl.store(row_scales_ptr + row, tl.maximum(largest, 1e-30) / 448)  # the largest float8_e4m3fn

    @triton.jit
    def _rows_kernel(
        packed_ptr, scales_ptr, scale_values_ptr, num_groups, values_ptr, row_scales_ptr, b_ptr, output_ptr,
        columns, output_stride, rank, first, beside,
        HAS_CODES: tl.constexpr, SHARES: tl.constexpr, BYTES: tl.constexpr, BESIDE: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
        inside, block = byte < columns, (row * columns + byte) // 32
        if BESIDE:  # by one of a row's programs, and loaded while the codes are on their way
            at, is_one = tl.arange(0, BESIDE), tl.program_id(1) == 0
            b = tl.load(b_ptr + row * rank + at - first, mask=(at >= first) & (at < first + rank) & is_one, other=0.0)
        codes = tl.load(packed_ptr + row * columns + byte, mask=inside, other=0).to(tl.int32)
        scale = _block_scales(scales_ptr, scale_values_ptr, num_groups, block, inside, HAS_CODES)
        if SHARES:
            scale = scale / tl.load(row_scales_ptr + row)
        high, low = tl.load(values_ptr + (codes >> 4)) * scale, tl.load(values_ptr + (codes & 15)) * scale
        column = tl.program_id(1) * BYTES * 2 + tl.arange(0, BYTES * 2)
        # Side by side before they are rounded: ptxas 12.8 takes float8 numbers that are joined to words afterwards from
        # the wrong register.
        weight = tl.interleave(high, low).to(output_ptr.dtype.element_ty)
        tl.store(output_ptr + row * output_stride + column, weight, mask=column < columns * 2)
        if BESIDE:
            tl.store(output_ptr + row * output_stride + columns * 2 + at, b, mask=(at < beside) & is_one)

    @triton.jit
    def _transposed_kernel(
        packed_ptr, scales_ptr, scale_values_ptr, num_groups, values_ptr, row_scales_ptr, output_ptr,
        rows, blocks_a_row, output_stride, HAS_CODES: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        byte = tl.program_id(1) * BLOCKS * 32 + tl.arange(0, BLOCKS * 32)
        inside = (row < rows)[:, None] & (byte < blocks_a_row * 32)[None, :]
        codes = tl.load(packed_ptr + (row * blocks_a_row * 32)[:, None] + byte[None, :], mask=inside, other=0)
        block = (row * blocks_a_row)[:, None] + (byte // 32)[None, :]
        scale = _block_scales(scales_ptr, scale_values_ptr, num_groups, block, inside, HAS_CODES)
        scale = scale / tl.load(row_scales_ptr + row, mask=row < rows, other=1.0)[:, None]
        high = tl.load(values_ptr + (codes.to(tl.int32) >> 4)) * scale
        low = tl.load(values_ptr + (codes.to(tl.int32) & 15)) * scale
        at = output_ptr + (byte.to(tl.int64) * 2 * output_stride)[:, None] + row[None, :]
        inside = tl.trans(inside)
        tl.store(at, tl.trans(high.to(output_ptr.dtype.element_ty)), mask=inside)
        tl.store(at + output_stride, tl.trans(low.to(output_ptr.dtype.element_ty)), mask=inside)
