"""Whole runs killed at a random moment and started again on another number of processes."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distributed.pool import Started
from distributed.runs import largest_relative_error
from trainer.checkpoint.layout import RunDir

TIMEOUT = 120.0
RECIPE: dict[str, Any] = {
    "adapter": {"r": 4, "dropout": 0.1},
    "data": {"packing": False},
    "train": {"epochs": 1.5, "max_steps": None, "global_batch": {"rows": 4}, "micro_batch": 1, "log_every": 1},
    "checkpoint": {"every_steps": 2, "keep": 2},
    "eval": {"every_steps": 5},
}
CASES = [("fsdp2", 3, 2), ("ddp", 2, 4), ("fsdp2", 2, 1), ("zero2", 2, 3)]


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    """Records of the steps in ``metrics.jsonl``, of which the last line may be half written."""
    path = RunDir(run_dir).metrics
    lines = path.read_text().splitlines() if path.exists() else []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return [record for record in records if record["kind"] == "step"]


def finish(size: int, arguments: list[str], folder: Path) -> None:
    """Trains to the end."""
    started = Started(size, arguments, folder)
    statuses = started.wait(TIMEOUT)
    started.kill()
    assert statuses == [0] * size, started.said()


@pytest.fixture(scope="session")
def uninterrupted() -> dict[str, list[dict[str, Any]]]:
    return {}


@pytest.mark.parametrize(("kind", "first", "then"), CASES)
def test_a_killed_run_goes_on_with_another_number_of_processes(
    kind: str,
    first: int,
    then: int,
    toy_recipe_file: Callable[..., Path],
    tmp_path: Path,
    uninterrupted: dict[str, list[dict[str, Any]]],
) -> None:
    if not uninterrupted:
        recipe = str(toy_recipe_file(**RECIPE, strategy={"kind": "single"}))
        finish(1, [recipe, "--run-dir", str(tmp_path / "alone")], tmp_path)
        uninterrupted["steps"] = steps_of(tmp_path / "alone")
    wanted, run_dir = uninterrupted["steps"], tmp_path / "run"
    recipe = str(toy_recipe_file(**RECIPE, strategy={"kind": kind}))
    arguments, draw = [recipe, "--run-dir", str(run_dir)], random.Random(f"{kind} {first}")

    started = Started(first, arguments, tmp_path)
    die_after, deadline = draw.randint(1, len(wanted) * 2 // 3), time.monotonic() + TIMEOUT
    while len(steps_of(run_dir)) < die_after and started.is_alive and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(draw.uniform(0, 0.2))
    started.kill()
    assert started.wait(0) == [-9] * first, started.said()
    assert RunDir(run_dir).read_state()["state"] == "running"  # nobody had the time to say more
    finish(then, arguments, tmp_path)

    found = steps_of(run_dir)
    assert [record["step"] for record in found] == [record["step"] for record in wanted]
    for key in ("loss", "grad_norm", "lr"):
        pairs = [(record[key], other[key]) for record, other in zip(found, wanted, strict=True) if other[key]]
        assert largest_relative_error(*zip(*pairs, strict=True)) <= 1e-5
    for key in ("tokens", "trained_tokens"):
        assert [record[key] for record in found] == [record[key] for record in wanted]
    assert RunDir(run_dir).read_state()["state"] == "done"
