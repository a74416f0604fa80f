"""Where rows come from: local files, and data sets of the hub or of a folder through `datasets`.

A local file never touches the network.
"""

from __future__ import annotations

import csv
import glob
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from trainer.checkpoint.layout import hash_file
from trainer.config import Source
from trainer.data.rows import ChainedRows, JsonLines, ListRows, Rows, TableRows, checked_row
from trainer.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

# Of `datasets.Dataset.save_to_disk` and `DatasetDict.save_to_disk`.
SAVED_DATASET, SAVED_SPLITS = "state.json", "dataset_dict.json"


def open_source(source: Source, where: str) -> Rows:
    """Opens a file by its ending, the files of a pattern by theirs, or a folder or hub id through `datasets`.

    Args:
        where: the source's place in the recipe, for messages.

    Raises:
        UserError: the file or data set is missing, unreadable or empty, or the recipe says something of it that only
            data sets of the hub have.
    """
    try:
        path = Path(source.path).expanduser()
    except RuntimeError as error:  # ~nobody
        raise UserError(f"{where}.path", f"{source.path}: {error}", fix="correct the path") from error
    if path.is_file():
        _refuse_hub_fields(source, where, ("name", "revision", "split"))
        rows = _open_file(path, where)
    elif path.is_dir():
        _refuse_hub_fields(source, where, ("name", "revision"))
        _refuse_mixed_folder(path, where)
        rows = _open_dataset(source, where)
    elif glob.has_magic(source.path):
        _refuse_hub_fields(source, where, ("name", "revision", "split"))
        rows = _open_pattern(str(path), where)
    elif not looks_local(source.path):
        rows = _open_dataset(source, where)
    else:
        raise UserError(f"{where}.path", f"there is no file {source.path}", fix="correct the path")
    if len(rows) == 0:
        raise UserError(f"{where}.path", f"{source.path} has no rows", fix="give a data set with rows")
    return rows


def _refuse_hub_fields(source: Source, where: str, fields: tuple[str, ...]) -> None:
    for field in fields:
        if getattr(source, field) != Source.model_fields[field].default:
            raise UserError(
                f"{where}.{field}",
                f"{getattr(source, field)!r}, but {source.path} is local and has no {field}",
                fix="leave it out, or name the data set on the hub",
            )


def looks_local(path: str) -> bool:
    """Hub ids are ``name`` or ``owner/name``."""
    return path.startswith(("/", ".", "~")) or path.count("/") > 1 or Path(path).suffix in READERS


def _open_pattern(pattern: str, where: str) -> Rows:
    """Files in the order of their names, which no file system promises."""
    found = sorted(Path(match) for match in glob.glob(pattern, recursive=True))
    files = [path for path in found if not path.is_dir()]
    if not files:
        fix = "correct the pattern; in a name, [ is written [[]"
        raise UserError(f"{where}.path", f"no file matches {pattern}", fix=fix)
    parts = [_open_file(path, where) for path in files]
    for path, part in zip(files, parts, strict=True):
        if not len(part):
            raise UserError(f"{where}.path", f"{path} has no rows", fix="remove it, or put its rows back")
    return ChainedRows(parts)


def _refuse_mixed_folder(folder: Path, where: str) -> None:
    """`datasets` reads files of one kind in a folder, and says nothing of the others."""
    kinds = sorted({path.suffix for path in folder.rglob("*") if path.suffix in READERS})
    if len(kinds) > 1 and not _is_saved(folder):
        raise UserError(
            f"{where}.path",
            f"{folder} holds files of several kinds: {', '.join(kinds)}",
            "files of one kind",
            f"name them by a pattern, such as {folder}/*{kinds[0]}, each kind in an entry of its own",
        )


def _is_saved(folder: Path) -> bool:
    return (folder / SAVED_DATASET).exists() or (folder / SAVED_SPLITS).exists()


def _open_file(path: Path, where: str) -> Rows:
    if path.suffix not in READERS:
        allowed = ", ".join(READERS)
        raise UserError(f"{where}.path", f"{path} has no ending that tells its format", allowed, "rename or convert it")
    try:
        return READERS[path.suffix](path, where)
    except (OSError, UnicodeDecodeError) as error:
        fix = "correct the file" if path.suffix in BINARY else "give a readable UTF-8 file"
        raise UserError(f"{where}.path", f"cannot read {path}: {error}", fix=fix) from error


def _read_json(path: Path, where: str) -> Rows:
    try:
        rows = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line under the name of .json, as much of the hub's
            return JsonLines(path, where)
        raise UserError(where, f"{path} is not JSON: {error}", fix="correct the file") from error
    except RecursionError as error:
        raise UserError(where, f"{path} nests too deep", "a list of objects", "correct the file") from error
    except ValueError as error:  # a number of thousands of digits
        raise UserError(where, f"{path}: {error}", fix="correct the file") from error
    if not isinstance(rows, list):
        raise UserError(where, f"{path} holds one {type(rows).__name__}", "a list of objects", "make it a list of rows")
    return ListRows([checked_row(row, where, f"{path}, row {i}") for i, row in enumerate(rows)], hash_file(path))


def _read_csv(path: Path, where: str) -> Rows:
    csv.field_size_limit(1 << 30)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            names = list(reader.fieldnames or [])
            rows = list(reader)
    except csv.Error as error:
        raise UserError(where, f"{path} is not CSV: {error}", fix="correct the file") from error
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(where, f"{path} has two columns {twice[0]!r}", fix="rename one of them")
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


def _read_arrow(path: Path, where: str) -> Rows:
    """Arrow's stream, which `datasets` writes, or its file format (Feather)."""
    import pyarrow as pa

    mapped = pa.memory_map(str(path))
    try:
        table = pa.ipc.open_stream(mapped).read_all()
        if not _ends_as_stream(path):
            raise UserError(where, f"{path} breaks off: its end mark is missing", fix="copy it again")
    except pa.ArrowInvalid:
        mapped.seek(0)
        try:
            table = pa.ipc.open_file(mapped).read_all()
        except pa.ArrowInvalid as error:
            raise UserError(where, f"{path} is not Arrow: {error}", fix="correct the file") from error
    return TableRows(table, hash_file(path))


def _ends_as_stream(path: Path) -> bool:
    """A stream that was cut between two batches reads as a whole one."""
    with open(path, "rb") as file:
        file.seek(-len(END_OF_STREAM), os.SEEK_END)
        return file.read().endswith(END_OF_STREAM)


END_OF_STREAM = b"\0\0\0\0"  # a message of no length; before it, since Arrow 0.15, a mark of four bytes
BINARY = (".parquet", ".arrow")
READERS = {
    ".jsonl": JsonLines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


def _open_dataset(source: Source, where: str) -> Rows:
    """A hub id, or a local folder that `datasets` has written or can read."""
    import datasets

    try:
        dataset = _load_dataset(source)
    except ValueError as error:  # also the errors of `datasets` for unknown splits and configurations
        raise UserError(where, f"{source.path}, split {source.split}: {error}", fix="correct path or split") from error
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{where}.path",
            f"cannot load {source.path}: {error.__cause__ or error}",
            "a local file, or the id of a data set on the hub",
            "correct the path; without a network download the data set first (HF_HUB_OFFLINE reads the local copy)",
        ) from error
    table = dataset.with_format("arrow")[:]
    return TableRows(table, _hash_table(table))


def _load_dataset(source: Source) -> Any:
    import datasets

    folder = Path(source.path).expanduser()
    if not _is_saved(folder):
        return datasets.load_dataset(
            str(folder) if folder.is_dir() else source.path, source.name, split=source.split, revision=source.revision
        )
    saved = datasets.load_from_disk(str(folder))
    splits = saved if isinstance(saved, dict) else {Source.model_fields["split"].default: saved}
    if source.split not in splits:
        raise ValueError(f"it has the splits {', '.join(splits)}")
    return splits[source.split]


def _hash_table(table: pa.Table) -> str:
    """Hash of schema and values: not of paths or times, which differ between hosts."""
    hasher = blake3(str(table.schema.remove_metadata()).encode(), max_threads=blake3.AUTO)
    for batch in table.to_batches():
        # Written out, as a slice's own buffers are the whole table's: two slices of a split would have one hash.
        hasher.update(memoryview(batch.serialize()))
    return hasher.hexdigest()
