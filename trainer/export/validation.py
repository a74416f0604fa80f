"""What merging did to the validation loss: measured on the same few rows before and after, and written down."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from trainer.checkpoint.layout import MANIFEST, read_manifest, write_atomically
from trainer.config import RunConfig
from trainer.data.masking import build_labels
from trainer.data.prepare import iter_split_examples
from trainer.data.types import IGNORE_INDEX, TokenizedRow
from trainer.errors import UserError
from trainer.export.card import write_merge_line
from trainer.prompting import Prompting

logger = logging.getLogger(__name__)
# Both models see the same tokens, so the difference of their losses is far more certain than either.
MAX_ROWS, MAX_TOKENS = 8, 256


@dataclass(frozen=True)
class ValidationLoss:
    """Mean cross entropy of the first validation rows' trained tokens, in nats.

    Attributes:
        rows: of them, cut to `MAX_TOKENS`. tokens: trained ones.
        base: of the model that was merged onto. as_trained: of base and adapter as in training. merged: of the export.
    """

    rows: int
    tokens: int
    base: float
    as_trained: float
    merged: float

    def __str__(self) -> str:
        return (
            f"{self.merged:.4f} merged, {self.as_trained:.4f} as trained ({self.merged - self.as_trained:+.4f}), "
            f"{self.base:.4f} without the adapter; over {self.tokens} trained tokens of "
            f"{self.rows} row{'s' * (self.rows != 1)}"
        )


def validation_rows(config: RunConfig | None, prompting: Prompting) -> list[TokenizedRow]:
    """The first validation rows with something trained in them; none where the data is gone or has no such split."""
    if config is None or not config.data.split.validation:
        return []
    tokenizer: Any = prompting.tokenizer
    try:
        examples = list(
            islice(iter_split_examples(prompting.as_trained(config), "validation", tokenizer), 2 * MAX_ROWS)
        )
        made = build_labels(examples, prompting.template, tokenizer, config.data)
    except (UserError, OSError) as error:
        logger.info("the validation loss is not measured, as the run's data cannot be read: %s", error)
        return []
    rows = [
        TokenizedRow(row.source, row.row, row.ids[:MAX_TOKENS], row.labels[:MAX_TOKENS])
        for row in made
        if isinstance(row, TokenizedRow)
    ]
    return [row for row in rows if _num_trained(row)][:MAX_ROWS]


def mean_loss(logits: torch.Tensor, rows: Sequence[TokenizedRow]) -> float:
    """Mean cross entropy over the rows' trained tokens.

    Args:
        logits: ``[tokens of all rows, vocab_size]`` float32.
    """
    total = 0.0
    for row, own in zip(rows, logits.split([len(row.ids) for row in rows]), strict=True):
        labels = torch.tensor(row.labels[1:])
        total += F.cross_entropy(own[:-1], labels, ignore_index=IGNORE_INDEX, reduction="sum").item()
    return total / sum(map(_num_trained, rows))


def compare_losses(
    rows: Sequence[TokenizedRow], base: torch.Tensor, as_trained: torch.Tensor, merged: torch.Tensor
) -> ValidationLoss | None:
    """From the three models' logits of `rows`, each as for `mean_loss`; None for no rows."""
    if not rows:
        return None
    losses = [mean_loss(logits, rows) for logits in (base, as_trained, merged)]
    return ValidationLoss(len(rows), sum(map(_num_trained, rows)), *losses)


def record_proof(folder: Path, loss: ValidationLoss | None) -> None:
    """Writes that a merged folder is verified into its manifest; before that the figures, if any, into its card too."""
    manifest = read_manifest(folder)
    proven = {**manifest, "verified": True} | ({"validation_loss": asdict(loss)} if loss else {})
    if manifest == proven:
        return
    with contextlib.suppress(OSError):  # of a folder that is only for reading
        if loss:
            write_merge_line(folder, "Validation loss", str(loss))
        write_atomically(folder / MANIFEST, json.dumps(proven, indent=1) + "\n")


def _num_trained(row: TokenizedRow) -> int:
    return sum(label != IGNORE_INDEX for label in row.labels[1:])
