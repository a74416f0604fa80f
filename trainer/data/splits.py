"""Which rows of which source belong to which split. A row is in one split only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from trainer.config import DataConfig, RunConfig, Source
from trainer.data.formats import find_columns
from trainer.data.mixing import choose_rows, repeat_rows
from trainer.data.rows import CHUNK_ROWS, Row, Rows
from trainer.data.sampler import sample_order
from trainer.data.sources import open_source
from trainer.errors import UserError

SplitName = Literal["train", "validation", "test"]
HELD_OUT: tuple[SplitName, SplitName] = ("validation", "test")


@dataclass(frozen=True)
class Part:
    """The rows of one source that belong to one split.

    Attributes:
        index: number of the source in `all_sources`.
        columns: of `formats.find_columns`.
        indices: which rows, ascending int64; one that is trained on several times an epoch is there as often.
    """

    index: int
    source: Source
    rows: Rows
    columns: dict[str, tuple[str, ...]]
    indices: np.ndarray

    def chunks(self) -> Iterator[tuple[list[int], list[Row]]]:
        """Indices and rows, some at a time."""
        for start in range(0, len(self.indices), CHUNK_ROWS):
            indices = self.indices[start : start + CHUNK_ROWS].tolist()
            yield indices, self.rows.take(indices)


def all_sources(data: DataConfig) -> list[tuple[str, Source]]:
    """Every source of a recipe with its place there, in order."""
    named = [(f"data.train[{i}]", source) for i, source in enumerate(data.train)]
    for name in HELD_OUT:
        own = getattr(data.split, name)
        if isinstance(own, list):
            named += [(f"data.split.{name}[{i}]", source) for i, source in enumerate(own)]
    return named


def draw_splits(config: RunConfig) -> dict[SplitName, list[Part]]:
    """Opens the sources and deals their rows to the splits that the recipe asks for.

    Raises:
        UserError: a source or column is wrong, or a split that is asked for would be empty.
    """
    data = config.data
    _check_evaluation(config)
    opened = [_open_part(i, where, source, data.split.seed) for i, (where, source) in enumerate(all_sources(data))]
    parts: dict[SplitName, list[Part]] = {"train": opened[: len(data.train)]}
    rest = opened[len(data.train) :]
    for name in HELD_OUT:
        own = getattr(data.split, name)
        if isinstance(own, list) and own:
            parts[name], rest = rest[: len(own)], rest[len(own) :]
        elif own:
            parts[name] = []
    _refuse_overlap(parts)
    _hold_out(parts, data)
    parts["train"] = _weighted(parts["train"], data.split.seed)
    return parts


def _open_part(index: int, where: str, source: Source, seed: int) -> Part:
    if source.weight != 1 and not where.startswith("data.train"):
        raise UserError(f"{where}.weight", "is for rows that are trained on", fix="leave it out; sample takes fewer")
    rows = open_source(source, where)
    columns = find_columns(source, rows.columns, where)
    indices = choose_rows(source, rows, index, seed, where)
    return Part(index, source, rows, columns, indices)


def _hold_out(parts: dict[SplitName, list[Part]], data: DataConfig) -> None:
    """Moves the shares that are asked for from train to their splits, with every copy of a row."""
    total = _count(parts["train"])
    for draw, name in enumerate(HELD_OUT):
        share = getattr(data.split, name)
        if name not in parts or isinstance(share, list):
            continue
        train = parts["train"]
        count, available = round(share * total), _count(train)
        order = sample_order(available, data.split.seed, draw)
        parts[name] = _restrict(train, np.sort(order[:count]))
        parts["train"] = _without(_restrict(train, np.sort(order[count:])), parts[name])
        if not count or not parts["train"]:
            raise UserError(
                f"data.split.{name}",
                f"a share of {share:g} of {total} rows leaves {'none to train on' if count else 'no row for it'}",
                fix="change the share, or give more rows",
            )


def _weighted(train: list[Part], seed: int) -> list[Part]:
    """Rows as often as their source's weight says: after the held-out rows are gone, so that no copy stays behind."""
    weighted = []
    for part in train:
        indices = repeat_rows(part.indices, part.source.weight, part.index, seed)
        if not len(indices):
            raise UserError(
                f"data.train[{part.index}].weight",
                f"{part.source.weight:g} of {len(part.indices)} rows leaves none",
                fix="raise it, or leave the source out",
            )
        weighted.append(replace(part, indices=indices))
    return weighted


def _refuse_overlap(parts: dict[SplitName, list[Part]]) -> None:
    """Held-out sources of their own must not hold rows that are trained on or tested elsewhere."""
    for name, other in (("validation", "train"), ("test", "train"), ("test", "validation")):
        for part in parts.get(name, []):  # type: ignore[call-overload]
            for twin in parts.get(other, []):  # type: ignore[call-overload]
                if _shared(part, twin).any():
                    raise UserError(
                        f"data.split.{name}",
                        f"rows of {part.source.path} are in {other} too",
                        "rows that no other split has",
                        "name another file, or hold out a share of train's rows",
                    )


def _without(train: list[Part], held_out: list[Part]) -> list[Part]:
    """`train` less the rows of `held_out`, which can be there again where a data set is listed twice."""
    kept = []
    for part in train:
        taken = np.zeros(len(part.indices), bool)
        for held in held_out:
            taken |= _shared(part, held)
        indices = part.indices[~taken]
        if len(indices):
            kept.append(replace(part, indices=indices))
    return kept


def _shared(part: Part, other: Part) -> np.ndarray:
    """Which of `part`'s rows are `other`'s too, bool ``[rows]``: the same rows of the same files, however named."""
    taken: dict[str, list[np.ndarray]] = {}
    for content_hash, _, rows in _rows_by_file(other):
        taken.setdefault(content_hash, []).append(rows)
    shared = np.zeros(len(part.indices), bool)
    for content_hash, where, rows in _rows_by_file(part):
        for others in taken.get(content_hash, []):
            shared[where] |= np.isin(rows, others)
    return shared


def _rows_by_file(part: Part) -> Iterator[tuple[str, slice, np.ndarray]]:
    """For each file its hash, which of the part's indices are of it, and these counted from its first row."""
    first = start = 0
    for content_hash, num_rows in part.rows.files():
        stop = int(np.searchsorted(part.indices, first + num_rows))
        yield content_hash, slice(start, stop), part.indices[start:stop] - first
        first, start = first + num_rows, stop


def _count(parts: list[Part]) -> int:
    return sum(len(part.indices) for part in parts)


def _restrict(train: list[Part], positions: np.ndarray) -> list[Part]:
    """The rows at `positions`, ascending, counted over all of `train`."""
    ends = np.cumsum([len(part.indices) for part in train])
    cuts = np.searchsorted(positions, ends)
    kept, start, base = [], 0, 0
    for part, cut, end in zip(train, cuts.tolist(), ends.tolist(), strict=True):
        chosen = part.indices[positions[start:cut] - base]
        start, base = cut, end
        if len(chosen):
            kept.append(replace(part, indices=chosen))
    return kept


def _check_evaluation(config: RunConfig) -> None:
    if config.data.split.validation:
        return
    reasons = {
        "schedule.name: plateau": config.schedule.name == "plateau",
        "eval.early_stopping": config.eval.early_stopping is not None,
        "eval.every_steps": config.eval.every_steps is not None and not config.eval.samples,
    }
    for field, asked in reasons.items():
        if asked:
            raise UserError(
                "data.split.validation",
                f"{field} needs validation rows, and there are none",
                fix="set data.split.validation to a share such as 0.02, or to sources of its own",
            )
