"""Which rows of a source are taken, and how often each is trained on: by a column's value, by number, by weight.

All counts are exact, and what is drawn is a function of the seed alone.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from trainer.config import Source, Where, value_key
from trainer.data.rows import Rows
from trainer.data.sampler import sample_order
from trainer.errors import UserError

MOST_SHOWN, LONGEST_SHOWN = 20, 60
# Draws of one seed are numbered so that none repeats another: the first two are those of the held-out shares.
_SAMPLE, _MIX, _WEIGHT = 2, 1 << 20, 2 << 20


def choose_rows(source: Source, rows: Rows, index: int, seed: int, where: str) -> np.ndarray:
    """The rows of a source that the recipe takes, ascending int64.

    Args:
        index: number of the source in the recipe.
        where: its place there, for messages.

    Raises:
        UserError: a column or value is not there, or fewer rows than are asked for.
    """
    indices = np.arange(len(rows))
    if source.where:
        indices = _choose_by_value(source, source.where, rows, sample_order(len(rows), seed, _MIX + index), where)
    if source.sample is None:
        return indices
    if source.sample > len(indices):
        raise UserError(
            f"{where}.sample",
            f"{source.sample} rows are asked for, {source.path} has {len(indices)}",
            f"1 to {len(indices)}",
            "ask for fewer, or leave sample out to take all",
        )
    return np.sort(indices[sample_order(len(indices), seed, _SAMPLE + index)[: source.sample]])


def repeat_rows(indices: np.ndarray, weight: float, index: int, seed: int) -> np.ndarray:
    """`indices` as often as `weight` says: each ``floor(weight)`` times, and a drawn rest once more.

    Returns:
        ascending int64 ``[round(weight * len(indices))]``.
    """
    whole, count = int(weight), round(weight * len(indices))
    drawn = indices[sample_order(len(indices), seed, _WEIGHT + index)[: count - whole * len(indices)]]
    return np.sort(np.concatenate([np.repeat(indices, whole), drawn]))


def apportion(total: int, ratios: Sequence[float]) -> list[int]:
    """Whole numbers nearest to ``total * ratios`` that add up to `total`: the largest remainders are rounded up."""
    exact = [total * ratio for ratio in ratios]
    counts = [int(value + 1e-9) for value in exact]
    by_remainder = sorted(range(len(ratios)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _choose_by_value(source: Source, wanted: Where, rows: Rows, order: np.ndarray, where: str) -> np.ndarray:
    if wanted.column not in rows.columns:
        raise UserError(
            f"{where}.where.column",
            f"{source.path} has no column {wanted.column!r}",
            f"its columns: {', '.join(rows.columns)}",
            "name one of them",
        )
    numbers = {value_key(value): number for number, value in enumerate(wanted.values)}
    values = list(rows.column(wanted.column))
    groups = np.fromiter(
        (numbers.get(value_key(value), -1) if isinstance(value, str | int | float) else -1 for value in values),
        np.int64,
    )
    counts = np.bincount(groups[groups >= 0], minlength=len(numbers))
    for value, count in zip(wanted.values, counts.tolist(), strict=True):
        if not count:
            raise UserError(
                f"{where}.where.values",
                f"no row of {source.path} has {value!r} as its {wanted.column}",
                _describe_values(values, value),
                "correct the value, or leave it out",
            )
    if wanted.total is None or wanted.ratios is None:
        return np.flatnonzero(groups >= 0)
    return _draw_mix(source, wanted, groups[order], counts, order, where)


def _draw_mix(
    source: Source, wanted: Where, groups: np.ndarray, counts: np.ndarray, order: np.ndarray, where: str
) -> np.ndarray:
    """The first rows of each group in `order`; `groups` is in that order too."""
    assert wanted.total is not None and wanted.ratios is not None
    chosen = []
    for number, count in enumerate(apportion(wanted.total, wanted.ratios)):
        if count > counts[number]:
            raise UserError(
                f"{where}.where.ratios",
                f"{wanted.ratios[number]:g} of {wanted.total} are {count} rows of {wanted.values[number]!r}, "
                f"and {source.path} has {counts[number]}",
                fix="lower the ratio or the total",
            )
        chosen.append(order[groups == number][:count])
    return np.sort(np.concatenate(chosen))


def _describe_values(values: list[object], wanted: object) -> str:
    found = [value[:LONGEST_SHOWN] for value, _ in Counter(map(repr, values)).most_common()]
    near = difflib.get_close_matches(repr(wanted), found, n=1)
    shown = list(dict.fromkeys([*near, *found]))[:MOST_SHOWN]
    more = f" and {len(found) - MOST_SHOWN} more" if len(found) > MOST_SHOWN else ""
    return f"its values: {', '.join(shown)}{more}"
