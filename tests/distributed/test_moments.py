"""Moments of 8 and 32 bit under real strategies, through real checkpoints, on another number of processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_blockwise

from distributed.pool import Pools
from distributed.runs import build, largest_relative_error, make_packs, train_steps
from trainer.checkpoint.layout import RunDir
from trainer.checkpoint.manager import CheckpointManager
from trainer.config import RunConfig
from trainer.data.sampler import GlobalBatchSampler
from trainer.errors import PacktrainError
from trainer.processes import Processes

PACKS = make_packs(12, seed=2)
SAMPLER = GlobalBatchSampler(len(PACKS), packs_per_step=6, epochs=4, seed=5)
SAVED, LAST = 3, 6  # steps
BOUND = {"state1": 0.0071, "state2": 0.0036}  # of the largest magnitude in the new block


@dataclass
class Rows:
    """A process's part of every moment.

    Attributes:
        shard: which part.
        values: float32, by ``<name> <key>``; 8-bit ones as bitsandbytes reads them.
        bounds: how far each element may be from what it was before it was requantised; 0 for moments of 32 bit.
        steps: counted by the optimizer.
    """

    shard: int
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    bounds: dict[str, torch.Tensor] = field(default_factory=dict)
    steps: set[int] = field(default_factory=set)


def look(strategy: Any) -> Rows:
    """At the state of a strategy's optimizer itself."""
    rows = Rows(strategy.shard_index)
    for name, local in strategy.moments.named.items():
        state = strategy.optimizer.state[local]
        rows.steps.add(int(state["step"]))
        for key in ("exp_avg", "exp_avg_sq", "state1", "state2"):
            if key not in state:
                continue
            held, scale = state[key], state.get(f"absmax{key[-1]}")
            if scale is None:
                values, bound = held.clone(), torch.zeros_like(held)
            else:
                values = dequantize_blockwise(held, absmax=scale, code=state[f"qmap{key[-1]}"], blocksize=256)
                bound = BOUND[key] * scale.repeat_interleave(256)[: held.numel()].view(held.shape)
            rows.values[f"{name} {key}"], rows.bounds[f"{name} {key}"] = values, bound
    return rows


def whole(ranks: list[Rows], part: str) -> dict[str, torch.Tensor]:
    """`values` or `bounds` of all ranks put together; copies of one part must be equal."""
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for rank in ranks:
        for key, tensor in getattr(rank, part).items():
            held = parts.setdefault(key, {}).setdefault(rank.shard, tensor)
            assert torch.equal(held, tensor), key
    return {key: torch.cat([tensor for _, tensor in sorted(held.items())]) for key, held in parts.items()}


def manage(processes: Processes, config: RunConfig, folder: Path) -> CheckpointManager:
    return CheckpointManager(RunDir(folder), config.checkpoint, {}, processes, lambda step, saved: None)


def train_and_save(processes: Processes, config: RunConfig, folder: Path) -> tuple[Rows, list[float]]:
    """The moments saved, and the losses of the steps that follow."""
    strategy = build(processes, config)
    train_steps(strategy, SAMPLER, PACKS, 1, range(SAVED))
    rows = look(strategy)
    checkpoints = manage(processes, config, folder)
    checkpoints.save(SAVED, strategy.state_dict(), {}, False)
    checkpoints.close()
    return rows, train_steps(strategy, SAMPLER, PACKS, 1, range(SAVED, LAST)).losses


def restore_and_train(processes: Processes, config: RunConfig, folder: Path) -> tuple[Rows, list[float]]:
    """The moments restored, and the losses of the steps that follow."""
    strategy = build(processes, config)
    train_steps(strategy, SAMPLER, PACKS, 1, range(1))  # moments of its own, to be replaced
    strategy.restore(manage(processes, config, folder).open(SAVED))
    return look(strategy), train_steps(strategy, SAMPLER, PACKS, 1, range(SAVED, LAST)).losses


def refuses(processes: Processes, config: RunConfig, folder: Path) -> str:
    strategy = build(processes, config)
    try:
        strategy.restore(manage(processes, config, folder).open(SAVED))
    except PacktrainError as error:
        return str(error)
    return ""


FSDP2, DDP, HSDP = {"kind": "fsdp2"}, {"kind": "ddp"}, {"kind": "fsdp2", "shard_size": 2}
ON_HOST = {"kind": "fsdp2", "offload": "optimizer"}
ALL = ("adamw", "adamw_8bit", "paged_adamw_32bit")
CASES = [  # optimizers; from, to: strategy and processes of each
    (ALL, FSDP2, 2, FSDP2, 2),
    (ALL, FSDP2, 2, FSDP2, 3),
    (ALL, FSDP2, 3, DDP, 2),
    (("adamw_8bit",), FSDP2, 3, FSDP2, 2),
    (("adamw_8bit",), DDP, 2, FSDP2, 3),
    (("adamw_8bit",), HSDP, 4, FSDP2, 2),
    (("adamw_8bit",), FSDP2, 3, HSDP, 4),
    (("adamw",), ON_HOST, 2, FSDP2, 3),
    (("adamw",), DDP, 2, ON_HOST, 3),
]


def shards(strategy: dict[str, Any], processes: int) -> int:
    return 1 if strategy["kind"] == "ddp" else strategy.get("shard_size", processes)


@pytest.mark.parametrize(
    ("name", "first", "num_first", "second", "num_second"), [(name, *case[1:]) for case in CASES for name in case[0]]
)
def test_moments_go_on_with_other_processes(
    name: str, first: Any, num_first: int, second: Any, num_second: int, pool: Pools, toy_recipe: Any, tmp_path: Path
) -> None:
    configs = [toy_recipe(strategy=strategy, optim={"name": name, "eps": 1e-4}) for strategy in (first, second)]
    before = pool(num_first).run(train_and_save, configs[0], tmp_path)
    after = pool(num_second).run(restore_and_train, configs[1], tmp_path)
    saved, restored = (whole([rows for rows, _ in ranks], "values") for ranks in (before, after))
    bounds = whole([rows for rows, _ in after], "bounds")
    lie_alike = shards(first, num_first) == shards(second, num_second)

    assert saved.keys() == restored.keys()
    for key, value in saved.items():
        assert value.abs().max() > 0
        if lie_alike:
            assert torch.equal(restored[key], value), key
        else:
            assert ((restored[key] - value).abs() <= bounds[key]).all(), key
    assert (name == "adamw_8bit") == any(bound.any() for bound in bounds.values())
    assert all(rows.steps == {SAVED} for rows, _ in after)
    is_exact = lie_alike or name != "adamw_8bit"
    assert largest_relative_error(after[0][1], before[0][1]) <= (1e-5 if is_exact else 1e-3)
    if first == second and num_first == num_second:
        assert after[0][1] == before[0][1]


@pytest.mark.parametrize("world_size", [2])
def test_another_optimizers_checkpoint_is_refused_on_every_process(
    world_size: int, pool: Pools, toy_recipe: Any, tmp_path: Path
) -> None:
    saved, asked = (toy_recipe(strategy=FSDP2, optim={"name": name}) for name in ("adamw", "adamw_8bit"))
    pool(world_size).run(train_and_save, saved, tmp_path)
    for message in pool(world_size).run(refuses, asked, tmp_path):
        assert ".state1" in message and "optim.name" in message
