"""From the recipe and the processes at hand to a strategy."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import nn

from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.processes import Processes
from trainer.strategies.base import Fingerprint, Strategy

logger = logging.getLogger(__name__)
Kind = Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"]
# Share of a GPU that weights, gradients and moments may take before they are cut: activations need the rest.
STATE_SHARE = 0.5


def build_strategy(config: RunConfig, model: nn.Module, processes: Processes, fingerprint: Fingerprint) -> Strategy:
    """The recipe's strategy; `auto` takes the one that communicates least and leaves room for activations.

    Args:
        model: on the meta device, dtypes and `requires_grad` final.
        fingerprint: of a module's 4-bit bytes, None where there are none.

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
    kind: Kind = "ddp" if state_bytes(model, config) <= STATE_SHARE * room else "fsdp2"
    text = "strategy.kind auto: %s (weights, gradients and moments take %.1f GiB, a GPU has %.0f)"
    logger.info(text, kind, state_bytes(model, config) / 2**30, room / 2**30)
    return kind


def state_bytes(model: nn.Module, config: RunConfig) -> int:
    """Bytes of weights, gradients and moments of an uncut model."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    moments = 0 if config.strategy.offload != "none" else sum(p.numel() for p in trained) * 8
    if config.optim.name.endswith("8bit"):
        moments //= 4
    return weights + gradients + moments


def needs_group(config: RunConfig) -> bool:
    """Whether even one process joins a process group: sharding engines ask for one."""
    return config.strategy.kind not in ("auto", "single") or config.strategy.offload == "all"
