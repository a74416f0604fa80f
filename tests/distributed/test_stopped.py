"""Runs of several processes that are stopped or end badly in a job: ``state.json`` decides what becomes of them."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from distributed.pool import Started
from distributed.test_kill import finish, steps_of
from distributed.test_planted import LIMITS, _at_call
from trainer.checkpoint.layout import RunDir
from trainer.errors import PreflightFailed

SIZE = 2
TIMEOUT = 120.0
RECIPE: dict[str, Any] = {
    "adapter": {"r": 4},
    "strategy": {"kind": "fsdp2"},
    "data": {"split": {"validation": 0.5}},
    "train": {"epochs": 40, "max_steps": 8, "global_batch": {"rows": 4}, "micro_batch": 1},
    "checkpoint": {"every_steps": 4},
    "eval": {"every_steps": 4},
    "export": {"merge": True, "verify": True},
}
# Where the signal comes, and the step that is saved then.
PLACES = {"loading": 0, "save": 5, "evaluation": 4}


def plant(place: str, fault: str, culprit: int, rank: int) -> None:
    """Runs in each process before it starts: `fault` comes to `culprit` at `place`."""
    import trainer.checkpoint.manager as manager
    import trainer.processes as processes
    import trainer.record as record
    from trainer import host_checks
    from trainer.loop import TrainLoop
    from trainer.model.prepare import Preparation

    record.Watchdog = partial(record.Watchdog, limits=LIMITS)  # type: ignore[misc, assignment]
    os.environ |= {"SLURMD_NODENAME": f"n{rank}", "SLURM_JOB_ID": "12"}
    if fault == "killed while stopping":
        TrainLoop.train_step = _at_call(2, "SIGTERM", TrainLoop.train_step)  # type: ignore[method-assign]
        record.SHORTEST_GRACE = 0.001
        fault = "SIGKILL"
    if rank != culprit:
        return
    if place == "loading":
        Preparation.next = _at_call(2, fault, Preparation.next)  # type: ignore[method-assign]
    elif place == "save":
        manager.write_tensors = _at_call(1, fault, manager.write_tensors)
    elif place == "evaluation":
        TrainLoop._evaluate_loss = _at_call(1, fault, TrainLoop._evaluate_loss)  # type: ignore[method-assign]
    elif place == "shared memory":
        look = host_checks._look
        host_checks._look = lambda rank: dataclasses.replace(look(rank), shared=0)
    elif place == "GPU":

        def lost(*_: Any) -> Any:
            raise PreflightFailed("GPUs: CUDA sees 3 here, SLURM granted 4", blamed="n1")

        processes.choose_device = lost


def merge_slowly(rank: int) -> None:
    from trainer.export.merge import Merger

    merged = Merger._merged
    Merger._merged = lambda *args: (time.sleep(3.0), merged(*args))[1]  # type: ignore[method-assign]


@pytest.mark.parametrize("place", PLACES)
def test_a_signal_to_one_process_stops_all(place: str, toy_recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    run, recipe = RunDir(tmp_path / "run"), str(toy_recipe_file(**RECIPE))
    arguments = [recipe, "--run-dir", str(run.path)]
    started = Started(SIZE, arguments, tmp_path, partial(plant, place, "SIGUSR2", 1))
    statuses = started.wait(TIMEOUT)
    started.kill()
    assert statuses == [75, 75], started.said()
    state = run.read_state()
    assert (state["state"], state["step"]) == ("preempted", max(run.steps(), default=0)), state
    assert state["step"] == PLACES[place] or (place == "save" and state["step"] in (4, 5))
    finish(SIZE, arguments, tmp_path)
    assert [record["step"] for record in steps_of(run.path)] == list(range(1, 9))
    assert run.read_state()["state"] == "done" and run.merged.exists()


def test_a_signal_while_rank_0_merges_ends_it_between_two_tensors(
    toy_recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    run, recipe = RunDir(tmp_path / "run"), str(toy_recipe_file(**RECIPE))
    arguments = [recipe, "--run-dir", str(run.path)]
    started, deadline = Started(SIZE, arguments, tmp_path, merge_slowly), time.monotonic() + TIMEOUT
    while run.read_state().get("reason") != "merging":
        assert time.monotonic() < deadline, started.said()
        time.sleep(0.05)
    time.sleep(1.5)
    stopped = time.monotonic()
    started.send(signal.SIGTERM)
    statuses = started.wait(TIMEOUT)
    assert time.monotonic() - stopped < 10  # all of it would take 15 s and more
    started.kill()
    assert statuses == [75, 0], started.said()  # who does not export is done
    state = run.read_state()
    assert state["state"] == "preempted" and "stopped while merging by SIGTERM" in state["reason"]
    before = steps_of(run.path)
    finish(SIZE, arguments, tmp_path)
    assert run.read_state()["state"] == "done" and run.merged.exists()
    assert steps_of(run.path) == before  # nothing was trained again


@pytest.mark.parametrize(
    ("place", "fault", "culprit", "expected", "blamed", "says"),
    [
        ("shared memory", "", 1, "failed", "n1", "/dev/shm on n1"),
        ("GPU", "", 1, "failed", "n1", "rank 1 on host n1: GPUs: CUDA sees 3 here"),
        ("loading", "SIGKILL", 1, "failed", "n1", "rank 1 on host n1"),
        ("loading", "SIGKILL", 0, "failed", "n0", "rank 0 on host n0"),
        ("loading", "exception", 1, "failed", None, "planted"),
        ("save", "killed while stopping", 1, "preempted", None, "SIGTERM came, and the time it left was too short"),
        ("save", "killed while stopping", 0, "preempted", None, "SIGTERM came, and the time it left was too short"),
    ],
)
def test_a_jobs_end_is_told_and_a_machine_at_fault_is_blamed(
    place: str,
    fault: str,
    culprit: int,
    expected: str,
    blamed: str | None,
    says: str,
    toy_recipe_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    run, recipe = RunDir(tmp_path / "run"), str(toy_recipe_file(**RECIPE))
    run.path.mkdir()
    run.job.write_text(json.dumps({"job_id": "12"}))
    started = Started(SIZE, [recipe, "--run-dir", str(run.path)], tmp_path, partial(plant, place, fault, culprit))
    statuses = started.wait(TIMEOUT)
    started.kill()
    assert None not in statuses and all(statuses), started.said()
    state = run.read_state()
    assert (state.get("state"), state.get("blamed")) == (expected, blamed), (state, started.said())
    assert says in state["reason"]
