"""cancel(): a submitted run is to stop for good. Imports no torch.

The mark comes first: from then on no start and no requeue of the run passes, whatever SLURM does meanwhile. Then the
tasks of a job that runs get SIGTERM, which has them save a checkpoint and leave; its batch shell sees the mark and
ends. A job that waits has nothing to save.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from slurm.cluster import SlurmError, SlurmMissing, run_slurm
from slurm.history import CANCELLED, read_job, read_sweep
from slurm.jobs import ask, follower_ids, is_elsewhere
from slurm.queue import JobState, job_states
from trainer.checkpoint.layout import RunDir, write_atomically
from trainer.errors import PacktrainError, UserError

SECONDS_TO_SEE = 8.0  # that the caller waits to see what comes of it; saving 70B takes longer, and goes on by itself
POLL_SECONDS, ASK_SECONDS = 0.5, 2.0
REASON = "packtrain cancel"


@dataclass
class Cancelled:
    """What came of one run.

    Attributes:
        before: its job as it was.
        after: its job at the end of the wait.
        was_asked: its tasks got SIGTERM and save a checkpoint.
        then: jobs that were to follow, now cancelled.
    """

    run_dir: Path
    before: JobState
    after: JobState
    was_asked: bool = False
    then: list[str] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return self.after.is_gone


def cancel(folder: Path, now: bool = False, seconds: float = SECONDS_TO_SEE) -> list[Cancelled]:
    """Cancels a run, or all runs of a sweep that are not over.

    Args:
        now: without waiting for a checkpoint; what SLURM leaves the tasks (KillWait) may do for one.
        seconds: to wait for the end.

    Raises:
        UserError: nothing there that could be cancelled, SLURM is not on this host, or it is another cluster's.
        PacktrainError: SLURM does not answer; the marks are there.
    """
    run_dirs = _run_dirs(folder)
    if shutil.which("scancel") is None:
        raise SlurmMissing("scancel")
    answer = ask(run_dirs)
    jobs: list[JobState] = []
    found: list[Cancelled] = []
    for run_dir in run_dirs:
        submission = read_job(run_dir)
        if is_elsewhere(submission, answer.cluster):
            raise _elsewhere(run_dir, submission["cluster"], answer.cluster)
        jobs.append(job := answer.of(submission, submission["job_id"]))
        alive = [job_id for job_id in follower_ids(submission) if not answer.of(submission, job_id).is_gone]
        if not job.is_gone or alive:
            found.append(Cancelled(run_dir, job, job, then=alive))
    if not found:
        raise _nothing(folder, jobs)
    for one in found:
        if not one.before.is_gone:  # else the run is over, and only what follows it is cancelled
            _mark(one.run_dir, now)
    try:
        _scancel([job_id for one in found for job_id in one.then])
        _end_jobs(found, now, seconds)
    except SlurmError as error:
        raise PacktrainError(
            f"{error}\n  the mark is set: no further start of {folder} will train\n"
            "  fix: the same command again when SLURM answers, for what runs now"
        ) from error
    for one in found:
        if not one.before.is_gone and one.is_over:
            _write_state(one)
    return found


def _run_dirs(folder: Path) -> list[Path]:
    sweep = read_sweep(folder)
    run_dirs = [folder / str(run["run_dir"]) for run in sweep["runs"]] if sweep else [folder]
    submitted = [run_dir for run_dir in run_dirs if "job_id" in read_job(run_dir)]
    if submitted:
        return submitted
    if not folder.is_dir():
        raise UserError("RUN_DIR", f"{folder}: no such folder", "the folder of a submitted run or sweep")
    pid = RunDir(folder).read_state().get("pid")
    fix = f"kill -TERM {pid} on its host has a local run save and stop" if pid else ""
    raise UserError("RUN_DIR", f"{folder}: nothing was submitted here", "the folder of a submitted run or sweep", fix)


def _elsewhere(run_dir: Path, cluster: str, here: str) -> UserError:
    found = f"{run_dir}: submitted on cluster {cluster}, and this host's is {here}"
    return UserError("RUN_DIR", found, fix=f"the same command on a login node of {cluster}")


def _nothing(folder: Path, jobs: Sequence[JobState]) -> UserError:
    ends = [f"job {job.job_id} {'is gone' if job.state == 'UNKNOWN' else f'ended as {job.state}'}" for job in jobs[:5]]
    more = f" and {len(jobs) - 5} more" if len(jobs) > 5 else ""
    return UserError("RUN_DIR", f"{folder}: nothing to cancel: {', '.join(ends)}{more}")


def _mark(run_dir: Path, now: bool) -> None:
    write_atomically(run_dir / CANCELLED, json.dumps({"time": int(time.time()), "now": now}) + "\n")  # synced


def _end_jobs(found: Sequence[Cancelled], now: bool, seconds: float) -> None:
    """Tells each job by what it is doing at that moment, until all are gone or the time is over."""
    deadline = time.monotonic() + seconds
    ended: set[str] = set()
    asked_at = -math.inf
    while True:
        left = [one for one in found if not one.after.is_gone and one.after.job_id not in ended]
        to_end = [one for one in left if now or one.after.is_waiting]
        # Again and again: a task that is being started may not get the first one.
        if time.monotonic() - asked_at > ASK_SECONDS and (to_ask := [one for one in left if one not in to_end]):
            asked_at = time.monotonic()
            with_tasks = _with_tasks([one.after.job_id for one in to_ask])
            asked = [one for one in to_ask if one.after.job_id in with_tasks]
            _scancel([one.after.job_id for one in asked], "--signal=TERM")  # to the tasks, not to the batch shell
            for one in asked:
                one.was_asked = True
            # Before srun has begun there is nobody who could save anything; after it the batch shell ends by itself.
            to_end += [one for one in to_ask if one not in asked and not one.was_asked]
        _scancel([one.after.job_id for one in to_end])
        ended |= {one.after.job_id for one in to_end}
        if all(one.after.is_gone for one in found) or time.monotonic() > deadline:
            return
        time.sleep(POLL_SECONDS)
        states = job_states([one.after.job_id for one in found])
        for one in found:
            one.after = states[one.after.job_id]


def _with_tasks(job_ids: Sequence[str]) -> set[str]:
    """Those of the jobs that have a step of srun's; the batch shell and what SLURM adds do not count."""
    text = run_slurm("squeue", "--noheader", "--steps", f"--jobs={','.join(job_ids)}", "--format=%i")
    return {match[1] for match in re.finditer(r"^(\d+(?:_\d+)?)\.\d+\s*$", text, re.MULTILINE)}


def _scancel(job_ids: Sequence[str], *options: str) -> None:
    """Jobs that have ended meanwhile are no error."""
    if not job_ids:
        return
    try:
        run_slurm("scancel", *options, *job_ids)
    except SlurmError as error:
        harmless = ("Invalid job id", "already completing or completed", "Job/step already")
        if error.status is None or not all(
            any(text in line for text in harmless) for line in error.stderr.splitlines()
        ):
            raise


def _write_state(one: Cancelled) -> None:
    """Where no batch shell was there to say it."""
    run = RunDir(one.run_dir)
    last_words = {"done", "cancelled"} if one.before.is_waiting else {"done", "cancelled", "failed"}
    if run.read_state().get("state") not in last_words:
        run.write_state("cancelled", max(run.steps(), default=0), REASON)
