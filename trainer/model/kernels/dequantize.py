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
BLOCKS_AT_ONCE = ROWS_AT_ONCE = 64


class FourBitWeights(NamedTuple):
    """A matrix ``[out, in]`` in 4 bit.

    Attributes:
        packed: two codes a byte, the first in the high half, ``[out, in / 2]`` uint8.
        scales: float32 ``[blocks]``; with `second` their codes, uint8 ``[blocks]``.
        second: float32: for each 256 scales their own scale, and last the mean that is added to all; or None.
        values: of the 4-bit codes, float32 ``[16]``.
        scale_values: of the codes of scales, float32 ``[256]``.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    second: torch.Tensor | None
    values: torch.Tensor
    scale_values: torch.Tensor

    @property
    def blocks_a_row(self) -> int:
        return self.packed.shape[1] * 2 // BLOCK_SIZE

    def _scale_arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        second = self.scales if self.second is None else self.second
        return self.scales, second, self.scale_values, len(second) - 1


def can_dequantize(packed: torch.Tensor) -> bool:
    """Whether these kernels take ``packed [out, in / 2]``: on CUDA, rows of whole blocks."""
    return triton is not None and packed.is_cuda and packed.shape[1] * 2 % BLOCK_SIZE == 0


def dequantize(weights: FourBitWeights, out: torch.Tensor) -> None:
    """Writes ``value * scale`` of each weight into ``[out, in]``, whose rows may lie apart."""
    num_blocks = weights.packed.numel() * 2 // BLOCK_SIZE
    _dequantize_kernel[(triton.cdiv(num_blocks, BLOCKS_AT_ONCE),)](
        weights.packed, *weights._scale_arguments(), weights.values, out, num_blocks, weights.blocks_a_row,
        out.stride(0), DOUBLE=weights.second is not None, BLOCKS=BLOCKS_AT_ONCE, enable_fp_fusion=False,
    )  # fmt: skip


def to_float8(weights: FourBitWeights, out: torch.Tensor, row_scales: torch.Tensor, transposed: bool) -> None:
    """Writes the weights as shares of their row's largest magnitude.

    Args:
        out: ``[out, in]`` in float8_e4m3fn, or ``[in, out]`` where `transposed`; its rows may lie apart.
        row_scales: float32 ``[out]``, written: a weight is its share times its row's.
    """
    (rows, columns), double = weights.packed.shape, weights.second is not None
    scales = weights._scale_arguments()
    width = triton.next_power_of_2(weights.blocks_a_row)
    _row_scale_kernel[(rows,)](*scales, row_scales, weights.blocks_a_row, DOUBLE=double, BLOCKS=width)
    strides = (1, out.stride(0)) if transposed else (out.stride(0), 1)
    _float8_kernel[(triton.cdiv(rows, ROWS_AT_ONCE), columns * 2 // BLOCK_SIZE)](
        weights.packed, *scales, weights.values, row_scales, out, rows, weights.blocks_a_row, *strides,
        DOUBLE=double, TRANSPOSED=transposed, ROWS=ROWS_AT_ONCE,
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _block_scales(scales_ptr, second_ptr, scale_values_ptr, num_groups, block, inside, DOUBLE: tl.constexpr):
        scale = tl.load(scales_ptr + block, mask=inside, other=0)
        if DOUBLE:
            scale = tl.load(scale_values_ptr + scale.to(tl.int32))
            scale = scale * tl.load(second_ptr + block // 256, mask=inside, other=0.0)
            scale = scale + tl.load(second_ptr + num_groups)  # not fused: the two are rounded apart elsewhere
        return scale

    @triton.jit
    def _dequantize_kernel(
        packed_ptr, scales_ptr, second_ptr, scale_values_ptr, num_groups, values_ptr, output_ptr,
        num_blocks, blocks_a_row, output_stride, DOUBLE: tl.constexpr, BLOCKS: tl.constexpr,
    ):  # fmt: skip
        block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
        inside = block < num_blocks
        scale = _block_scales(scales_ptr, second_ptr, scale_values_ptr, num_groups, block, inside, DOUBLE)
        pair = tl.arange(0, 32)[None, :]
        codes = tl.load(packed_ptr + block[:, None] * 32 + pair, mask=inside[:, None], other=0).to(tl.int32)
        high = tl.load(values_ptr + (codes >> 4)) * scale[:, None]
        low = tl.load(values_ptr + (codes & 15)) * scale[:, None]
        weights = tl.reshape(tl.join(high, low), (BLOCKS, 64))
        row, column = block // blocks_a_row, block % blocks_a_row * 64
        at = (row * output_stride + column)[:, None] + tl.arange(0, 64)[None, :]
        tl.store(output_ptr + at, weights.to(output_ptr.dtype.element_ty), mask=inside[:, None])

    @triton.jit
    def _row_scale_kernel(
        scales_ptr, second_ptr, scale_values_ptr, num_groups, row_scales_ptr,
        blocks_a_row, DOUBLE: tl.constexpr, BLOCKS: tl.constexpr,
    ):  # fmt: skip
        column, row = tl.arange(0, BLOCKS), tl.program_id(0).to(tl.int64)
        inside = column < blocks_a_row
        block = row * blocks_a_row + column
        scale = _block_scales(scales_ptr, second_ptr, scale_values_ptr, num_groups, block, inside, DOUBLE)
        largest = tl.max(tl.where(inside, tl.abs(scale), 0.0))
        tl.store(row_scales_ptr + row, tl.maximum(largest, 1e-30) / 448)  # the largest float8_e4m3fn

    @triton.jit
    def _float8_kernel(
        packed_ptr, scales_ptr, second_ptr, scale_values_ptr, num_groups, values_ptr, row_scales_ptr, output_ptr,
        rows, blocks_a_row, row_stride, column_stride,
        DOUBLE: tl.constexpr, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = row < rows
        block = row * blocks_a_row + tl.program_id(1)
        scale = _block_scales(scales_ptr, second_ptr, scale_values_ptr, num_groups, block, inside, DOUBLE)
        scale = scale / tl.load(row_scales_ptr + row, mask=inside, other=1.0)
        pair = tl.arange(0, 32)[None, :]
        codes = tl.load(packed_ptr + block[:, None] * 32 + pair, mask=inside[:, None], other=0).to(tl.int32)
        high = tl.load(values_ptr + (codes >> 4)) * scale[:, None]
        low = tl.load(values_ptr + (codes & 15)) * scale[:, None]
        shares = tl.reshape(tl.join(high, low), (ROWS, 64)).to(output_ptr.dtype.element_ty)
        column = tl.program_id(1).to(tl.int64) * 64 + tl.arange(0, 64)
        if TRANSPOSED:
            at = column[:, None] * column_stride + row[None, :] * row_stride
            tl.store(output_ptr + at, tl.trans(shares), mask=inside[None, :])
        else:
            at = row[:, None] * row_stride + column[None, :] * column_stride
            tl.store(output_ptr + at, shares, mask=inside[:, None])
