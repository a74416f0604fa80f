"""A base's tensors, read once and by several threads: every byte is hashed on its way, as training hashed it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from threading import Lock

import torch

from trainer.errors import UserError
from trainer.export.base import BaseTensors
from trainer.export.pipeline import Buffer
from trainer.export.shards import bytes_of
from trainer.model.weights import FileHash

STORED = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
BYTES_AT_A_TIME = 2**24  # of what is read only to be hashed


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
        self._files: dict[str, _File] = {}
        self._lock, self._taken = Lock(), 0

    def begin_again(self) -> None:
        """Goes back to the first file."""
        self._hash, self.hashes = FileHash(), {}

    def skip(self, file: str) -> None:
        """Only hashes a file."""
        self._check()
        if self.base.folder is not None:
            self._hash.add(self.base.folder / file)
        self.hashes[file] = self._hash.text()

    def read(self, name: str, buffer: Buffer) -> torch.Tensor:
        """A tensor as it is stored, on the CPU; in `buffer` where the base has files. By any thread, in any order."""
        if self.base.folder is None:
            return self.base.read(name, torch.device("cpu"))
        return self._file(self.base.file_of[name]).read(name, buffer)

    def hash(self, file: str, name: str, tensor: torch.Tensor) -> None:
        """Takes in the file up to and with a tensor just read, file after file.

        Args:
            file: the one whose turn it is; the tensor may lie in another, or before what has been taken in.
        """
        if self.base.folder is None or self.base.file_of[name] != file:
            return
        start, end = self._begun(file).place(name)
        if start > self._taken:
            self._read_up_to(file, start)
        if start == self._taken:
            self._hash.update(bytes_of(tensor))
            self._taken = end

    def end(self, file: str) -> None:
        """Called after the last tensor of `file`: takes in what else is in it."""
        if self.base.folder is not None:
            self._read_up_to(file, self._begun(file).size)
            self._taken = 0
        self.hashes[file] = self._hash.text()

    def content_hash(self) -> str:
        """`BaseTensors.content_hash`, when all files have been read or skipped."""
        return self.base.content_hash(self._check) if self.base.folder is None else self._hash.text()

    def close(self) -> None:
        """Lets go of the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _begun(self, file: str) -> _File:
        """The file, its name taken in before its first byte."""
        found = self._file(file)
        if self._taken == 0:
            self._hash.begin(found.path)
            self._read_up_to(file, found.data_start)
        return found

    def _file(self, name: str) -> _File:
        assert self.base.folder is not None
        with self._lock:
            if name not in self._files:
                self._files[name] = _File(self.base.folder / name)
            return self._files[name]

    def _read_up_to(self, file: str, end: int) -> None:
        while self._taken < end:
            data = bytearray(min(BYTES_AT_A_TIME, end - self._taken))
            self._file(file).fill(self._taken, memoryview(data))
            self._hash.update(data)
            self._taken += len(data)


class _File:
    """A safetensors file, read at any place by any thread."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, path.stat().st_size
        self._file = os.open(path, os.O_RDONLY)
        length = bytearray(8)
        self.fill(0, memoryview(length))
        self.data_start = 8 + int.from_bytes(length, "little")
        text = bytearray(self.data_start - 8)
        self.fill(8, memoryview(text))
        self._header = json.loads(text)

    def place(self, name: str) -> tuple[int, int]:
        """Where a tensor begins and ends in the file."""
        start, end = self._header[name]["data_offsets"]
        return self.data_start + start, self.data_start + end

    def read(self, name: str, buffer: Buffer) -> torch.Tensor:
        entry = self._header[name]
        if entry["dtype"] not in STORED:
            raise UserError(str(self.path), f"{name} is stored as {entry['dtype']}", ", ".join(STORED))
        start, end = self.place(name)
        data = buffer.room(end - start)
        self.fill(start, memoryview(bytes_of(data)))
        return data.view(STORED[entry["dtype"]]).view(entry["shape"])

    def fill(self, start: int, data: memoryview) -> None:
        """Reads as many bytes as `data` holds."""
        place = 0
        while place < len(data):
            count = os.preadv(self._file, [data[place:]], start + place)
            if count == 0:
                raise UserError(str(self.path), "ends before its last tensor does", fix="download the model again")
            place += count

    def close(self) -> None:
        os.close(self._file)
