"""What is known of a recipe's data since they were last prepared, without reading them again. Imports no torch."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from blake3 import blake3

from trainer.caches import cache_root
from trainer.config import RunConfig
from trainer.data.types import DataReport


@dataclass(frozen=True)
class DataFacts:
    """Counts of the packs trained on.

    Attributes:
        trained_share: of the tokens that are in the loss.
        attended: positions that a token attends to, mean over tokens.
    """

    packs: int
    tokens: int
    trained_share: float
    attended: float

    @classmethod
    def build(cls, report: DataReport) -> DataFacts:
        """From what became of the rows trained on."""
        attended = sum(length * (length + 1) // 2 for length in report.lengths) / report.tokens
        return cls(report.packs, report.tokens, report.trained_tokens / report.tokens, attended)


def remember(config: RunConfig, facts: DataFacts) -> None:
    """Keeps the counts beside the cache, for `recall`; where nothing can be written, it does not."""
    path = _path(config)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(facts)), encoding="utf-8")


def recall(config: RunConfig) -> DataFacts | None:
    """The counts, if these sections of a recipe were prepared here and its files are as they were."""
    try:
        return DataFacts(**json.loads(_path(config).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _path(config: RunConfig) -> Path:
    """By what the recipe says, and size and time of the files it names. What a hub or a folder holds is not asked."""
    model = config.model
    named = [source.path for source in config.data.train] + [config.data.template]
    files = [Path(name).expanduser() for name in named if len(name) < 256]
    state = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    said = [config.data.model_dump(mode="json"), model.path, model.revision, model.tokenizer, state]
    return cache_root() / f"{blake3(json.dumps(said).encode()).hexdigest(length=16)}.facts.json"
