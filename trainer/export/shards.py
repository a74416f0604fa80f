"""Safetensors files in the very bytes that the library would write, filled by several threads and hashed on the way."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any, Self

import torch
from blake3 import blake3

from trainer.checkpoint.layout import named
from trainer.model.weights import INDEX, SINGLE

SHARD_BYTES = 4 * 2**30
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # in the order the library writes them


@dataclass(frozen=True)
class Spec:
    """What a tensor to write will be."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class ShardFile:
    """One file to fill: tensors are put in any order, by any thread, and hashed in the order in which they lie.

    Format: https://huggingface.co/docs/safetensors. Every tensor's place is known before the first one is.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec]) -> None:
        starts, end = {}, 0
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name in in_order(specs):
            start, end = end, end + specs[name].nbytes
            starts[name] = start
            dtype, shape = DTYPES[specs[name].dtype], list(specs[name].shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        text = len(text).to_bytes(8, "little") + text
        self._starts = {name: len(text) + start for name, start in starts.items()}
        self._path, self._lock = path, Lock()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._hash, self._hashed = blake3(max_threads=blake3.AUTO), 0
        self._write(0, memoryview(text))
        self._take(text)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Writes a tensor of the given shape and dtype, on the CPU, in its place."""
        self._write(self._starts[name], memoryview(bytes_of(tensor)))

    def hash(self, name: str, tensor: torch.Tensor) -> None:
        """Takes in the tensor that comes next."""
        assert self._starts[name] == self._hashed
        self._take(bytes_of(tensor))

    def close(self) -> dict[str, Any]:
        """Makes the bytes survive a power cut.

        Returns:
            The manifest's entry of the file: size and blake3.
        """
        with named(self._path):  # some file systems say only now that they have no room
            os.fsync(self._file)
            self.abandon()
        return {"bytes": self._hashed, "blake3": self._hash.hexdigest()}

    def abandon(self) -> None:
        """Closes the file as it is."""
        os.close(self._file)

    def _write(self, start: int, data: memoryview) -> None:
        end, place = start + len(data), start
        with named(self._path), self._lock:  # the kernel lets one write at a time into a file, and has the others spin
            while place < end:
                place += os.pwrite(self._file, data[place - start :], place)
        if hasattr(os, "posix_fadvise"):  # what is not yet on its way to the disk goes now, not all at the end
            os.posix_fadvise(self._file, start, len(data), os.POSIX_FADV_DONTNEED)

    def _take(self, data: Any) -> None:
        self._hash.update(data)
        self._hashed += len(data)


@dataclass(frozen=True)
class Piece:
    """A tensor and the file it goes to; `is_last` of that file."""

    file: str
    name: str
    is_last: bool


class ShardWriter:
    """Fills the files of a folder; a context, which ends when all whole ones are on the disk.

    Args:
        shards: file name -> its tensors.
        on_whole: told a file's name and its manifest's entry as soon as it is on the disk; in the order of `shards`, by
            a thread of its own.
    """

    def __init__(
        self,
        folder: Path,
        shards: Mapping[str, Mapping[str, Spec]],
        on_whole: Callable[[str, dict[str, Any]], None] = lambda file, entry: None,
    ) -> None:
        self.folder, self.shards, self.on_whole = folder, shards, on_whole
        self._open: dict[str, ShardFile] = {}
        self._lock, self._closer, self._closing = Lock(), ThreadPoolExecutor(1, "close"), list[Future[None]]()

    def pieces(self) -> Iterator[Piece]:
        """What is to be put and finished, in order."""
        for file, specs in self.shards.items():
            names = in_order(specs)
            yield from (Piece(file, name, name == names[-1]) for name in names)

    def put(self, piece: Piece, tensor: torch.Tensor) -> None:
        """Writes a piece in its place; by any thread, in any order."""
        with self._lock:
            if piece.file not in self._open:
                self._open[piece.file] = ShardFile(self.folder / piece.file, self.shards[piece.file])
        self._open[piece.file].put(piece.name, tensor)

    def finish(self, piece: Piece, tensor: torch.Tensor) -> None:
        """Hashes the next of `pieces`, which has been put; behind the last one its file goes to the disk."""
        self._open[piece.file].hash(piece.name, tensor)
        if piece.is_last:
            self._closing.append(self._closer.submit(self._close, piece.file))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closer.shutdown()
        for file in self._open.values():
            file.abandon()
        for closing in self._closing:
            closing.result()

    def _close(self, file: str) -> None:
        with self._lock:
            shard = self._open.pop(file)
        self.on_whole(file, shard.close())


def in_order(specs: Mapping[str, Spec]) -> list[str]:
    """The names as the library lays their tensors out."""
    ranks = {dtype: rank for rank, dtype in enumerate(DTYPES)}
    return sorted(specs, key=lambda name: (ranks[specs[name].dtype], name))


def bytes_of(tensor: torch.Tensor) -> Any:
    """A tensor on the CPU as a numpy array of its bytes; not a copy where it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()


def write_index(folder: Path, shards: Mapping[str, Mapping[str, Spec]]) -> None:
    """Writes which file holds which tensor, where there is more than one file."""
    if len(shards) == 1:
        return
    weight_map = {name: file for file, specs in shards.items() for name in specs}
    total = sum(spec.nbytes for specs in shards.values() for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def cut_into_shards(tensors: Mapping[str, Any], dtype: torch.dtype) -> dict[str, list[str]]:
    """File name -> tensor names, some 4 GiB a file, in the given order and under transformers' file names.

    Args:
        tensors: tensors or their shapes; what counts is their ``numel()``.
    """
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, tensor in tensors.items():
        size = tensor.numel() * dtype.itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}
