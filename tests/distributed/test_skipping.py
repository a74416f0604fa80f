"""A gradient that is not finite, on one process of several: nobody's weights, moments or counts change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from distributed.pool import Pools
from distributed.runs import build, make_packs, train_steps
from trainer.config import RunConfig
from trainer.data.sampler import GlobalBatchSampler
from trainer.processes import Processes
from trainer.strategies.base import Strategy

PACKS = make_packs(20, seed=4)
LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {
    "ddp": (2, {"kind": "ddp"}, "adamw"),
    "ddp, 8-bit moments": (2, {"kind": "ddp"}, "adamw_8bit"),
    "fsdp2": (2, {"kind": "fsdp2"}, "adamw"),
    "fsdp2, 8-bit moments": (2, {"kind": "fsdp2"}, "paged_adamw_8bit"),
    "fsdp2, moments on the host": (2, {"kind": "fsdp2", "offload": "optimizer"}, "adamw"),
    "fsdp2, all on the host": (2, {"kind": "fsdp2", "offload": "all"}, "adamw"),
    "fsdp2, two copies of two shards": (4, {"kind": "fsdp2", "shard_size": 2}, "adamw"),
}


def own_state(strategy: Strategy) -> dict[str, torch.Tensor]:
    """Copies of this process's part of what a checkpoint would hold."""
    parts = {name: getattr(t, "to_local", lambda t=t: t)() for name, t in strategy.state_dict().items()}
    return {name: part.detach().clone() for name, part in parts.items() if part.numel()}


def skip_a_step(processes: Processes, config: RunConfig) -> dict[str, Any]:
    """Steps 0 and 2 as usual; in step 1 the last process's loss is NaN."""
    strategy = build(processes, config)
    order = GlobalBatchSampler(len(PACKS), 8, 3 * 8 / len(PACKS), seed=3)

    def spoil(module: nn.Module, args: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss * float("nan")

    def train(step: int) -> tuple[bool, dict[str, torch.Tensor]]:
        (skipped,) = train_steps(strategy, order, PACKS, 2, [step], config.optim.max_grad_norm).skipped
        return skipped, own_state(strategy)

    first, before = train(0)
    hook = strategy.module.register_forward_hook(spoil) if processes.rank == processes.world_size - 1 else None
    second, after = train(1)
    if hook is not None:
        hook.remove()
    third, later = train(2)
    return {
        "skipped": [first, second, third],
        "changed by the skip": [name for name in before if not torch.equal(before[name], after[name])],
        "not changed later": [name for name in before if torch.equal(after[name], later[name])],
        "lost": sorted(before.keys() ^ after.keys()),
    }


@pytest.mark.parametrize(("world_size", "strategy", "name"), LAYOUTS.values(), ids=LAYOUTS)
def test_nothing_changes_where_one_process_finds_nan(
    world_size: int, strategy: dict[str, Any], name: str, pool: Pools, toy_recipe: Any
) -> None:
    config = toy_recipe(strategy=strategy, optim={"name": name, "max_grad_norm": 0.5})
    for found in pool(world_size).run(skip_a_step, config):
        assert found["skipped"] == [False, True, False]
        assert not found["changed by the skip"] and not found["lost"]
        assert not any(name.startswith("model.") or name.endswith(".step") for name in found["not changed later"])
