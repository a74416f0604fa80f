"""Checks before GPU hours are spent."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import nn

from trainer.config import RunConfig
from trainer.errors import UserError

# Bytes of optimizer state for each trained weight; float32 moments where a recipe keeps weights in float32.
EIGHT_BIT_MOMENTS = 2.1


def checkpoint_bytes(module: nn.Module, config: RunConfig) -> int:
    """Size of one checkpoint: trained weights, moments and, for adapters, the PEFT copy beside them."""
    trained = [p for p in module.parameters() if p.requires_grad]
    weights = sum(p.numel() * p.element_size() for p in trained)
    if config.optim.name == "adamw":
        moments = 2 * weights
    else:
        per_weight = 8 if config.optim.name.endswith("32bit") else EIGHT_BIT_MOMENTS
        moments = int(sum(p.numel() for p in trained) * per_weight)
    return weights + moments + (weights if config.adapter else 0)


def result_bytes(module: nn.Module, config: RunConfig) -> int:
    """Size of what the run leaves beside its checkpoints: adapter or model, and the merged model."""
    size_of = getattr(torch, config.model.dtype).itemsize
    if config.adapter is None:
        return sum(p.numel() for p in module.parameters()) * size_of
    adapter = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    return adapter + (_base_weights(module) * size_of if config.export.merge else 0)


def _base_weights(module: nn.Module) -> int:
    """Weights of the base under an adapter; a byte of a 4-bit layer holds two."""
    frozen = {name: p.numel() for name, p in module.named_parameters() if not p.requires_grad}
    per_element = {"packed": 2, "scales": 0}
    return sum(count * per_element.get(name.rpartition(".")[2], 1) for name, count in frozen.items())


def check_disk_space(folder: Path, needed: int) -> None:
    """Refuses a run whose checkpoints and result cannot fit, instead of losing it at its last step.

    Args:
        folder: the run dir, there or not yet.
        needed: bytes the run will write, less what it has written already.

    Raises:
        UserError: the file system has less room.
    """
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            str(folder),
            f"checkpoints and result will take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free",
            fix="free space, choose another --run-dir, lower checkpoint.keep, or take optim.name: adamw_8bit",
        )
