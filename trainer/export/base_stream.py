"""A base's tensors in the order of its files, read once: every byte is hashed on its way, as training hashed it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer.errors import UserError
from trainer.export.base import BaseTensors
from trainer.export.pipeline import Buffer
from trainer.model.weights import FileHash

STORED = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
BYTES_AT_A_TIME = 2**24  # of what is read only to be hashed
Take = Callable[[Any], None]


class BaseStream:
    """Reads into buffers and maps no file: the caller may change what it gets, and memory used is what it looks like.

    Args:
        check: called before each file that is skipped; what it raises ends that.

    Attributes:
        hashes: file name -> hash of the base up to its end, for each file done with.
    """

    def __init__(self, base: BaseTensors, check: Callable[[], None] = lambda: None) -> None:
        self.base, self._check = base, check
        self.hashes: dict[str, str] = {}
        self._hash = FileHash()
        self._file: _File | None = None

    def begin_again(self) -> None:
        """Goes back to the first file."""
        self._hash, self.hashes = FileHash(), {}

    def skip(self, file: str) -> None:
        """Only hashes a file."""
        self._check()
        if self.base.folder is not None:
            self._hash.add(self.base.folder / file)
        self.hashes[file] = self._hash.text()

    def read(self, file: str, name: str, buffer: Buffer) -> torch.Tensor:
        """A tensor as it is stored, on the CPU; in `buffer` where the base has files.

        Args:
            file: the one whose turn it is; the tensor may lie in another.
        """
        folder = self.base.folder
        if folder is None:
            return self.base.read(name, torch.device("cpu"))
        if self._file is None:
            self._hash.begin(folder / file)
            self._file = _File(folder / file, self._hash.update)
        owner = self.base.file_of[name]
        return (self._file if owner == file else _File(folder / owner, lambda data: None)).read(name, buffer)

    def end(self, file: str) -> None:
        """Called after the last tensor of `file`: takes in what else is in it."""
        if self._file is not None:
            self._file.take_rest()
            self._file = None
        self.hashes[file] = self._hash.text()

    def content_hash(self) -> str:
        """`BaseTensors.content_hash`, when all files have been read or skipped."""
        return self.base.content_hash(self._check) if self.base.folder is None else self._hash.text()


class _File:
    """A safetensors file whose bytes are given to `take` in their order, each once."""

    def __init__(self, path: Path, take: Take) -> None:
        self._path, self._take, self._taken = path, take, 0
        self._file = open(path, "rb")  # noqa: SIM115
        self._size = path.stat().st_size
        length = self._file.read(8)
        text = self._file.read(int.from_bytes(length, "little"))
        self._data_start = 8 + len(text)
        self._header = json.loads(text)
        self._take_up_to(self._data_start)

    def read(self, name: str, buffer: Buffer) -> torch.Tensor:
        entry = self._header[name]
        if entry["dtype"] not in STORED:
            raise UserError(str(self._path), f"{name} is stored as {entry['dtype']}", ", ".join(STORED))
        start, end = (self._data_start + offset for offset in entry["data_offsets"])
        if start > self._taken:
            self._take_up_to(start)
        data = buffer.room(end - start)
        self._fill(start, data.numpy())
        if start == self._taken:
            self._take(data.numpy())
            self._taken = end
        return data.view(STORED[entry["dtype"]]).view(entry["shape"])

    def take_rest(self) -> None:
        self._take_up_to(self._size)
        self._file.close()

    def _take_up_to(self, end: int) -> None:
        while self._taken < end:
            data = bytearray(min(BYTES_AT_A_TIME, end - self._taken))
            self._fill(self._taken, data)
            self._take(data)
            self._taken += len(data)

    def _fill(self, start: int, data: Any) -> None:
        self._file.seek(start)
        if self._file.readinto(data) != len(data):
            raise UserError(str(self._path), "ends before its last tensor does", fix="download the model again")
