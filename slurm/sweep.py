"""A sweep: the same recipe with some fields varied, one run for each combination, as one array of SLURM."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.errors import UserError

MOST_RUNS = 1000
MOST_IN_NAME = 120  # characters; file systems take 255 bytes


@dataclass(frozen=True)
class Variation:
    """One run of a sweep.

    Attributes:
        name: of its run dir inside the sweep's folder, such as ``optim.lr=1e-4,adapter.r=8``.
        values: dotted field -> value as it was written.
    """

    name: str
    values: dict[str, str]


def expand(arrays: Sequence[str]) -> list[Variation]:
    """All combinations of ``field=value,value...``; the last field varies fastest.

    Commas inside brackets or braces do not separate: ``adapter.targets=[q_proj,v_proj],all-linear`` are two values.

    Raises:
        UserError: not written so, a field or value given twice, or too many runs.
    """
    fields: dict[str, list[str]] = {}
    for text in arrays:
        field, equals, values = text.partition("=")
        found = _split(values)
        if not equals or not re.fullmatch(r"[\w.\[\]]+", field) or not all(found):
            raise UserError("--array", repr(text), "field=value,value such as optim.lr=1e-4,2e-4")
        if field in fields or len(set(found)) < len(found):
            twice = field if field in fields else next(value for value in found if found.count(value) > 1)
            raise UserError("--array", f"{twice} given twice", fix="keep one of them")
        if field.startswith("slurm"):
            raise UserError("--array", f"varies {field}, and all runs of an array ask SLURM for the same")
        fields[field] = found
    if not fields:
        return []
    combinations = list(itertools.product(*fields.values()))
    if len(combinations) > MOST_RUNS:
        raise UserError("--array", f"{len(combinations)} runs", f"at most {MOST_RUNS}", "vary fewer fields at once")
    variations: list[Variation] = []
    for combination in combinations:
        chosen = dict(zip(fields, combination, strict=True))
        variations.append(Variation(_name(chosen, len(variations)), chosen))
    return variations


def _split(values: str) -> list[str]:
    parts, depth = [""], 0
    for letter in values:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _name(values: dict[str, str], index: int) -> str:
    """Says the values; where they make no file name, also the run's number, so that none is like another."""
    text = ",".join(f"{field}={value}" for field, value in values.items())
    name = re.sub(r"[^\w.=,+-]+", "-", text, flags=re.ASCII)
    return name if name == text and len(name) <= MOST_IN_NAME else f"{index:03d}-{name[:MOST_IN_NAME]}"
