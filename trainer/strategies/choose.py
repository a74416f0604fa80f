"""From the recipe and the processes at hand to a strategy."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.processes import Processes
from trainer.strategies.base import Fingerprint, Strategy

logger = logging.getLogger(__name__)
Kind = Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"]
# Share of a GPU that weights, gradients and moments may take before they are cut, for activations need the rest; and of
# the host that its processes' copies of what is saved may take: each copies all that is not cut.
STATE_SHARE = 0.5
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def build_strategy(config: RunConfig, model: nn.Module, processes: Processes, fingerprint: Fingerprint) -> Strategy:
    """The recipe's strategy; `auto` takes the one that communicates least and leaves room for activations.

    Args:
        model: on the meta device, dtypes and `requires_grad` final.
        fingerprint: of a module's quantised bytes, None where there are none.

    Raises:
        UserError: the strategy does not go with this number of processes.
    """
    kind = config.strategy.kind if config.strategy.kind != "auto" else choose_kind(config, model, processes)
    compute_dtype = getattr(torch, config.compute_dtype)
    scaling, offload = config.compute_dtype == "float16", config.strategy.offload == "optimizer"
    if kind == "single":
        if processes.world_size > 1:
            raise UserError(
                "strategy.kind",
                f"single, and {processes.world_size} processes were started",
                "auto, ddp, fsdp2, zero1, zero2 or zero3 for several processes",
                "set strategy.kind: auto, or start one process (--gpus 1)",
            )
        from trainer.strategies.single import SingleProcess

        return SingleProcess(processes, scaling, offload, fingerprint)
    if kind == "ddp":
        from trainer.strategies.ddp import DataParallel

        return DataParallel(processes, scaling, offload, fingerprint)
    if kind == "fsdp2":
        from trainer.strategies.fsdp2 import FullyShard

        return FullyShard(processes, config.strategy, compute_dtype, scaling, fingerprint)
    from trainer.strategies.zero import Zero

    return Zero(processes, config, kind, fingerprint)


def choose_kind(config: RunConfig, model: nn.Module, processes: Processes) -> Kind:
    """`auto`: one process needs nothing; several replicate what fits half a GPU, and cut what does not."""
    if config.strategy.offload == "all" or config.strategy.shard_size:
        return "fsdp2"
    if processes.world_size == 1:
        return "single"
    if processes.device.type != "cuda":
        return "ddp"
    room = processes.min(torch.cuda.get_device_properties(processes.device).total_memory)
    host_room = processes.min(host_memory())
    on_gpu, saved = state_bytes(model, config)
    copies = saved * processes.local_world_size
    kind: Kind = "ddp" if on_gpu <= STATE_SHARE * room and copies <= STATE_SHARE * host_room else "fsdp2"
    logger.info(
        "strategy.kind auto: %s (uncut, weights, gradients and moments take %.1f of a GPU's %.0f GiB, "
        "the processes' copies for checkpoints %.1f of a host's %.0f)",
        kind,
        *(size / 2**30 for size in (on_gpu, room, copies, host_room)),
    )
    return kind


def state_bytes(model: nn.Module, config: RunConfig) -> tuple[int, int]:
    """Bytes of an uncut model's weights, gradients and moments on a GPU, and of what a checkpoint saves of them."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    moments = sum(p.numel() for p in trained) * (2 if config.optim.name.endswith("8bit") else 8)
    on_gpu = weights + gradients + (moments if config.strategy.offload == "none" else 0)
    return on_gpu, gradients + moments


def host_memory() -> int:
    """Bytes of memory that this process's host, or the job's share of it, has."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.exists() else "max"
    return physical if limit == "max" else min(physical, int(limit))


def needs_group(config: RunConfig) -> bool:
    """Whether even one process joins a process group: sharding engines ask for one."""
    return config.strategy.kind not in ("auto", "single") or config.strategy.offload == "all"
