"""8-bit weights, one scale a row: the vector-wise quantisation of LLM.int8() (arXiv:2208.07339), of weights alone.

Activations stay in 16 bit and so do the matmuls: a weight is dequantised for the call, as 4-bit ones are. LLM.int8()'s
outliers are columns of activations, and there are none to keep apart here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trainer.model.format import CHUNK, SMALLEST_ABSMAX, Format, aligned
from trainer.model.kernels import float8
from trainer.model.kernels.rows import scale_rows

LARGEST = 127  # magnitude of a code; -128 is not used


@dataclass(frozen=True)
class Int8(Format):
    """Codes from -127 to 127, as shares of their row's largest magnitude.

    `packed` are the codes ``[out, in]`` in two's complement, `scales` the float32 largest magnitudes ``[out]``: equal
    to those of ``bitsandbytes.functional.int8_vectorwise_quant`` 0.50 on the CPU.
    """

    def packed_columns(self, in_features: int) -> int:
        return in_features

    def num_scale_bytes(self, out_features: int, in_features: int) -> int:
        return 4 * out_features

    @torch.no_grad()
    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        packed = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        absmax = torch.empty(len(weight), 1, dtype=torch.float32, device=weight.device)
        rows = max(1, CHUNK // weight.shape[1])
        for chunk, codes, scales in zip(weight.split(rows), packed.split(rows), absmax.split(rows), strict=True):
            values = chunk.float()
            torch.amax(values.abs(), dim=1, keepdim=True, out=scales)
            codes.copy_((values * (LARGEST / scales.clamp(min=128 * SMALLEST_ABSMAX))).round_())
        return packed.view(torch.uint8), absmax.view(-1).view(torch.uint8)

    def dequantize(
        self, packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        weight = torch.empty(packed.shape, dtype=dtype, device=packed.device) if out is None else out
        scale_rows(packed.view(torch.int8), aligned(scales).view(torch.float32) * (1 / LARGEST), weight)
        return weight

    def to_float8(
        self, packed: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, row_scales: torch.Tensor, transposed: bool
    ) -> None:
        absmax = aligned(scales).view(torch.float32)
        torch.div(absmax.clamp(min=float8.SMALLEST), float8.LARGEST, out=row_scales)
        scale_rows(packed.view(torch.int8), absmax / (LARGEST * row_scales), out, transposed)
