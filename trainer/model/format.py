"""What a quantised weight is to the rest of the model: two uint8 tensors, and who makes and reads them."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from trainer.model.kernels.float8 import write_float8

CHUNK = 2**22  # weights quantised at a time: some 20 bytes are held for each
SMALLEST_ABSMAX = 2.0**-126  # that is divided by, float32's smallest normal number: zeros become codes of zero


class Format(ABC):
    """How a matrix ``[out, in]`` lies as bytes: ``packed [out, packed_columns]`` and ``scales [num_scale_bytes]``.

    Subclasses are frozen dataclasses, so that equal formats are equal. What they do in `quantize` is elementwise
    float32 arithmetic, which IEEE 754 fixes: the bytes of a weight are the same on every device.
    """

    @abstractmethod
    def packed_columns(self, in_features: int) -> int:
        """Bytes of a row of `packed`.

        Raises:
            UserError: a row of so many weights does not fill whole bytes.
        """

    @abstractmethod
    def num_scale_bytes(self, out_features: int, in_features: int) -> int:
        """Length of `scales`."""

    @abstractmethod
    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`packed` and `scales` of a matrix ``[out, in]`` in float32, bfloat16 or float16.

        Raises:
            UserError: see `packed_columns`.
        """

    @abstractmethod
    def dequantize(
        self, packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The matrix ``[out, in]`` in `dtype` of what `quantize` made; `scales` may begin at any byte of a storage.

        Args:
            out: is filled and returned; of that shape and dtype, its rows may lie apart.
        """

    def dequantize_beside(
        self, packed: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, columns: int,
        b: torch.Tensor | None, first: int,
    ) -> None:  # fmt: skip
        """Writes the matrix, and beside it zeros but for `b`, into ``[out, in + columns]``, whose rows may lie apart.

        Args:
            b: ``[out, r]`` in the dtype of `out`; its columns begin at the `first` of those beside the matrix.
        """
        self.dequantize(packed, scales, out.dtype, out[:, : out.shape[1] - columns])
        lay_beside(out[:, out.shape[1] - columns :], b, first)

    def to_float8(
        self, packed: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, row_scales: torch.Tensor, transposed: bool
    ) -> None:
        """Writes the matrix as shares of its rows' largest magnitudes, see `trainer.model.kernels.float8`.

        Args:
            out: ``[out, in]`` in float8, or ``[in, out]`` where `transposed`; its rows may lie apart.
            row_scales: float32 ``[out]``, written.
        """
        write_float8(self.dequantize(packed, scales, torch.bfloat16), out, row_scales, transposed)


def lay_beside(out: torch.Tensor, b: torch.Tensor | None, first: int) -> None:
    """Fills ``[rows, columns]`` `out` with zeros but for `b`, whose columns begin at the `first`."""
    if b is None or b.shape[1] < out.shape[1]:
        out.zero_()
    if b is not None:
        out[:, first : first + b.shape[1]].copy_(b)


def aligned(scales: torch.Tensor) -> torch.Tensor:
    """The same bytes, beginning where the floats among them may begin: ZeRO-3 gathers into flat buffers."""
    return scales.clone() if scales.storage_offset() % 4 else scales
