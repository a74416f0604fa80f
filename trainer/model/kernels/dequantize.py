"""4-bit weights of `trainer.model.nf4` back to 16 bit on CUDA, scales and all in one pass, into rows that lie apart.

bitsandbytes has kernels for the scales and the codes one after the other, and writes a matrix of its own. The numbers
are the same to the bit.
"""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs comes without
    triton = None

BLOCK_SIZE = 64  # weights that share one scale
BLOCKS_AT_ONCE = 64


def can_dequantize(packed: torch.Tensor) -> bool:
    """Whether `dequantize` takes ``packed [out, in / 2]``: on CUDA, rows of whole blocks."""
    return triton is not None and packed.is_cuda and packed.shape[1] * 2 % BLOCK_SIZE == 0


def dequantize(
    packed: torch.Tensor,
    scales: torch.Tensor,
    second: torch.Tensor | None,
    values: torch.Tensor,
    scale_values: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Writes ``values[code] * scale`` of each weight.

    Args:
        packed: two codes a byte, the first in the high half, ``[out, in / 2]`` uint8.
        scales: float32 ``[blocks]``; with `second` their codes, uint8 ``[blocks]``.
        second: float32: for each 256 scales their own scale, and last the mean that is added to all.
        values: of the 4-bit codes, float32 ``[16]``.
        scale_values: of the codes of scales, float32 ``[256]``.
        out: ``[out, in]``, whose rows may lie apart.
    """
    num_blocks = packed.numel() * 2 // BLOCK_SIZE
    blocks_a_row = packed.shape[1] * 2 // BLOCK_SIZE
    num_groups = 0 if second is None else len(second) - 1
    _kernel[(triton.cdiv(num_blocks, BLOCKS_AT_ONCE),)](
        packed, scales, scales if second is None else second, values, scale_values, out,
        num_blocks, blocks_a_row, num_groups, out.stride(0), DOUBLE=second is not None, BLOCKS=BLOCKS_AT_ONCE,
        enable_fp_fusion=False,  # a product and a sum are rounded apart elsewhere
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _kernel(
        packed_ptr, scales_ptr, second_ptr, values_ptr, scale_values_ptr, output_ptr,
        num_blocks, blocks_a_row, num_groups, output_stride, DOUBLE: tl.constexpr, BLOCKS: tl.constexpr,
    ):  # fmt: skip
        block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
        inside = block < num_blocks
        scale = tl.load(scales_ptr + block, mask=inside, other=0)
        if DOUBLE:
            scale = tl.load(scale_values_ptr + scale.to(tl.int32))
            scale = scale * tl.load(second_ptr + block // 256, mask=inside, other=0.0)
            scale = scale + tl.load(second_ptr + num_groups)
        pair = tl.arange(0, 32)[None, :]
        codes = tl.load(packed_ptr + block[:, None] * 32 + pair, mask=inside[:, None], other=0).to(tl.int32)
        high = tl.load(values_ptr + (codes >> 4)) * scale[:, None]
        low = tl.load(values_ptr + (codes & 15)) * scale[:, None]
        weights = tl.reshape(tl.join(high, low), (BLOCKS, 64))
        row, column = block // blocks_a_row, block % blocks_a_row * 64
        at = (row * output_stride + column)[:, None] + tl.arange(0, 64)[None, :]
        tl.store(output_ptr + at, weights.to(output_ptr.dtype.element_ty), mask=inside[:, None])
