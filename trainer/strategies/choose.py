"""From the recipe and the processes at hand to a strategy."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.planner import open_kinds, plan
from trainer.planning.job import Job, Kind
from trainer.processes import Processes
from trainer.strategies.base import Fingerprint, Strategy

logger = logging.getLogger(__name__)
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def build_strategy(config: RunConfig, job: Job, processes: Processes, fingerprint: Fingerprint) -> Strategy:
    """The recipe's strategy; `auto` takes the one that the planner finds fastest.

    Args:
        job: what the planner is asked about; equal on all processes.
        fingerprint: of a module's quantised bytes, None where there are none.

    Raises:
        UserError: the strategy does not go with this number of processes.
    """
    kind = config.strategy.kind if config.strategy.kind != "auto" else choose_kind(job, processes)
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


def choose_kind(job: Job, processes: Processes) -> Kind:
    """`auto`: one process needs nothing; several replicate where that is faster and fits, and cut else."""
    if processes.device.type != "cuda":  # whose memory nobody plans
        return open_kinds(job)[0]  # ddp where it is open
    kinds = open_kinds(job, processes.min(host_memory()))
    best = {kind: plan(job, [kind])[0] for kind in kinds}
    kind = plan(job, kinds)[0].setting.kind
    for other, candidate in best.items():
        logger.info(
            "strategy.kind auto: %s%s, %.0f tok/s a GPU, %.1f of %.0f GiB predicted with %s",
            other,
            " (taken)" if other == kind else "" if candidate.fits else " (does not fit)",
            candidate.step.tokens_per_second,
            candidate.needed / 2**30,
            candidate.room / 2**30,
            candidate.setting,
        )
    return kind


def host_memory() -> int:
    """Bytes of memory that this process's host, or the job's share of it, has."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.exists() else "max"
    return physical if limit == "max" else min(physical, int(limit))


def needs_group(config: RunConfig) -> bool:
    """Whether even one process joins a process group: sharding engines ask for one."""
    return config.strategy.kind not in ("auto", "single") or config.strategy.offload == "all"
