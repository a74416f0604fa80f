"""Safetensors files written tensor by tensor and hashed on the way, in the very bytes that the library would write."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from trainer.checkpoint.layout import hash_file
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
    """One file to fill, fastest in the order in which its tensors lie.

    Format: https://huggingface.co/docs/safetensors. Every tensor's place is known before the first one is.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec]) -> None:
        self.path = path
        self._starts, end = {}, 0
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name in in_order(specs):
            start, end = end, end + specs[name].nbytes
            self._starts[name] = start
            dtype, shape = DTYPES[specs[name].dtype], list(specs[name].shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._file = open(path, "wb")  # noqa: SIM115
        self._hash, self._hashed = blake3(max_threads=blake3.AUTO), 0
        self._append(len(text).to_bytes(8, "little") + text)
        self._starts = {name: self._hashed + start for name, start in self._starts.items()}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Puts a tensor of the given shape and dtype, on the CPU, in its place."""
        start, data = self._starts[name], bytes_of(tensor)
        if start == self._hashed:
            self._append(data)
            return
        self._file.seek(start)
        self._file.write(data)

    def close(self) -> dict[str, Any]:
        """Makes the bytes survive a power cut.

        Returns:
            The manifest's entry of the file: size and blake3.
        """
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.seek(0, os.SEEK_END)
        self._file.close()
        # Whatever came out of its turn is not in the running hash, nor what came after it.
        return {"bytes": size, "blake3": self._hash.hexdigest() if size == self._hashed else hash_file(self.path)}

    def _append(self, data: Any) -> None:
        self._hash.update(data)
        self._file.seek(self._hashed)
        self._file.write(data)
        self._hashed += len(data)


@dataclass(frozen=True)
class Piece:
    """A tensor and the file it goes to; `is_last` of that file."""

    file: str
    name: str
    is_last: bool


class ShardWriter:
    """Fills the files of a folder one after the other.

    Args:
        shards: file name -> its tensors.
        on_whole: told a file's name and its manifest's entry as soon as it is on the disk.
    """

    def __init__(
        self,
        folder: Path,
        shards: Mapping[str, Mapping[str, Spec]],
        on_whole: Callable[[str, dict[str, Any]], None] = lambda file, entry: None,
    ) -> None:
        self.folder, self.shards, self.on_whole = folder, shards, on_whole
        self._open: ShardFile | None = None

    def pieces(self) -> Iterator[Piece]:
        """What `write` is to be given, in the order it takes it."""
        for file, specs in self.shards.items():
            names = in_order(specs)
            yield from (Piece(file, name, name == names[-1]) for name in names)

    def write(self, piece: Piece, tensor: torch.Tensor) -> None:
        """Puts the next piece in its place; with the last one its file is whole."""
        if self._open is None:
            self._open = ShardFile(self.folder / piece.file, self.shards[piece.file])
        self._open.write(piece.name, tensor)
        if piece.is_last:
            entry = self._open.close()
            self._open = None
            self.on_whole(piece.file, entry)


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
