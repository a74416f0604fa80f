"""What the rooms of `data` hand to each other and to the loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Example:
    """One row of a source in one shape for all formats.

    Attributes:
        source: the data set it came from.
        row: its index there, from 0.
        messages: ``{"role": ..., "content": ...}`` in order; a message may carry ``"train": False``, and what templates
            read besides, such as ``tool_calls`` with arguments as a dict, or ``reasoning_content``.
        tools: JSON schemas of the functions that the assistant may call.
    """

    source: str
    row: int
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class TokenizedRow:
    """A rendered, tokenised and masked row.

    Attributes:
        ids: token ids, ``[length]``.
        labels: `ids` where trained, `IGNORE_INDEX` elsewhere, ``[length]``; the first is never trained.
        truncated: tokens were cut from the right.
    """

    source: str
    row: int
    ids: list[int]
    labels: list[int]
    truncated: bool = False


class PackedRows(Protocol):
    """A split ready to train on: pack i is a list of documents, each ``(input_ids, labels)`` of one length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> list[tuple[list[int], list[int]]]: ...

    def __iter__(self) -> Iterator[list[tuple[list[int], list[int]]]]: ...

    def lengths(self) -> np.ndarray:
        """Tokens of each pack, int64 ``[packs]``."""

    def costs(self) -> np.ndarray:
        """Work of each pack, `trainer.data.sampler.document_cost` summed over its documents, int64 ``[packs]``."""


@dataclass
class PackedBatch:
    """One micro-batch: packs laid end to end as a single row, documents told apart by `cu_seqlens`. No padding.

    Attributes:
        input_ids: ``[1, tokens]`` int64.
        labels: ``[1, tokens]`` int64, `IGNORE_INDEX` where not trained and at each document's first token,
            so shifting by one never crosses a document.
        position_ids: ``[1, tokens]`` int64, from 0 in each document.
        cu_seqlens: ``[documents + 1]`` int32, cumulative lengths from 0.
        max_seqlen: length of the longest document.
        trained_positions: ``[trained]`` int64, positions t whose hidden state predicts a trained token t + 1.
            Computed on the host, so that selecting them costs no device synchronisation.
        seed: of the random numbers (dropout) drawn while computing it.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    trained_positions: torch.Tensor
    seed: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the micro-batch."""
        return self.input_ids.shape[1]

    @property
    def num_trained_tokens(self) -> int:
        """Tokens that count in the loss."""
        return self.trained_positions.shape[0]

    def to(self, device: torch.device) -> PackedBatch:
        """Copies the tensors to `device` without waiting for the copy."""
        return PackedBatch(
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=True),
            max_seqlen=self.max_seqlen,
            trained_positions=self.trained_positions.to(device, non_blocking=True),
            seed=self.seed,
        )


@dataclass
class DataReport:
    """What became of a split's rows; `preprocess` prints it.

    Attributes:
        dropped: rows left out, by reason.
        fill: share of the packs' capacity that holds tokens, 0 to 1.
    """

    rows: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    packs: int = 0
    fill: float = 0.0
    lengths: list[int] = field(default_factory=list)
