"""One committed checkpoint, read with or without a process group, on any number of processes, without a GPU."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from trainer.checkpoint.layout import read_manifest
from trainer.checkpoint.writing import explain
from trainer.errors import PacktrainError

TENSORS = "dcp"  # the folder of a checkpoint that torch's distributed checkpoint fills


class SavedCheckpoint:
    """The checkpoint in `folder` (``step_N``), or one that is about to be committed.

    Args:
        record: what the manifest of the latter is going to say beside the files.
    """

    def __init__(self, folder: Path, record: dict[str, Any] | None = None) -> None:
        self.folder = folder
        if record is not None:
            self.manifest = record

    @property
    def names(self) -> Collection[str]:
        """Keys of the saved tensors."""
        return self._tensors.keys()

    def shape(self, name: str) -> torch.Size:
        """Of a saved tensor, whole."""
        return self._tensors[name].size

    def dtype(self, name: str) -> torch.dtype:
        """Of a saved tensor."""
        return self._tensors[name].properties.dtype

    def read(self, name: str) -> torch.Tensor:
        """One tensor, whole, on the CPU; nothing else of the checkpoint is in memory, and no other process is asked.

        Raises:
            PacktrainError: there is no such tensor, or its file cannot be read.
        """
        return self.read_many([name])[name]

    def read_many(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Several tensors as `read` gives one."""
        tensors = {}
        for name in names:
            if name not in self.names:
                raise PacktrainError(f"{self.folder}: holds no tensor {name}")
            tensors[name] = torch.empty(self.shape(name), dtype=self.dtype(name))
        self._load(tensors, alone=True)
        return tensors

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Fills the tensors and DTensors of `state` in place; all processes of a group together, each its own part.

        Raises:
            PacktrainError: the checkpoint is of another model.
        """
        self._load(state, alone=not dist.is_initialized())

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Its manifest: step, progress, identity, files."""
        return read_manifest(self.folder)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest["step"]

    @property
    def progress(self) -> dict[str, Any]:
        """What a resumed run starts from, beside tensors."""
        return self.manifest["progress"]

    @cached_property
    def _tensors(self) -> dict[str, TensorStorageMetadata]:
        try:
            found = self._reader.read_metadata().state_dict_metadata
        except (OSError, EOFError, ValueError, UnpicklingError) as error:
            raise PacktrainError(f"{self.folder / TENSORS}: no readable checkpoint: {error}") from error
        return {name: stored for name, stored in found.items() if isinstance(stored, TensorStorageMetadata)}

    @cached_property
    def _reader(self) -> _Reader:
        return _Reader(self.folder / TENSORS)

    def _load(self, state: dict[str, torch.Tensor], alone: bool) -> None:
        try:
            dcp.load(state, storage_reader=self._reader, no_dist=alone)
        except CheckpointException as error:
            told = f"{self.folder}: the checkpoint cannot be read into this model: {explain(error)}"
            raise PacktrainError(told) from error


class _Reader(FileSystemReader):
    """Reads once where each tensor lies: of a large model that takes seconds, and tensors are read one by one."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = super().read_metadata(*args, **kwargs)
        return self._metadata
