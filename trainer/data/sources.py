"""Where rows come from: local files, and data sets of the hub or of a folder through `datasets`.

A local file never touches the network. Rows are read by index, so a large file is never in memory as a whole unless
its format (json, csv) leaves no choice.
"""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3

from trainer.checkpoint.layout import hash_file
from trainer.config import Source
from trainer.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]


class Rows(ABC):
    """The rows of a source.

    Attributes:
        columns: names found in the rows.
        content_hash: blake3 of the content, in hex; the same for the same bytes wherever they lie.
    """

    columns: list[str]
    content_hash: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def take(self, indices: Sequence[int]) -> list[Row]:
        """The rows at `indices`."""


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
        self.columns = list(dict.fromkeys(key for row in self.take(range(min(100, len(starts)))) for key in row))
        self.content_hash = hash_file(path)

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
        return _checked_row(row, self._where, f"{self._path}, line {number}")


class TableRows(Rows):
    """Rows of an Arrow table, memory-mapped where the data set is."""

    def __init__(self, table: pa.Table, content_hash: str) -> None:
        self._table = table
        self.columns = table.column_names
        self.content_hash = content_hash

    def __len__(self) -> int:
        return self._table.num_rows

    def take(self, indices: Sequence[int]) -> list[Row]:
        if len(indices) and indices[-1] - indices[0] == len(indices) - 1:  # a range is cut out without a copy
            return self._table.slice(indices[0], len(indices)).to_pylist()
        return self._table.take(np.asarray(indices, np.int64)).to_pylist()


def open_source(source: Source, where: str) -> Rows:
    """Opens a file by its ending, or a folder or hub id through `datasets`.

    Args:
        where: the source's place in the recipe, for messages.

    Raises:
        UserError: the file or data set is missing, unreadable or empty.
    """
    path = Path(source.path).expanduser()
    if path.is_file():
        rows = _open_file(path, where)
    elif path.is_dir() or not _looks_local(source.path):
        rows = _open_dataset(source, where)
    else:
        raise UserError(f"{where}.path", f"there is no file {source.path}", fix="correct the path")
    if len(rows) == 0:
        raise UserError(f"{where}.path", f"{source.path} has no rows", fix="give a data set with rows")
    return rows


def _looks_local(path: str) -> bool:
    """Hub ids are ``name`` or ``owner/name``."""
    return path.startswith(("/", ".", "~")) or path.count("/") > 1 or Path(path).suffix in READERS


def _open_file(path: Path, where: str) -> Rows:
    if path.suffix not in READERS:
        allowed = ", ".join(READERS)
        raise UserError(f"{where}.path", f"{path} has no ending that tells its format", allowed, "rename or convert it")
    try:
        return READERS[path.suffix](path, where)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}.path", f"cannot read {path}: {error}", fix="give a readable UTF-8 file") from error


def _read_json(path: Path, where: str) -> Rows:
    try:
        rows = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line under the name of .json, as much of the hub's
            return JsonLines(path, where)
        raise UserError(where, f"{path} is not JSON: {error}", fix="correct the file") from error
    except RecursionError as error:
        raise UserError(where, f"{path} nests too deep", "a list of objects", "correct the file") from error
    if not isinstance(rows, list):
        raise UserError(where, f"{path} holds one {type(rows).__name__}", "a list of objects", "make it a list of rows")
    return ListRows([_checked_row(row, where, f"{path}, row {i}") for i, row in enumerate(rows)], hash_file(path))


def _read_csv(path: Path, where: str) -> Rows:
    csv.field_size_limit(1 << 30)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
    except csv.Error as error:
        raise UserError(where, f"{path} is not CSV: {error}", fix="correct the file") from error
    for i, row in enumerate(rows):
        if None in row:
            raise UserError(
                where, f"{path}, row {i} has more fields than the header", fix="quote fields that hold commas"
            )
    return ListRows(rows, hash_file(path))


def _read_parquet(path: Path, where: str) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        return TableRows(pyarrow.parquet.read_table(path, memory_map=True), hash_file(path))
    except pa.ArrowInvalid as error:
        raise UserError(where, f"{path} is not Parquet: {error}", fix="correct the file") from error


READERS = {".jsonl": JsonLines, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}


def _open_dataset(source: Source, where: str) -> Rows:
    """A hub id, or a local folder that `datasets` can read."""
    import datasets

    try:
        dataset = datasets.load_dataset(source.path, split=source.split)
    except ValueError as error:  # also the errors of `datasets` for unknown splits and configurations
        raise UserError(where, f"{source.path}, split {source.split}: {error}", fix="correct path or split") from error
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{where}.path",
            f"cannot load {source.path}: {error}",
            "a local file, or the id of a data set on the hub",
            "correct the path; without a network download the data set first (HF_HUB_OFFLINE reads the local copy)",
        ) from error
    table = dataset.with_format("arrow")[:]
    return TableRows(table, _hash_table(table))


def _checked_row(row: Any, where: str, place: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(
            where, f"{place} is a {type(row).__name__}", "an object of named fields", "correct or remove it"
        )
    return row


def _hash_table(table: pa.Table) -> str:
    """Hash of schema and values: not of paths or times, which differ between hosts."""
    hasher = blake3(str(table.schema.remove_metadata()).encode(), max_threads=blake3.AUTO)
    for batch in table.to_batches():
        # Written out, as a slice's own buffers are the whole table's: two slices of a split would have one hash.
        hasher.update(memoryview(batch.serialize()))
    return hasher.hexdigest()
