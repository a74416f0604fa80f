"""A fault planted on one of four ranks, wherever a run may be: it ends within a minute and names the culprit."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from distributed.pool import Started
from trainer.checkpoint.layout import RunDir, find_damage
from trainer.config import RunConfig
from trainer.watch.verdict import Limits

SIZE = 4
# A quarter of a real run's: those are test_launch.py's.
LIMITS = Limits(silence=7.0, suspect=4.0, secondary=6.0, stall=9.0, fail=9.0, connect=20.0, grace=3.0, courtesy=0.5)
RECIPE: dict[str, Any] = {
    "adapter": {"r": 4},
    "quantization": {},
    "strategy": {"kind": "fsdp2"},
    "train": {"epochs": 400, "max_steps": 400, "global_batch": {"rows": 4}, "micro_batch": 1},
    "checkpoint": {"every_steps": 2, "keep": 2},
    "eval": {"every_steps": 5},
}
FAULTS = ("SIGKILL", "SIGSTOP", "exception")
# Where it happens, and the step of a checkpoint that was committed before.
PLACES = {"loading": None, "step": 2, "save": 2, "evaluation": 2}


def plant(place: str, fault: str, culprit: int, rank: int) -> None:
    """Has `fault` happen to `culprit` at `place`; runs in each process before the training starts."""
    import trainer.checkpoint.manager as manager
    import trainer.record as record
    import trainer.run as run
    from trainer.loop import TrainLoop

    record.Watchdog = partial(record.Watchdog, limits=LIMITS)  # type: ignore[misc, assignment]
    if rank != culprit:
        return
    if place == "loading":
        run.load_weights = _at_call(1, fault, run.load_weights)
    elif place == "step":
        TrainLoop.train_step = _at_call(5, fault, TrainLoop.train_step)  # type: ignore[method-assign]
    elif place == "save":
        manager.write_tensors = _at_call(2, fault, manager.write_tensors)
    else:
        TrainLoop._evaluate_loss = _at_call(1, fault, TrainLoop._evaluate_loss)  # type: ignore[method-assign]


def _at_call(number: int, fault: str, function: Callable[..., Any]) -> Callable[..., Any]:
    calls = 0

    def planted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            if fault == "exception":
                raise RuntimeError("planted")
            # To the main thread, which sees it at once; what kills, kills all.
            signal.pthread_kill(threading.main_thread().ident or 0, getattr(signal, fault))
        return function(*args, **kwargs)

    return planted


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("world_size", [SIZE])
def test_the_run_ends_and_names_the_culprit(
    world_size: int, place: str, fault: str, toy_recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    culprit = (list(PLACES).index(place) + FAULTS.index(fault)) % SIZE  # each rank gets its turn, rank 0 too
    statuses, said, run = end(place, fault, culprit, toy_recipe_file, tmp_path)
    others = [status for rank, status in enumerate(statuses) if rank != culprit]
    assert None not in others and all(others), said
    assert f"rank {culprit} on host {socket.gethostname()}" in said or (culprit == 0 and "planted" in said), said
    if fault == "exception":
        assert "planted" in said
    state = run.read_state()
    if state:  # there is none while the model is being loaded: the run dir is not ours yet
        assert state["state"] == "failed" and (f"rank {culprit}" in state["reason"] or "planted" in state["reason"])
        assert state.get("blamed") == (None if fault == "exception" else socket.gethostname())
    if PLACES[place] is None:
        assert not run.steps()
        return
    assert run.steps() and run.steps()[-1] >= (PLACES[place] or 0)
    assert all(find_damage(run.step_dir(step)) is None for step in run.steps())
    if fault != "exception":
        assert (run.logs / f"rank_{(culprit + 1) % SIZE}.stacks.txt").read_text()


def end(
    place: str,
    fault: str,
    culprit: int,
    toy_recipe_file: Callable[..., Path],
    folder: Path,
) -> tuple[list[int | None], str, RunDir]:
    """Runs into the fault. Exit statuses once the survivors have ended, what they said, and the run dir."""
    made: Callable[..., RunConfig | Path] = toy_recipe_file
    run = RunDir(folder / "run")
    arguments = [str(made(**RECIPE)), "--run-dir", str(run.path)]
    started = Started(SIZE, arguments, folder, partial(plant, place, fault, culprit))
    try:
        deadline = time.monotonic() + 75
        while time.monotonic() < deadline:
            statuses = started.wait(0.2)
            if all(status is not None or rank == culprit for rank, status in enumerate(statuses)):
                break
        return started.wait(2.0 if fault != "SIGSTOP" else 0.0), started.said(), run
    finally:
        started.kill()
