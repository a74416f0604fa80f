"""Tensors to files by torch's distributed checkpoint: by all processes together, with failures told by their cause."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from blake3 import blake3
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter
from torch.distributed.tensor import DTensor

from trainer.errors import PacktrainError

# One process is what is meant where there is no group, and torch says so at every save and load.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
Tensors = dict[str, torch.Tensor]


def write_tensors(tensors: Tensors, folder: Path, group: dist.ProcessGroup | None) -> None:
    """Writes each process's part into `folder`; what all processes have alike is written once, spread over them.

    Args:
        group: gloo group of all processes; None when alone.

    Raises:
        PacktrainError: a process could not write; on all of them, naming it and the cause.
    """
    try:
        dcp.save(
            tensors,
            storage_writer=_Writer(folder, per_thread_copy_ahead=0),
            process_group=group,
            no_dist=not dist.is_initialized(),
        )
    except CheckpointException as error:
        raise PacktrainError(explain(error)) from error


def explain(error: CheckpointException) -> str:
    """Which ranks failed and why, in a line: torch's own text is a traceback."""
    ranks: dict[str, list[str]] = {}
    for rank, (cause, _) in sorted(error.failures.items()):
        ranks.setdefault(str(cause) or repr(cause), []).append(str(rank))
    return "; ".join(f"rank {', '.join(failed)}: {cause}" for cause, failed in ranks.items())


def digests(tensors: Tensors) -> dict[str, str]:
    """blake3 of every tensor that other processes should have alike, by what names it on all of them."""
    held = {_shared_name(name, tensor): tensor for name, tensor in tensors.items()}
    return {name: _digest(tensor) for name, tensor in held.items() if name is not None}


def find_difference(everybody: list[dict[str, str]]) -> str | None:
    """What two processes should have alike and have not; only one of them would be written, without a word.

    Args:
        everybody: the `digests` of every rank.
    """
    holders: dict[str, tuple[int, str]] = {}
    for rank, own in enumerate(everybody):
        for name, digest in own.items():
            holder, expected = holders.setdefault(name, (rank, digest))
            if digest != expected:
                return f"rank {rank} has another {name} than rank {holder}: they no longer train the same model"
    return None


def _shared_name(name: str, tensor: torch.Tensor) -> str | None:
    if not isinstance(tensor, DTensor):
        return name
    coordinate = list(tensor.device_mesh.get_coordinate() or ())
    part = [index for index, placement in zip(coordinate, tensor.placements, strict=True) if placement.is_shard()]
    return f"{name} (part {part})" if len(part) < len(coordinate) else None


def _digest(tensor: torch.Tensor) -> str:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    data: Any = local.contiguous().view(-1).view(torch.uint8).numpy()
    return blake3(data).hexdigest(length=16) + f" {list(local.shape)} {local.dtype}"


class _Writer(FileSystemWriter):
    """Tells a full disk by its name: torch's serialiser only says that it is not where it should be in the file.

    Tensors lie in host memory. Copying ahead is for those of a GPU, and would wait for the training queued there.
    """

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().write_data(*args, **kwargs)
        except RuntimeError as error:
            raise _system_error(error) or error from error


def _system_error(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
