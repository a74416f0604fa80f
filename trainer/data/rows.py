"""Rows of a source, read by index: a large file is never in memory as a whole unless its format leaves no choice."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3

from trainer.checkpoint.layout import hash_file
from trainer.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]
CHUNK_ROWS = 1000


class Rows(ABC):
    """The rows of a source.

    Attributes:
        content_hash: blake3 of the content, in hex; the same for the same bytes wherever they lie.
        columns: names found in the rows.
    """

    content_hash: str
    columns: list[str]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def take(self, indices: Sequence[int]) -> list[Row]:
        """The rows at `indices`, which ascend; one may come several times."""

    def files(self) -> list[tuple[str, int]]:
        """Hash and number of rows of each file they come from, in order."""
        return [(self.content_hash, len(self))]

    def column(self, name: str) -> Iterator[Any]:
        """The values of a column, row by row; None where a row lacks it."""
        for start in range(0, len(self), CHUNK_ROWS):
            chunk = range(start, min(start + CHUNK_ROWS, len(self)))
            yield from (row.get(name) for row in self.take(chunk))


class ListRows(Rows):
    """Rows that are in memory."""

    def __init__(self, rows: list[Row], content_hash: str) -> None:
        self._rows = rows
        self.columns = list(dict.fromkeys(key for row in rows for key in row))
        self.content_hash = content_hash

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, indices: Sequence[int]) -> list[Row]:
        return [self._rows[i] for i in indices]


class JsonLines(Rows):
    """Rows of a .jsonl file, parsed when they are taken."""

    def __init__(self, path: Path, where: str) -> None:
        self._path, self._where = path, where
        starts, numbers, position = [], [], 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    starts.append(position)
                    numbers.append(number)
                position += len(line)
        self._starts, self._numbers = np.array(starts, np.int64), np.array(numbers, np.int64)
        self.content_hash = hash_file(path)

    @cached_property
    def columns(self) -> list[str]:  # type: ignore[override]
        """Of all rows: one may be the first to have a field."""
        names: dict[str, None] = {}
        for start in range(0, len(self), CHUNK_ROWS):
            names |= dict.fromkeys(
                key for row in self.take(range(start, min(start + CHUNK_ROWS, len(self)))) for key in row
            )
        return list(names)

    def __len__(self) -> int:
        return len(self._starts)

    def take(self, indices: Sequence[int]) -> list[Row]:
        rows = []
        with open(self._path, "rb") as file:
            for i in indices:
                file.seek(self._starts[i])
                rows.append(self._parse(file.readline(), int(self._numbers[i])))
        return rows

    def _parse(self, line: bytes, number: int) -> Row:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                self._where, f"{self._path}, line {number} is not JSON: {error}", fix="correct or remove the line"
            ) from error
        return checked_row(row, self._where, f"{self._path}, line {number}")


class TableRows(Rows):
    """Rows of an Arrow table, memory-mapped where the data set is."""

    def __init__(self, table: pa.Table, content_hash: str) -> None:
        self._table = table
        self.columns = table.column_names
        self.content_hash = content_hash

    def __len__(self) -> int:
        return self._table.num_rows

    def take(self, indices: Sequence[int]) -> list[Row]:
        if len(indices) and np.all(np.diff(indices) == 1):  # a range is cut out without a copy
            rows = self._table.slice(indices[0], len(indices)).to_pylist()
        else:
            rows = self._table.take(np.asarray(indices, np.int64)).to_pylist()
        return [{name: _without_nulls(value) for name, value in row.items()} for row in rows]

    def column(self, name: str) -> Iterator[Any]:
        for chunk in self._table.column(name).chunks:
            yield from chunk.to_pylist()


class ChainedRows(Rows):
    """The rows of several files, one file after the other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.columns = list(dict.fromkeys(name for part in parts for name in part.columns))
        self.content_hash = blake3("".join(part.content_hash for part in parts).encode()).hexdigest()

    def files(self) -> list[tuple[str, int]]:
        return [file for part in self._parts for file in part.files()]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def take(self, indices: Sequence[int]) -> list[Row]:
        chosen = np.asarray(indices, np.int64)
        cuts = np.searchsorted(chosen, self._ends)
        rows, first, base = [], 0, 0
        for part, cut, end in zip(self._parts, cuts.tolist(), self._ends.tolist(), strict=True):
            if first < cut:
                rows += part.take((chosen[first:cut] - base).tolist())
            first, base = cut, end
        return rows


def _without_nulls(value: Any) -> Any:
    """Arrow gives each object of a column the fields of all: what an object lacks is null there."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def checked_row(row: Any, where: str, place: str) -> Row:
    """`row`, if it is one.

    Raises:
        UserError: it is not an object of named fields.
    """
    if not isinstance(row, dict):
        raise UserError(
            where, f"{place} is a {type(row).__name__}", "an object of named fields", "correct or remove it"
        )
    return row
