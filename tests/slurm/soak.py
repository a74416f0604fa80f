"""Interrupts runs on a real SLURM at random moments, and counts what they lost.

    python tests/slurm/soak.py --interruptions 200 --seed 0

Every run has to end done, each of its steps once, on the samples and with the losses of a run that nothing stopped.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cluster import Cluster
from runs import ENDED, SAVE_EVERY, STEPS, Submitted, Submitter, assert_uninterrupted

EVALUATE_EVERY = 25
# A save in the background is not there yet for some steps; so many are lost beside the interval when a rank is killed.
STEPS_OF_A_SAVE = 15
PATIENCE = 120.0
NOTICED_WITHIN = 20.0


@dataclass
class Tally:
    """What became of the interruptions.

    Attributes:
        counts: of kind and phase.
        lost: steps done again after those that killed; none after the others.
        runs: that were trained to their end.
    """

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    lost: list[int] = field(default_factory=list)
    runs: int = 0

    @property
    def total(self) -> int:
        return self.counts.total()

    def __str__(self) -> str:
        rows = [f"  {kind:<18} {phase:<11} {count}" for (kind, phase), count in sorted(self.counts.items())]
        worst = max(self.lost, default=0)
        return "\n".join([f"{self.total} interruptions, {self.runs} runs, at most {worst} steps done again", *rows])


def soak(cluster: Cluster, submit: Submitter, reference: dict[int, float], interruptions: int, seed: int) -> Tally:
    """Trains run after run until so many interruptions were made.

    Raises:
        AssertionError: a run lost what it must not.
    """
    rng, tally = random.Random(seed), Tally()
    while tally.total < interruptions:
        options = ("--nodes", str(rng.choice([1, 2])))
        sections = {"eval": {"every_steps": EVALUATE_EVERY}, "export": {"merge": True, "verify": True}}
        name = f"run{tally.runs}"
        run = submit(cluster, *options, name=name, **sections)
        run.wait_for(lambda run=run: run.events("start"), PATIENCE, "the first start")
        while run.state not in ENDED or run.is_queued():
            if tally.total < interruptions:
                interrupt(cluster, run, rng, tally)
            else:
                run.wait_for(lambda run=run: run.state in ENDED and not run.is_queued(), 2 * PATIENCE, "the end")
            if run.state == "failed" and not run.is_queued():  # killed three times without a new checkpoint
                assert "in a row" in run.run.read_state()["reason"], run.output()[-6000:]
                submit(cluster, *options, name=name, **sections)
        assert run.state == "done", f"{run.run.read_state()}\n{run.output()[-6000:]}"
        assert_uninterrupted(run, reference)
        assert (run.run.merged / "model.safetensors").exists()
        tally.runs += 1
    return tally


def interrupt(cluster: Cluster, run: Submitted, rng: random.Random, tally: Tally) -> None:
    """One interruption, at a random moment of a random phase, and the start after it."""
    phase = rng.choice(list(PHASES))
    kind = rng.choice(list(KINDS))
    if not PHASES[phase](run, rng):
        return  # the run ended before
    num_starts, before = len(run.events("start")), steps_done(run)
    if not KINDS[kind](cluster, run, rng):
        return
    deadline = time.monotonic() + PATIENCE
    while len(run.events("start")) == num_starts:
        if run.state in ENDED and not run.is_queued():
            break  # it was quicker, or given up
        if run.last_step() > before + EVALUATE_EVERY and time.monotonic() > deadline - PATIENCE + NOTICED_WITHIN:
            return  # it came before there was a process to take it
        assert time.monotonic() < deadline, f"{kind} in {phase}: no other start\n{run.output()[-6000:]}"
        time.sleep(0.1)
    tally.counts[kind, phase] += 1
    if len(run.events("start")) > num_starts:
        lost = before - run.events("start")[-1]["step"]
        assert lost <= (0 if kind in GRACEFUL else SAVE_EVERY + STEPS_OF_A_SAVE), (
            f"{kind} in {phase}: {lost} steps lost"
        )
        tally.lost.append(max(0, lost))


def steps_done(run: Submitted) -> int:
    """By this start; what an earlier one did and lost is in metrics.jsonl until this one writes there."""
    start = run.events("start")[-1]
    return (
        run.last_step()
        if run.run.metrics.exists() and run.run.metrics.stat().st_mtime > start["time"]
        else start["step"]
    )


# -------------------------------------------------------------------------------------------------------------- when


def _until(run: Submitted, condition: Callable[[], object]) -> bool:
    """False where the run ended before."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if run.state in ENDED and not run.is_queued():
            return False
        assert time.monotonic() < deadline, f"no progress at step {run.last_step()}\n{run.output()[-6000:]}"
        time.sleep(0.01)
    return True


def _starting(run: Submitted, rng: random.Random) -> bool:
    time.sleep(rng.uniform(0, 8))
    return True


def _stepping(run: Submitted, rng: random.Random) -> bool:
    target = run.last_step() + rng.randint(1, 60)
    return _until(run, lambda: run.last_step() >= target)


def _saving(run: Submitted, rng: random.Random) -> bool:
    def is_saving() -> bool:
        folders = run.run.checkpoints.glob("step_*.unfinished")
        try:
            return any(folder.stat().st_mtime > run.events("start")[-1]["time"] for folder in folders)
        except FileNotFoundError:
            return True  # it has just been committed

    return _until(run, is_saving)


def _evaluating(run: Submitted, rng: random.Random) -> bool:
    target = (run.last_step() // EVALUATE_EVERY + 1) * EVALUATE_EVERY
    return _until(run, lambda: run.last_step() >= target)


def _exporting(run: Submitted, rng: random.Random) -> bool:
    if not _until(run, lambda: run.last_step() >= STEPS):
        return False
    time.sleep(rng.uniform(0, 3))
    return True


PHASES = {
    "start": _starting,
    "step": _stepping,
    "save": _saving,
    "evaluation": _evaluating,
    "export": _exporting,
}


# --------------------------------------------------------------------------------------------------------------- how


def _time_limit(cluster: Cluster, run: Submitted, rng: random.Random) -> bool:
    """The signal that SLURM sends before the time limit."""
    cluster.run("scancel", "--signal=USR2", run.job_id, check=False)
    return True


def _terminate(cluster: Cluster, run: Submitted, rng: random.Random) -> bool:
    cluster.run("scancel", "--signal=TERM", run.job_id, check=False)
    return True


def _preempt(cluster: Cluster, run: Submitted, rng: random.Random) -> bool:
    urgent = cluster.submit("sleep 1", "--partition=urgent", "--nodes=4", "--exclusive")
    cluster.wait_for(urgent, "COMPLETED", 90)
    return True


def _requeue(cluster: Cluster, run: Submitted, rng: random.Random) -> bool:
    return cluster.run("scontrol", "requeue", run.job_id, check=False).returncode == 0


def _kill(cluster: Cluster, run: Submitted, rng: random.Random) -> bool:
    ranks = [int(environ["SLURM_PROCID"]) for _, environ in run.processes()]
    if not ranks:
        return False
    try:
        run.kill_rank(rng.choice(ranks))
    except (AssertionError, ProcessLookupError):
        return False
    return True


KINDS = {
    "time limit": _time_limit,
    "SIGTERM": _terminate,
    "preemption": _preempt,
    "scontrol requeue": _requeue,
    "SIGKILL": _kill,
}
GRACEFUL = {"time limit", "SIGTERM", "preemption"}  # SLURM waits longer than a save takes


def main() -> int:
    """Runs the soak by itself, through pytest for its fixtures."""
    import pytest

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--interruptions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    test = Path(__file__).with_name("test_soak.py")
    options = ["--interruptions", str(arguments.interruptions), "--seed", str(arguments.seed)]
    return pytest.main(["-x", "-s", "-p", "no:cacheprovider", str(test), *options])


if __name__ == "__main__":
    sys.exit(main())
