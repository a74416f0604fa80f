"""Where a base's tensors lie, and reading them: each by big reads of several threads, straight to its device.

Files are read, not mapped: page faults are slow, and mapped pages count as this process's memory.
"""

from __future__ import annotations

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from trainer.config import ModelConfig
from trainer.errors import UserError
from trainer.model.folder import resolve_folder
from trainer.model.weights import (
    STALE_SUFFIX,
    build_on_meta,
    load_base_config,
    random_parameter,
    weight_files,
)

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NUM_READERS = 8  # threads of a process that read at a time: one alone does not fill a fast disk's queue
READ_BYTES = 2**24  # one read; on CUDA as much pinned memory for each thread


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the base, not read yet.

    Attributes:
        name: transformers' name of the parameter.
        dtype: as the file says, such as ``BF16``.
        file: holds it from byte `offset` on; None for a random base.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path | None = None
    offset: int = 0


def list_tensors(model: ModelConfig) -> list[StoredTensor]:
    """The base's tensors in the order they lie in its files, which is the order to read them in.

    Raises:
        UserError: a file or tensor is missing, truncated or no safetensors.
    """
    if model.init == "random":
        parameters = build_on_meta(load_base_config(model), torch.float32, "eager").named_parameters()
        return [StoredTensor(name, tuple(parameter.shape), "F32") for name, parameter in parameters]
    files = weight_files(resolve_folder(model))
    return [tensor for file, names in files.items() for tensor in _list_file(file, names)]


def _list_file(file: Path, names: list[str] | None) -> list[StoredTensor]:
    header, start = _read_header(file)
    if missing := sorted(set(names or []) - set(header)):
        raise UserError(str(file), f"tensor {missing[0]} is missing", "what the index says", "download it again")
    tensors = [
        StoredTensor(
            name, tuple(header[name]["shape"]), header[name]["dtype"], file, start + header[name]["data_offsets"][0]
        )
        for name in set(header if names is None else names)
        if not name.endswith(STALE_SUFFIX)
    ]
    return sorted(tensors, key=lambda tensor: tensor.offset)


def open_weights(file: Path) -> Any:
    """A safetensors file's tensors by name.

    Raises:
        UserError: its header is broken, or the file shorter than that says.
    """
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise _truncated(file, str(error)) from error


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """What safetensors' header says of each tensor, and where the first begins; see the format's description:
    https://huggingface.co/docs/safetensors/index#format"""
    with open_weights(file):
        pass
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (OSError, ValueError) as error:
        raise _truncated(file, str(error)) from error
    header.pop("__metadata__", None)
    return header, 8 + length


def _truncated(file: Path, reason: str) -> UserError:
    return UserError(
        str(file), f"truncated or no safetensors file: {reason}", "a whole file", "download or copy it again"
    )


def deal(tensors: list[StoredTensor], num_processes: int) -> list[int]:
    """Who reads each tensor: the process with the least to read until then. By turns the matrices would fall to few."""
    loads, readers = [0] * num_processes, []
    for tensor in tensors:
        readers.append(loads.index(min(loads)))
        loads[readers[-1]] += math.prod(tensor.shape)
    return readers


def start_threads(number: int, device: torch.device) -> ThreadPoolExecutor:
    """Threads whose GPU is `device`; a new thread's is number 0."""
    if device.type != "cuda":
        return ThreadPoolExecutor(number)
    index = torch.cuda.current_device() if device.index is None else device.index
    return ThreadPoolExecutor(number, initializer=torch.cuda.set_device, initargs=(index,))


class TensorReader:
    """Reads tensors of a base, or makes those of a random one; a context manager.

    Args:
        seed: of ``init: random``; `RunConfig.train.seed`. The same numbers on any device.
        device: where tensors come to lie. Those on the CPU are nobody else's memory.
    """

    def __init__(self, model: ModelConfig, seed: int, device: torch.device) -> None:
        self.model, self.seed, self.device = model, seed, device
        self._config = load_base_config(model) if model.init == "random" else None
        self._threads = start_threads(NUM_READERS, device)
        self._pinned: SimpleQueue[torch.Tensor] = SimpleQueue()
        if device.type == "cuda" and model.init != "random":
            for _ in range(NUM_READERS):
                self._pinned.put(torch.empty(READ_BYTES, dtype=torch.uint8, pin_memory=True))

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        """The whole tensor, as it is stored; a random one in ``model.dtype``.

        Raises:
            UserError: the file ends too early, or is no longer there.
        """
        if self._config is not None:
            dtype = getattr(torch, self.model.dtype)
            shape = torch.Size(tensor.shape)
            return random_parameter(self._config, tensor.name, shape, self.seed, dtype, self.device)
        whole = torch.empty(tensor.shape, dtype=FLOATS[tensor.dtype], device=self.device)
        chunks = whole.view(-1).view(torch.uint8).split(READ_BYTES)
        reads = [
            self._threads.submit(self._read_chunk, tensor, index * READ_BYTES, chunk)
            for index, chunk in enumerate(chunks)
        ]
        for read in reads:
            read.result()
        return whole

    def _read_chunk(self, tensor: StoredTensor, start: int, target: torch.Tensor) -> None:
        if not target.is_cuda:
            _read_into(tensor, start, target)
            return
        pinned = self._pinned.get()
        try:
            _read_into(tensor, start, pinned[: len(target)])
            target.copy_(pinned[: len(target)])
        finally:
            self._pinned.put(pinned)

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(cancel_futures=True)


def _read_into(tensor: StoredTensor, start: int, target: torch.Tensor) -> None:
    """Fills the uint8 CPU tensor `target` from byte `start` of `tensor` on."""
    assert tensor.file is not None
    buffer: Any = target.numpy()
    left, position = memoryview(buffer), tensor.offset + start
    try:
        with tensor.file.open("rb", buffering=0) as stream:
            os.posix_fadvise(stream.fileno(), position, len(left), os.POSIX_FADV_WILLNEED)
            stream.seek(position)
            while left:
                count = stream.readinto(left)
                if not count:
                    raise _truncated(tensor.file, f"it ends within tensor {tensor.name}")
                left = left[count:]
    except OSError as error:
        raise _truncated(tensor.file, str(error)) from error
