"""Checks before GPU hours are spent."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.checkpoint.layout import RunDir
from trainer.config import RunConfig
from trainer.errors import PacktrainError, UserError
from trainer.launchers import host_name
from trainer.model.decilm import num_copied_weights
from trainer.model.quantized import QuantizedLinear
from trainer.processes import Processes
from trainer.strategies.base import Strategy

# A shared file system shows another host's new file after its attribute cache expires: on NFS up to a minute.
SHARED_WITHIN = 90.0
LONGEST_SHOWN = 40  # characters of a fact that differs; a recipe is no help in a message

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


def result_bytes(model: nn.Module, config: RunConfig) -> int:
    """Size of what the run leaves beside its checkpoints: adapter or model, and the merged model."""
    size_of = getattr(torch, config.model.dtype).itemsize
    model_config: Any = model.config
    copied = num_copied_weights(model_config)
    if config.adapter is None:
        return (sum(p.numel() for p in model.parameters()) + copied) * size_of
    adapter = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return adapter + ((_base_weights(model) + copied) * size_of if config.export.merge else 0)


def _base_weights(module: nn.Module) -> int:
    """Weights of the base under an adapter, quantised ones as many as they stand for."""
    quantized = [layer for layer in module.modules() if isinstance(layer, QuantizedLinear)]
    as_bytes = {parameter for layer in quantized for parameter in (layer.packed, layer.scales)}
    frozen = [p for p in module.parameters() if not p.requires_grad and p not in as_bytes]
    return sum(layer.in_features * layer.out_features for layer in quantized) + sum(p.numel() for p in frozen)


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


def check_same_everywhere(processes: Processes, facts: dict[str, str]) -> None:
    """Refuses processes that read another recipe, other data or other versions: they would train different models.

    Args:
        facts: what has to be equal, by name.

    Raises:
        UserError: on every process, naming the ranks and hosts that differ from rank 0.
    """
    if processes.world_size == 1:
        return
    everybody = processes.gather((host_name(os.environ), facts))
    _, first = everybody[0]
    for name, expected in first.items():
        others = [
            f"rank {rank} on {host}{_shown(own[name])}"
            for rank, (host, own) in enumerate(everybody)
            if own[name] != expected
        ]
        if others:
            have = "has" if len(others) == 1 else "have"
            raise UserError(
                name,
                f"{', '.join(others)} {have} another one than rank 0{_shown(expected)}",
                "the same on every host",
                "start all processes with the same recipe, files and environment",
            )


def _shown(fact: str) -> str:
    return f" ({fact})" if len(fact) <= LONGEST_SHOWN else ""


def check_shared(run: RunDir, processes: Processes) -> None:
    """Refuses a run dir that is not the same folder on every host: checkpoints would lie about in pieces.

    Raises:
        UserError: on every process, naming the hosts.
    """
    if processes.world_size == 1:
        return
    token = processes.from_first(run.path / f".shared-{uuid.uuid4().hex}")
    if processes.is_first:
        run.path.mkdir(parents=True, exist_ok=True)
        token.touch()
    processes.barrier()
    deadline = time.monotonic() + SHARED_WITHIN
    while not (found := token.exists()) and time.monotonic() < deadline:
        time.sleep(0.5)
    blind = sorted({host for host, there in processes.gather((host_name(os.environ), found)) if not there})
    if processes.is_first:
        token.unlink()
    if blind:
        raise UserError(
            "--run-dir",
            f"{run.path} on {', '.join(blind)} is another folder than on rank 0's host",
            "a folder that all hosts share",
            "name one on the cluster's shared file system",
        )


def check_bytes(strategy: Strategy, expected: str | None, when: str) -> None:
    """Proves that the quantised base still is what was loaded; a loss does not notice when it is not.

    Raises:
        PacktrainError: bytes have changed.
    """
    found = strategy.fingerprint()
    if found != expected:
        raise PacktrainError(
            f"the quantised base has changed {when}: fingerprint {found}, loaded was {expected}\n"
            "  fix: this should not happen; do not use the run's results, and report it with the recipe"
        )
