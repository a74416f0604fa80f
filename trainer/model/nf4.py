"""4-bit weights in blocks of 64, the same bytes on every device (QLoRA, arXiv:2305.14314).

bitsandbytes' own kernels round differently on CUDA (approximate reciprocals), on the CPU and from one processor to
another, so a base quantised by them on a GPU is not the one that a CPU makes. Quantisation is therefore spelled out in
elementwise float32 arithmetic, which IEEE 754 fixes; dequantisation is bitsandbytes'. `FourBit.quantize` says how close
the two are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes)
import torch
from bitsandbytes.functional import get_4bit_type
from torch.nn import functional as F

from trainer.errors import UserError
from trainer.model.format import CHUNK, SMALLEST_ABSMAX, Format, aligned
from trainer.model.kernels.dequantize import (
    BLOCK_SIZE,
    FourBitWeights,
    can_dequantize,
    dequantize,
    dequantize_beside,
    to_float8,
)

SCALES_PER_GROUP = 256  # scales that share one second-level scale


@dataclass(frozen=True)
class FourBit(Format):
    """Codes of NF4 or FP4, two a byte, as shares of the largest magnitude of their block of 64 consecutive weights.

    `packed` is ``[out, in / 2]``. Without double quantisation `scales` are the float32 largest magnitudes ``[blocks]``.
    With it, one after the other: the float32 second-level scales ``[ceil(blocks / 256)]``, the float32 mean that was
    subtracted before ``[1]``, and the 8-bit codes ``[blocks]``. Floats come first, so they stay aligned.
    """

    type: Literal["nf4", "fp4"]
    double_quant: bool

    def packed_columns(self, in_features: int) -> int:
        if in_features % 2:
            found = f"{self.type} for a linear layer of {in_features} inputs"
            raise UserError("quantization.type", found, "an even number of inputs", "take int8")
        return in_features // 2

    def num_scale_bytes(self, out_features: int, in_features: int) -> int:
        num_blocks = -(-out_features * in_features // BLOCK_SIZE)
        if not self.double_quant:
            return 4 * num_blocks
        return num_blocks + 4 * (-(-num_blocks // SCALES_PER_GROUP) + 1)

    @torch.no_grad()
    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Format`. Against ``bitsandbytes.functional.quantize_4bit`` 0.50:

        - Block scales: equal.
        - 4-bit codes: equal to its CPU implementation, but for ties in a last block of fewer than 64 weights. Its CUDA
          kernel multiplies by approximate reciprocals, so a weight at the edge of two codes may get the other one: none
          of NF4 from bfloat16, less than one in a million of NF4 from float32 and float16; of FP4, whose values are
          round numbers, six in ten thousand from bfloat16. Its FP4 zeros also carry the other sign.
        - 8-bit codes of the scales: the nearest, as on CUDA; there fewer than one in ten thousand differ, by one, as
          the mean is added up in float64. The CPU kernel looks them up in a table of 65536 entries, which is too coarse
          close to zero: two or three in a thousand differ.
        """
        packed = torch.empty(
            weight.shape[0], self.packed_columns(weight.shape[1]), dtype=torch.uint8, device=weight.device
        )
        bounds, codes_by_value = _code_bounds(self.type, weight.device)
        scales = torch.empty(-(-weight.numel() // BLOCK_SIZE), dtype=torch.float32, device=weight.device)
        chunks = zip(
            weight.reshape(-1).split(CHUNK),
            packed.view(-1).split(CHUNK // 2),
            scales.split(CHUNK // BLOCK_SIZE),
            strict=True,
        )
        for chunk, packed_chunk, scales_chunk in chunks:
            ranks, absmax = _nearest(chunk, BLOCK_SIZE, bounds)
            codes = ranks.to(torch.uint8) if self.type == "nf4" else codes_by_value[ranks]
            torch.add(codes[::2] * 16, codes[1::2], out=packed_chunk)
            scales_chunk.copy_(absmax)
        return packed, _quantize_scales(scales) if self.double_quant else scales.view(torch.uint8)

    def dequantize(
        self, packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        scales = aligned(scales)
        shape, num_weights = [packed.shape[0], packed.shape[1] * 2], packed.numel() * 2
        num_blocks = -(-num_weights // BLOCK_SIZE)
        if can_dequantize(packed):
            out = torch.empty(shape, dtype=dtype, device=packed.device) if out is None else out
            dequantize(self._on_cuda(packed, scales), out)
            return out
        block_scales = _dequantize_scales(scales, num_blocks) if self.double_quant else scales.view(torch.float32)
        # Blocks run on from row to row, but bitsandbytes 0.50's CPU kernel starts a new one at each: give it one row.
        rows = shape if shape[1] % BLOCK_SIZE == 0 else [num_weights]
        weight = torch.ops.bitsandbytes.dequantize_4bit(packed, block_scales, BLOCK_SIZE, self.type, rows, dtype)
        return weight.view(shape) if out is None else out.copy_(weight.view(shape))

    def dequantize_beside(
        self, packed: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, columns: int,
        b: torch.Tensor | None, first: int,
    ) -> None:  # fmt: skip
        if can_dequantize(packed):
            dequantize_beside(self._on_cuda(packed, aligned(scales)), out, b, first)
        else:
            super().dequantize_beside(packed, scales, out, columns, b, first)

    def to_float8(
        self, packed: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, row_scales: torch.Tensor, transposed: bool
    ) -> None:
        if can_dequantize(packed):
            to_float8(self._on_cuda(packed, aligned(scales)), out, row_scales, transposed)
        else:
            super().to_float8(packed, scales, out, row_scales, transposed)

    def _on_cuda(self, packed: torch.Tensor, scales: torch.Tensor) -> FourBitWeights:
        values, scale_values = _values(self.type, packed.device), dynamic_map(packed.device)
        return FourBitWeights(packed, scales, self.double_quant, values, scale_values)


@lru_cache
def _values(type: str, device: torch.device) -> torch.Tensor:
    """Value of each 4-bit code, float32 ``[16]``."""
    return get_4bit_type(type, device="cpu").to(device, torch.float32)


@lru_cache
def dynamic_map(device: torch.device) -> torch.Tensor:
    """The 256 values of the signed 8-bit dynamic type (arXiv:1511.04561), ascending; a constant, so never stored.

    From integers: the last bits of bitsandbytes' ``create_dynamic_map`` depend on the processor's vector instructions.
    """
    magnitudes = [  # 0.1 to 1, 0.01 to 0.1 and so on, each cut into half as many equal parts; of each its centre
        (2 * parts + 9 * odd) / (2 * parts * 10 ** (7 - exponent))
        for exponent, parts in enumerate([1, 2, 4, 8, 16, 32, 64])
        for odd in range(1, 2 * parts, 2)
    ]
    values = sorted([*magnitudes, *(-value for value in magnitudes), 0.0, 1.0])
    return torch.tensor(values, dtype=torch.float32, device=device)


@lru_cache
def _code_bounds(type: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Midpoints between neighbouring values of a 4-bit type ``[15]``, and the codes by ascending value ``[16]``."""
    values, codes = get_4bit_type(type, device="cpu").sort(stable=True)
    return _midpoints(values).to(device), codes.to(device, torch.uint8)


def _midpoints(ascending: torch.Tensor) -> torch.Tensor:
    return (ascending[:-1] + ascending[1:]) / 2


def _nearest(values: torch.Tensor, block_size: int, bounds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank of the value nearest to each element over its block's largest magnitude; of two as near, the lower.

    Args:
        values: ``[n]`` floating; the last block may be short.
        bounds: midpoints of the ascending values, float32.

    Returns:
        Ranks ``[n]`` int32, and the largest magnitudes ``[ceil(n / block_size)]`` float32.
    """
    missing = -len(values) % block_size
    blocks = (F.pad(values, (0, missing)) if missing else values).view(-1, block_size).float()
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    ranks = torch.bucketize(blocks * (1 / absmax.clamp(min=SMALLEST_ABSMAX)), bounds, out_int32=True)
    return ranks.view(-1)[: len(values)], absmax.view(-1)


def _mean(values: torch.Tensor) -> torch.Tensor:
    """Mean ``[1]`` of a float32 vector, added up in float64 in an order that no device chooses for itself."""
    total = values.double()
    while len(total) > 1:
        half = -(-len(total) // 2)
        total = total[:half] + F.pad(total[half:], (0, len(total) % 2))
    return (total / len(values)).float()


def _quantize_scales(scales: torch.Tensor) -> torch.Tensor:
    mean = _mean(scales)
    ranks, second = _nearest(scales - mean, SCALES_PER_GROUP, _midpoints(dynamic_map(scales.device)))
    return torch.cat([second.view(torch.uint8), mean.view(torch.uint8), ranks.to(torch.uint8)])


def _dequantize_scales(scales: torch.Tensor, num_blocks: int) -> torch.Tensor:
    floats = scales[:-num_blocks].view(torch.float32)
    first = torch.ops.bitsandbytes.dequantize_blockwise(
        scales[-num_blocks:], floats[:-1], dynamic_map(scales.device), SCALES_PER_GROUP, torch.float32
    )
    return first.add_(floats[-1])
