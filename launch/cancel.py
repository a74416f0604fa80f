"""`packtrain cancel`: a submitted run is to stop for good."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slurm.cancel import Cancelled


def cancel(run_dir: Path, *, now: bool = False) -> None:
    """Have a submitted run save a checkpoint and stop, with all that was to follow it; of a sweep, every run.

    What is saved stays: submitting the run again goes on from there.

    Args:
        run_dir: folder of a submitted run, or of a sweep.
        now: end it at once, without waiting for a checkpoint.
    """
    from slurm.cancel import cancel as cancel_runs

    found = cancel_runs(run_dir, now)
    for one in found:
        print(f"{one.run_dir}: {_outcome(one, now)}")
    if not now and not all(one.is_over for one in found):
        print(
            f"packtrain status {run_dir} shows the end; packtrain cancel {run_dir} --now does not wait for checkpoints"
        )


def _outcome(one: Cancelled, now: bool) -> str:
    from trainer.checkpoint.layout import RunDir

    job, run = one.after, RunDir(one.run_dir)
    saved = run.steps()
    kept = f"step {saved[-1]} is saved" if saved else "it has no checkpoint"
    followers = f"; cancelled what would have followed: job {', '.join(one.then)}" if one.then else ""
    if one.before.is_gone:
        return f"was over; cancelled what would have followed it: job {', '.join(one.then)}"
    if one.is_over and run.read_state().get("state") == "done":
        return f"job {job.job_id} was done in this moment{followers}"
    if one.is_over:
        waited = "waited, and is cancelled" if one.before.is_waiting else "is cancelled"
        return f"job {job.job_id} {waited}; {kept}{followers}"
    if job.state == "UNKNOWN":
        return f"told to stop, but what job {job.job_id} does is unknown: {job.reason}{followers}"
    if now:
        return f"job {job.job_id} is being ended ({job.state}); {kept}{followers}"
    return f"job {job.job_id} saves a checkpoint and stops{followers}"
