"""Signals that ask a run to stop: none is lost, none kills a child, and every place where a run may be ends soon."""

from __future__ import annotations

import json
import os
import pkgutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trainer.checkpoint.layout import RunDir
from trainer.config import RunConfig
from trainer.errors import Preempted
from trainer.metrics.trackers import read_metrics
from trainer.preemption import STOP_SIGNALS, StopRequest

ROOT = Path(__file__).parents[2]
WAIT = 120.0
Process = subprocess.Popen[str]


@pytest.fixture(autouse=True)
def _mask_as_before() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    assert signal.pthread_sigmask(signal.SIG_SETMASK, before) == before


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_that_came_before_is_not_lost(number: signal.Signals) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    signal.raise_signal(number)
    with StopRequest() as stop:
        assert stop.reason == number.name
        with pytest.raises(Preempted, match=f"stopped by {number.name}"):
            stop.check()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_a_signal_is_seen_when_it_is_asked_for_and_kept() -> None:
    with StopRequest() as stop:
        stop.check()
        assert stop.reason is None
        signal.raise_signal(signal.SIGUSR2)
        assert stop.reason == stop.reason == "SIGUSR2"
        signal.raise_signal(signal.SIGTERM)  # a late one, when the work is done
    assert stop.reason == "SIGTERM"
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL


def test_work_is_cut_short_only_by_a_stop() -> None:
    with StopRequest() as stop:
        with stop.cut_short():
            signal.raise_signal(signal.SIGTERM)
            stop.check()
            pytest.fail("not cut short")
        with pytest.raises(ValueError), stop.cut_short():
            raise ValueError


def test_children_outlive_what_is_meant_for_the_run() -> None:
    """A compiler, a tracker's server."""
    with StopRequest():
        child = subprocess.Popen(["sleep", "60"])
    try:
        for number in STOP_SIGNALS:
            child.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.3)
    finally:
        child.kill()
        child.wait()


# Real runs. Every signal goes to all processes of the session, as SLURM sends it to all of a job step.


def start(arguments: list[str], folder: Path, script: str = "from trainer.__main__ import main") -> Process:
    """`python -m trainer`, with stop signals blocked from the start as a job's task has them.

    Args:
        folder: for its data cache.
        script: what defines its `main`.
    """
    program = folder / "program.py"  # a file, which workers import
    program.write_text(f"{script}\nif __name__ == '__main__':\n    import sys\n    sys.exit(main())\n")
    own = {"OMP_NUM_THREADS": "1", "PACKTRAIN_CACHE": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, str(program), *arguments],
        env={**os.environ, **own, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS),
    )


def stop(process: Process, number: signal.Signals) -> tuple[int, str, float]:
    """Exit status, what it said, and the seconds it took."""
    started = time.monotonic()
    os.killpg(process.pid, number)
    try:
        _, said = process.communicate(timeout=WAIT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said, time.monotonic() - started


def wait_until(process: Process, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        if process.poll() is not None:
            pytest.fail(process.communicate()[1])
        assert time.monotonic() < deadline
        time.sleep(0.01)


def members(session: int) -> list[int]:
    """Pids of the session's processes that run."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            state, _, _, in_session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if int(in_session) == session and state != "Z":
            found.append(int(entry.name))
    return found


def assert_all_ended(process: Process) -> None:
    """Now, or as soon as they see that their parent has."""
    deadline = time.monotonic() + 10
    while members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not members(process.pid)


def test_in_the_middle_of_preparing_data(toy_recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    many_rows = tmp_path / "rows.jsonl"  # for a pool of processes, and long enough
    row = {"messages": [{"role": "user", "content": "Say a b c."}, {"role": "assistant", "content": "a b c " * 20}]}
    many_rows.write_text((json.dumps(row) + "\n") * 150_000)
    recipe = toy_recipe_file(data={"train": [{"path": str(many_rows), "format": "messages"}]})
    run, cache = RunDir(tmp_path / "run"), tmp_path / "cache"
    process = start([str(recipe), "--run-dir", str(run.path)], tmp_path)
    wait_until(process, lambda: any(path.stat().st_size for path in cache.glob("*.tmp/train/rows.arrow")))
    status, said, seconds = stop(process, signal.SIGUSR2)
    assert status == 75, said
    assert seconds < 20, seconds  # preparing all would take minutes
    assert "Traceback" not in said and "stopped while loading by SIGUSR2" in said
    assert run.read_state()["state"] == "preempted"
    assert_all_ended(process)
    assert not list(cache.glob("*.tmp"))


POOL = """
import os, signal, sys, time
from pathlib import Path
from trainer.data import conversion
from trainer.preemption import StopRequest

class Converter:
    def __call__(self, task):
        time.sleep(task)
        return os.getpid(), []

def main():
    conversion.PARALLEL_ROWS, conversion.Converter = 1, lambda *_: Converter()
    os.sched_getaffinity = lambda _: {0, 1}
    with StopRequest(), conversion.converting(None, None, None, 10) as convert:
        found = set()
        for index, (pid, _) in convert((index, 0.2) for index in range(40)):
            if index == 0:
                print("working", file=sys.stderr, flush=True)
            found.add(pid)
        print("done by", *found, file=sys.stderr)
"""


BUSY = """
import os, signal, time
from trainer.preemption import StopRequest

def main():
    with StopRequest() as stop:
        assert stop.age == 0.0
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)  # in a call that nothing interrupts
        assert 0.3 < stop.age < 60, stop.age
"""


def test_the_moment_of_a_signal_is_noted_though_nobody_asks(tmp_path: Path) -> None:
    process = start([], tmp_path, BUSY)
    _, said = process.communicate(timeout=WAIT)
    assert process.returncode == 0 and "SIGTERM received" in said, said


def test_workers_outlive_signals_from_their_first_moment_on(tmp_path: Path) -> None:
    process = start([], tmp_path, POOL)
    wait_until(process, lambda: len(members(process.pid)) > 1)  # the first is starting
    for _ in range(20):
        for number in STOP_SIGNALS:
            os.killpg(process.pid, number)
        time.sleep(0.1)
    status, said, _ = stop(process, signal.SIGUSR2)
    (done,) = [line for line in said.splitlines() if line.startswith("done by")]
    assert status == 0 and len(done.split()) == 4, said  # both workers
    assert_all_ended(process)


def test_a_worker_that_dies_ends_the_others(tmp_path: Path) -> None:
    process = start([], tmp_path, POOL)
    assert process.stderr is not None and process.stderr.readline() == "working\n"
    workers = [pid for pid in members(process.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 1 and "BrokenProcessPool" in said
    assert_all_ended(process)


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    process = start([], tmp_path, POOL)
    assert process.stderr is not None and process.stderr.readline() == "working\n"
    process.kill()
    assert_all_ended(process)


# Wherever a run may be, in this process: the next start makes of it the run that nothing had stopped.

SECTIONS: dict[str, dict[str, Any]] = {
    "adapter": {"method": "lora", "r": 4, "alpha": 8, "dropout": 0.1},
    "train": {"max_steps": 6, "epochs": 9},
    "eval": {"every_steps": 3, "samples": ["Repeat a b."], "max_new_tokens": 2},
    "checkpoint": {"every_steps": 2, "keep": 9},
    "schedule": {"name": "plateau", "patience": 0},
    "export": {"merge": True, "verify": True},
}
FULL = {**SECTIONS, "adapter": None, "export": {"merge": False}}
# Function -> at which of its calls the signal comes; what is said; the step that is saved then.
PLACES: dict[str, tuple[dict[str, Any], str, int, str, int]] = {
    "model": (SECTIONS, "trainer.run.build_model", 1, "while loading by SIGTERM; there was nothing to save", 0),
    "weights": (SECTIONS, "trainer.model.prepare.Preparation.next", 3, "while loading", 0),
    "checkpoints": (SECTIONS, "trainer.run.CheckpointManager.newest_intact", 1, "while loading", 0),
    "step": (SECTIONS, "trainer.loop.TrainLoop.train_step", 3, "at step 3", 3),
    "save": (SECTIONS, "trainer.checkpoint.manager.write_tensors", 1, "at step [23] ", 3),
    "evaluation": (SECTIONS, "trainer.loop.TrainLoop._evaluate_loss", 1, "at step 3", 3),
    "last evaluation": (SECTIONS, "trainer.loop.TrainLoop._evaluate_loss", 2, "at step 6", 6),
    "last step": (SECTIONS, "trainer.loop.TrainLoop.train_step", 6, "at step 6", 6),
    "consolidating": (FULL, "trainer.checkpoint.saved.SavedCheckpoint.read", 3, "while writing the result", 6),
    "merging": (SECTIONS, "trainer.export.merge.Merger._merged", 3, "trained, and stopped while merging by SIGT", 6),
    "hashing": (SECTIONS, "trainer.export.verify.read_manifest", 1, "while verifying", 6),
    "verifying": (SECTIONS, "trainer.export.verify.Verifier._compare_adapted", 2, "while verifying", 6),
}


def summary(run: RunDir) -> dict[str, Any]:
    """What a run computed, without the times."""
    found: dict[str, Any] = {"step": [], "eval": [], "sample": []}
    for record in read_metrics(run.metrics):
        kept = {key: record[key] for key in ("step", "loss", "lr", "grad_norm", "tokens", "answer") if key in record}
        found.setdefault(record["kind"], []).append(kept)
    result = next(folder for folder in (run.merged, run.model) if folder.exists())
    return {**found, "event": None, "result": (result / "model.safetensors").read_bytes()}


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Any]:
    return {}


@pytest.mark.parametrize("place", PLACES)
def test_a_stop_anywhere_costs_nothing(
    place: str,
    toy_recipe: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: dict[str, Any],
) -> None:
    from trainer.run import train

    sections, target, number, says, step = PLACES[place]
    config, run = toy_recipe(**sections), RunDir(tmp_path / "run")
    kind = config.method
    if kind not in uninterrupted:
        train(config, tmp_path / "whole")
        uninterrupted[kind] = summary(RunDir(tmp_path / "whole"))

    owner, _, name = target.rpartition(".")
    function, calls = pkgutil.resolve_name(target), []

    def signalled(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        return function(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Preempted, match=says):
        patch.setattr(pkgutil.resolve_name(owner), name, signalled)
        train(config, run.path)
    state = run.read_state()
    assert (state["state"], state["step"]) == ("preempted", max(run.steps(), default=0))
    assert max(run.steps(), default=0) in (step, step - 1 if place == "save" else step)
    assert not run.merged.exists()
    left = [folder.name for folder in run.path.glob("*.unfinished")]
    if place in ("hashing", "verifying"):
        assert left == ["merged.unfinished"]  # whole, and not yet proven
    else:  # tensors that are under way while merging come to their end, and may make the only file whole
        assert left == [] or (place == "merging" and left == ["merged.unfinished"])
    train(config, run.path)
    assert run.read_state()["state"] == "done" and not list(run.path.glob("*.unfinished"))
    assert summary(run) == uninterrupted[kind]
