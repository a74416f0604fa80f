"""A run that is stopped anywhere and goes on with another number of processes is the run that was never stopped."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distributed.pool import Pools
from distributed.runs import Trace, build, largest_relative_error, make_packs, train_steps
from trainer.checkpoint.layout import RunDir
from trainer.checkpoint.manager import CheckpointManager
from trainer.config import RunConfig
from trainer.data.sampler import GlobalBatchSampler
from trainer.processes import Processes

PACKS = make_packs(17, seed=5)
SAMPLER = GlobalBatchSampler(len(PACKS), packs_per_step=4, epochs=2, seed=11)
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"adapter": {"r": 4}},
    "lora, dropout": {"adapter": {"r": 4, "dropout": 0.2}},
    "qlora": {"adapter": {"r": 4}, "quantization": {}},
    "qlora, dropout": {"adapter": {"r": 4, "dropout": 0.2}, "quantization": {}},
}
NUM_CASES = 52


@dataclass(frozen=True)
class Leg:
    """One start of a run: it trains to step `dies`, and its last checkpoint is that of step `saved`."""

    kind: str
    world_size: int
    saved: int
    dies: int


def random_case(number: int) -> tuple[str, list[Leg]]:
    """A method, and two or three legs on different numbers of processes."""
    draw = random.Random(number)
    is_zero = number % 5 == 4  # ZeRO's checkpoints go on under ZeRO
    legs: list[Leg] = []
    step = 0
    for last in [False] * draw.choice([1, 1, 2]) + [True]:
        world_size = draw.choice([n for n in (1, 2, 3, 4) if not legs or n != legs[-1].world_size])
        kinds = ["zero1", "zero2", "zero3"] if is_zero else ["ddp", "fsdp2", "single"][: 3 if world_size == 1 else 2]
        kind = draw.choice(kinds)
        step = SAMPLER.num_steps if last else draw.randint(step + 1, SAMPLER.num_steps - 2 + len(legs))
        legs.append(Leg(kind, world_size, step, step if last else draw.randint(step, min(step + 1, SAMPLER.num_steps))))
    return draw.choice(list(METHODS)), legs


CASES = [random_case(number) for number in range(NUM_CASES)]
CASES += [("qlora", [Leg("fsdp2", 8, 3, 3), Leg("ddp", 3, 6, 6), Leg("fsdp2", 8, 9, 9)])]


def run_leg(processes: Processes, config: RunConfig, folder: Path, leg: Leg) -> Trace:
    """Trains from the newest checkpoint on, as a run does when it is started again."""
    checkpoints = CheckpointManager(RunDir(folder), config.checkpoint, {}, processes, lambda step, saved: None)
    newest = checkpoints.newest_intact()
    strategy = build(processes, config)
    if newest is not None:
        strategy.allocate_optimizer()
        strategy.restore(checkpoints.open(newest))
    trace = train_steps(strategy, SAMPLER, PACKS, 1, range(newest or 0, leg.saved))
    checkpoints.save(leg.saved, strategy.state_dict(), {}, False)
    train_steps(strategy, SAMPLER, PACKS, 1, range(leg.saved, leg.dies))  # lost work
    checkpoints.close()
    return trace


@pytest.fixture(scope="session")
def uninterrupted() -> dict[str, Trace]:
    return {}


@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_run_goes_on_with_another_number_of_processes(
    number: int, pool: Pools, toy_recipe: Any, tmp_path: Path, uninterrupted: dict[str, Trace]
) -> None:
    method, legs = CASES[number]
    alone = Leg("single", 1, SAMPLER.num_steps, SAMPLER.num_steps)
    if method not in uninterrupted:
        config = toy_recipe(**METHODS[method], strategy={"kind": "single"})
        (uninterrupted[method],) = pool(1).run(run_leg, config, tmp_path / "alone", alone)
    wanted = uninterrupted[method]

    losses: list[float] = []
    grad_norms: list[float] = []
    samples: list[list[int]] = []
    for leg in legs:
        config = toy_recipe(**METHODS[method], strategy={"kind": leg.kind})
        traces = pool(leg.world_size).run(run_leg, config, tmp_path / "run", leg)
        losses += traces[0].losses
        grad_norms += traces[0].grad_norms
        dealt = zip(*(trace.samples for trace in traces), strict=True)
        samples += [sorted(itertools.chain(*shares)) for shares in dealt]

    assert largest_relative_error(losses, wanted.losses) <= 1e-5, legs
    assert largest_relative_error(grad_norms, wanted.grad_norms) <= 1e-5, legs
    assert samples == [list(SAMPLER.samples(step)) for step in range(SAMPLER.num_steps)]
    packs = [SAMPLER.pack(sample) for step in samples for sample in step]
    assert sorted(packs[:17]) == sorted(packs[17:]) == list(range(17))  # each exactly once an epoch


def test_the_cases_differ() -> None:
    changes = {(a.world_size, b.world_size) for _, legs in CASES for a, b in itertools.pairwise(legs)}
    kinds = {(a.kind, b.kind) for _, legs in CASES for a, b in itertools.pairwise(legs)}
    assert len(CASES) >= 50 and len(changes) >= 10
    assert {("ddp", "fsdp2"), ("fsdp2", "ddp"), ("zero3", "zero2"), ("zero2", "zero3"), ("zero1", "zero1")} <= kinds
