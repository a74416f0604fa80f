"""The cache of tokenised, masked and packed splits: Arrow files in a folder named by the content they come from.

::

    <cache>/<key>/train/rows.arrow    a row each: input_ids, labels, source (its index in the recipe), row, truncated
    <cache>/<key>/train/packs.arrow   a pack each: the rows in it
    <cache>/<key>/meta.json           counts of every split, and the fingerprint of all of them
    <cache>/<recipe>.facts.json       counts for who plans a recipe without reading its data (`trainer.data.recall`)

A folder is built under another name and renamed when it is complete and on disk, so it is there whole or not at all; of
several builders, on one host or many, one renames first and the others throw theirs away.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import time
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
from blake3 import blake3

from trainer.caches import cache_root
from trainer.checkpoint.layout import sync
from trainer.data.packing import Packs
from trainer.data.sampler import document_cost
from trainer.data.types import TokenizedRow

log = logging.getLogger(__name__)

META = "meta.json"
ABANDONED_SECONDS = 24 * 3600.0
POLL_SECONDS = 0.2
ROW_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("source", pa.int32()),
        ("row", pa.int64()),
        ("truncated", pa.bool_()),
    ]
)
PACK_SCHEMA = pa.schema([("rows", pa.large_list(pa.int64()))])


def content_key(parts: dict[str, Any]) -> str:
    """Name of the folder for data made of `parts` (json values) by this version of the code."""
    hasher = blake3(json.dumps(parts, sort_keys=True).encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        hasher.update(path.read_bytes())
    return hasher.hexdigest(length=16)


def open_or_build(key: str, build: Callable[[Path], None], check: Callable[[], None] = lambda: None) -> Path:
    """The complete folder of `key`; calls ``build(folder)`` to fill a new one where there is none.

    Whatever `build` raises leaves nothing behind. Processes on one host wait for one builder, and call `check` now and
    then, which may end the waiting; on a file system without locks, or where a lock does not reach other hosts, each
    builds and the first to finish wins.
    """
    root = cache_root()
    final = root / key
    if final.is_dir():
        _remove_abandoned(root)
        return final
    root.mkdir(parents=True, exist_ok=True)
    with _lock(root / f"{key}.lock", check):
        if not final.is_dir():
            _remove_abandoned(root)
            _build(final, build)
    return final


def _build(final: Path, build: Callable[[Path], None]) -> None:
    temporary = final.with_name(f"{final.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        build(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        with contextlib.suppress(OSError):  # another host was first: its folder is as good
            os.rename(temporary, final)
        if not final.is_dir():
            raise OSError(f"cannot rename {temporary} to {final}")
        sync(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path, check: Callable[[], None]) -> Iterator[None]:
    with open(path, "a") as file:
        try:
            if not _try_lock(file):
                log.info("another process prepares this data; waiting for it")
                while not _try_lock(file):
                    check()
                    time.sleep(POLL_SECONDS)
        except OSError:
            log.debug("no locks in %s: the first builder to finish wins", path.parent)
        yield


def _try_lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_abandoned(root: Path) -> None:
    """Removes what builders left that were killed long ago; a younger one may be at work on another host."""
    for path in root.glob("*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


class RowWriter:
    """Writes a split's rows as they come, chunk by chunk; a context manager."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._sink = pa.OSFile(str(folder / "rows.arrow"), "wb")
        self._writer = pa.ipc.new_file(self._sink, ROW_SCHEMA)

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()
        self._sink.close()

    def write(self, rows: Sequence[TokenizedRow], source_index: int) -> None:
        """Adds rows of one source."""
        if not rows:
            return
        lengths = np.array([len(row.ids) for row in rows])
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        columns = [
            pa.ListArray.from_arrays(offsets, _concatenate([row.ids for row in rows])),
            pa.ListArray.from_arrays(offsets, _concatenate([row.labels for row in rows])),
            pa.array([source_index] * len(rows), pa.int32()),
            pa.array([row.row for row in rows], pa.int64()),
            pa.array([row.truncated for row in rows], pa.bool_()),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=ROW_SCHEMA))


def write_packs(folder: Path, packs: Packs) -> None:
    """Writes which rows lie in which pack."""
    column = pa.LargeListArray.from_arrays(pa.array(packs.offsets, pa.int64()), pa.array(packs.rows, pa.int64()))
    with pa.OSFile(str(folder / "packs.arrow"), "wb") as sink, pa.ipc.new_file(sink, PACK_SCHEMA) as writer:
        writer.write_batch(pa.record_batch([column], schema=PACK_SCHEMA))


class ArrowRows(Sequence[TokenizedRow]):
    """A split's rows in the order of their sources, read from the memory-mapped file."""

    def __init__(self, folder: Path, source_names: Sequence[str]) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(folder / "rows.arrow")))
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._batches = [_Batch(batch) for batch in batches]
        self._starts = np.concatenate([[0], np.cumsum([batch.num_rows for batch in batches])]).astype(int).tolist()
        self._source_names = list(source_names)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> TokenizedRow:  # type: ignore[override]
        batch, i = self._find(index)
        ids, labels = batch.document(i)
        return TokenizedRow(self.source(index), int(batch.row[i]), ids, labels, bool(batch.truncated[i].as_py()))

    def document(self, index: int) -> tuple[list[int], list[int]]:
        """Ids and labels of a row."""
        batch, i = self._find(index)
        return batch.document(i)

    def sources(self) -> dict[str, list[int]]:
        """Indices of the rows of each data set."""
        found: dict[str, list[int]] = {}
        for index, (source, _) in enumerate(self.origins()):
            found.setdefault(self._source_names[source], []).append(index)
        return found

    def source(self, index: int) -> str:
        """Which data set a row came from."""
        batch, i = self._find(index)
        return self._source_names[batch.source[i]]

    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 ``[rows]``."""
        return np.concatenate([np.zeros(0, np.int64), *(np.diff(batch.offsets) for batch in self._batches)])

    def origins(self) -> list[tuple[int, int]]:
        """``(source index, row index there)`` of each row."""
        return [pair for b in self._batches for pair in zip(b.source.tolist(), b.row.tolist(), strict=True)]

    def _find(self, index: int) -> tuple[_Batch, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        batch = bisect_right(self._starts, index) - 1
        return self._batches[batch], index - self._starts[batch]


class _Batch:
    """A chunk of rows as numpy views of the mapped file (by dlpack: `to_numpy` imports pandas, half a second)."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        input_ids, labels, source, row, self.truncated = batch.columns
        self.offsets = _view(input_ids.offsets)
        self.input_ids, self.labels = _view(input_ids.values), _view(labels.values)
        self.source, self.row = _view(source), _view(row)

    def document(self, i: int) -> tuple[list[int], list[int]]:
        cut = slice(self.offsets[i], self.offsets[i + 1])
        return self.input_ids[cut].tolist(), self.labels[cut].tolist()


class ArrowPacks:
    """A split ready to train on; the `PackedRows` that the cache gives.

    Attributes:
        rows: the split's rows, in the order of their sources.
    """

    def __init__(self, folder: Path, source_names: Sequence[str]) -> None:
        self.rows = ArrowRows(folder, source_names)
        packs = pa.ipc.open_file(pa.memory_map(str(folder / "packs.arrow"))).get_batch(0).column(0)
        self._offsets, self._indices = _view(packs.offsets), _view(packs.values)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> list[tuple[list[int], list[int]]]:
        if not 0 <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        members = self._indices[self._offsets[index] : self._offsets[index + 1]]
        return [self.rows.document(row) for row in members.tolist()]

    def __iter__(self) -> Iterator[list[tuple[list[int], list[int]]]]:
        return (self[i] for i in range(len(self)))

    def sources(self, index: int) -> list[str]:
        """Which data set each document of a pack came from."""
        members = self._indices[self._offsets[index] : self._offsets[index + 1]]
        return [self.rows.source(row) for row in members.tolist()]

    def lengths(self) -> np.ndarray:
        """Tokens of each pack, int64 ``[packs]``; reads no token."""
        return np.add.reduceat(self.rows.lengths()[self._indices], self._offsets[:-1])

    def costs(self) -> np.ndarray:
        """`document_cost` of each pack, int64 ``[packs]``; reads no token."""
        return np.add.reduceat(document_cost(self.rows.lengths())[self._indices], self._offsets[:-1])


def fingerprint(folders: Sequence[Path]) -> str:
    """blake3 of the splits' tokens, labels and packs, in hex: equal data has it, whichever version made it."""
    hasher = blake3()
    for folder in folders:
        batches, packs = ArrowRows(folder, [])._batches, ArrowPacks(folder, [])
        columns = ([np.diff(b.offsets) for b in batches], [b.input_ids for b in batches], [b.labels for b in batches])
        for array in [*(part for column in columns for part in column), packs._offsets, packs._indices]:
            hasher.update(array.tobytes())
    return hasher.hexdigest(length=16)


def _concatenate(lists: Sequence[list[int]]) -> pa.Array:
    return pa.array(np.concatenate([np.asarray(values, np.int32) for values in lists]))


def _view(array: pa.Array) -> np.ndarray:
    """The numbers where they lie. Arrow's own `to_numpy` would import pandas first, to no end."""
    return np.from_dlpack(array)
