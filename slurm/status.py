"""Where submitted runs stand: what their folders say and what SLURM says, made into one answer. Imports no torch."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from slurm.history import (
    BLAMES_TO_EXCLUDE,
    Attempt,
    History,
    Mark,
    read_blamed,
    read_history,
    read_job,
    read_mark,
    read_sweep,
)
from slurm.jobs import Answer, ask
from slurm.progress import Progress, read_progress
from slurm.queue import UNKNOWN, JobState
from trainer.checkpoint.layout import MANIFEST, RunDir

SECONDS_TO_LOAD = 1800.0  # 70B from a slow file system; longer without a step is worth a word
CLOCKS_APART = 120.0  # seconds that hosts and slurmctld may differ by
# Reasons to wait that no waiting ends, and what does.
NEVER = {
    "BadConstraints": "no node is what the run's slurm section asks for",
    "DependencyNeverSatisfied": "the job it follows failed",
    "JobHeldAdmin": "an administrator holds it",
    "JobHeldUser": "it is held: scontrol release",
    "PartitionDown": "its partition is down",
    "PartitionInactive": "its partition takes no jobs",
    "PartitionNodeLimit": "it asks for more nodes than its partition gives a job",
    "PartitionTimeLimit": "slurm.time is above its partition's limit",
}


@dataclass(frozen=True)
class Follower:
    """A job of `submit --then`.

    Attributes:
        log: what it prints.
    """

    command: str
    job: JobState
    log: str

    @property
    def text(self) -> str:
        """For people: where it stands, and its log where there is one."""
        waits = f" ({self.job.reason})" if self.job.is_waiting and self.job.reason else ""
        log = f", log {self.log}" if os.path.exists(self.log) else ""
        return f"job {self.job.job_id} {self.job.text}{waits}{log}"


@dataclass(frozen=True)
class RunStatus:
    """One run.

    Attributes:
        state: waiting, starting, running, stopping, requeued, done, failed, cancelling, cancelled, stopped (a local run
            that may go on), lost (its job is gone and the run did not say why), or unknown.
        detail: why, in words; may be empty.
        job: None where it was not submitted.
        gpu_hours: of all starts.
        blamed: how often each node was at fault.
        saved_step: of the newest checkpoint; None without one.
        warnings: what somebody should look at.
    """

    run_dir: Path
    state: str
    detail: str
    record: Mapping[str, Any]
    submission: Mapping[str, Any]
    job: JobState | None
    progress: Progress
    history: History
    gpu_hours: float
    blamed: dict[str, int]
    saved_step: int | None
    then: list[Follower]
    warnings: list[str]

    @property
    def nodes(self) -> str:
        """Where it runs; empty while it does not."""
        if self.state not in ("running", "starting", "stopping", "cancelling") or not self.job:
            return ""
        return self.job.nodes or (self.history.attempts[-1].nodes if self.history.attempts else "")

    @property
    def trouble(self) -> str:
        """Why SLURM could not be asked; empty where it could, or need not be."""
        return self.job.reason if self.job and self.job.state == UNKNOWN and not self.job.answered else ""

    @property
    def excluded(self) -> list[str]:
        """Nodes that were at fault too often to be used again."""
        return sorted(node for node, times in self.blamed.items() if times >= BLAMES_TO_EXCLUDE)

    @property
    def step(self) -> int:
        return max(self.progress.step, self.saved_step or 0)

    @property
    def eta_seconds(self) -> float | None:
        """Seconds of training that remain, while it trains."""
        return self.progress.eta_seconds if self.state == "running" else None


@dataclass(frozen=True)
class SweepStatus:
    """A sweep: its runs, the lowest validation loss first, and what is varied in each."""

    folder: Path
    fields: list[str]
    values: list[dict[str, str]]
    runs: list[RunStatus] = field(default_factory=list)

    @property
    def gpu_hours(self) -> float:
        return sum(run.gpu_hours for run in self.runs)

    def count(self) -> dict[str, int]:
        """Runs by state, the commonest first."""
        counts: dict[str, int] = {}
        for run in self.runs:
            counts[run.state] = counts.get(run.state, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))


def read_statuses(folders: Sequence[Path]) -> list[RunStatus | SweepStatus]:
    """The status of each folder, of a run or a sweep; SLURM is asked once for all."""
    sweeps = {folder: sweep for folder in folders if (sweep := read_sweep(folder))}
    runs = {folder: [folder] for folder in folders} | {
        folder: [folder / str(run["run_dir"]) for run in sweep["runs"]] for folder, sweep in sweeps.items()
    }
    answer = ask(run_dir for run_dirs in runs.values() for run_dir in run_dirs)
    now = time.time()
    found: list[RunStatus | SweepStatus] = []
    for folder in folders:
        statuses = [read_run(run_dir, answer, now) for run_dir in runs[folder]]
        if folder not in sweeps:
            found += statuses
            continue
        values = [run.get("values", {}) for run in sweeps[folder]["runs"]]
        ranked = sorted(zip(statuses, values, strict=True), key=lambda pair: _rank(pair[0]))
        found.append(
            SweepStatus(
                folder, sweeps[folder]["fields"], [value for _, value in ranked], [status for status, _ in ranked]
            )
        )
    return found


def read_run(run_dir: Path, answer: Answer, now: float) -> RunStatus:
    """The status of one run, by SLURM's answer of a moment ago."""
    run, submission, history = RunDir(run_dir), read_job(run_dir), read_history(run_dir)
    job = answer.of(submission, submission["job_id"]) if submission else None
    record, progress = run.read_state(), read_progress(run)
    state, detail = reconcile(record, job, read_mark(run_dir), history)
    saved = run.steps()
    status = RunStatus(
        run_dir=run_dir,
        state=state,
        detail=detail,
        record=record,
        submission=submission,
        job=job,
        progress=progress,
        history=history,
        gpu_hours=_gpu_hours(run, submission, history, job, now),
        blamed=read_blamed(run_dir),
        saved_step=saved[-1] if saved else None,
        then=[
            Follower(
                str(follower.get("command")),
                answer.of(submission, str(follower["job_id"])),
                str(follower.get("log", "")),
            )
            for follower in submission.get("then", [])
        ],
        warnings=[],
    )
    status.warnings.extend(_warnings(status, now))
    return status


def reconcile(record: Mapping[str, Any], job: JobState | None, mark: Mark | None, history: History) -> tuple[str, str]:
    """One state out of three witnesses: ``state.json``, SLURM, and the mark of `packtrain cancel`.

    A job that SLURM still has counts more than what an earlier start wrote down; a run that says how it ended counts
    more than how SLURM calls the end of its job.

    Returns:
        The state (see `RunStatus`), and why.
    """
    said, reason = str(record.get("state", "")), str(record.get("reason") or "")
    if said == "done":
        return "done", reason
    if job is None:
        return {"preempted": "stopped", "": "unknown"}.get(said, said), reason
    if job.is_waiting:
        return _reconcile_waiting(job, mark, bool(history.num_recent))
    if job.is_alive:
        return _reconcile_running(said, reason, job, mark, history)
    if said in ("failed", "cancelled"):
        return said, reason
    if mark and job.is_gone:
        return "cancelled", "packtrain cancel"
    if not job.answered:
        return {"preempted": "requeued", "": "unknown"}.get(said, said), "by the run dir alone"
    how = f"job {job.job_id} ended as {job.state}" if job.state != UNKNOWN else f"job {job.job_id}: {job.reason}"
    if not history.num_recent:
        return "lost", f"{how} before it wrote a word: do the nodes share the file system of this folder?"
    return "lost", f"{how}; submit it again to go on"


def _reconcile_waiting(job: JobState, mark: Mark | None, has_run: bool) -> tuple[str, str]:
    if mark:
        return "cancelling", "its job waits, and will not start"
    state = "requeued" if has_run or job.restarts else "waiting"
    when = f", expected to start {clock(job.start)}" if job.start else ""
    return state, f"{job.reason or 'in the queue'}{when}"


def _reconcile_running(said: str, reason: str, job: JobState, mark: Mark | None, history: History) -> tuple[str, str]:
    if mark:
        return "cancelling", "its job is being ended" if mark.now else "it saves a checkpoint and stops"
    current = history.attempts[-1] if history.attempts else None
    if job.state == "COMPLETING" or (current and current.end is not None):
        return "stopping", f"job {job.job_id} is {job.state}"
    if said == "running" and current:
        return "running", reason
    if said == "failed" and current:  # the others of its job are about to end
        return "stopping", reason
    return "starting", "" if job.state == "RUNNING" else f"job {job.job_id} is {job.state}"


def _gpu_hours(run: RunDir, submission: Mapping[str, Any], history: History, job: JobState | None, now: float) -> float:
    """Of all starts. One that died with its node ended, as far as can be known, when it last wrote something."""
    num_gpus = int(submission.get("nodes", 0)) * int(submission.get("gpus_per_node", 0))
    seconds = 0.0
    for attempt, following in zip_longest(history.attempts, history.attempts[1:]):
        seconds += max(0.0, _end(attempt, following, run, job, now) - attempt.start)
    return num_gpus * seconds / 3600


def _end(attempt: Attempt, following: Attempt | None, run: RunDir, job: JobState | None, now: float) -> float:
    if attempt.end is not None:
        return attempt.end
    if following is None and job is not None:
        if job.is_alive and not job.is_waiting:
            return now
        if job.start and job.elapsed and abs(job.start - attempt.start) < CLOCKS_APART:
            return job.start + job.elapsed
    until = following.start if following else now
    written = [run.metrics, run.state, *(run.step_dir(step) / MANIFEST for step in run.steps())]
    times = [path.stat().st_mtime for path in written if path.exists()]
    return max((time for time in times if attempt.start <= time <= until), default=attempt.start)


def _warnings(status: RunStatus, now: float) -> list[str]:
    found = []
    job, progress = status.job, status.progress
    if status.state == "running":
        started = float(status.record.get("started", now))
        if progress.step and (progress.written or 0.0) > started:
            if quiet := progress.quiet_seconds(now):
                found.append(f"no step for {duration(quiet)}")
        elif now - started > SECONDS_TO_LOAD:
            found.append(f"no step since its start {duration(now - started)} ago")
    if job and job.is_waiting and (never := NEVER.get(job.reason)):
        found.append(f"waits for ever: {never}")
    if status.excluded:
        found.append(f"no longer used: {', '.join(status.excluded)}")
    left = int(status.submission.get("max_restarts", 100)) - status.history.restarts
    if job and job.is_alive and status.history.restarts and left <= 2:
        found.append(f"{left} restart{'s' * (left != 1)} left (slurm.max_restarts)")
    for follower in status.then:
        if follower.job.is_waiting and (never := NEVER.get(follower.job.reason)):
            found.append(f"{follower.command} waits for ever: {never}")
        elif follower.job.is_gone and follower.job.state not in ("COMPLETED", UNKNOWN, "CANCELLED"):
            found.append(f"{follower.command} ended as {follower.job.state}: {follower.log}")
    return found


def _rank(status: RunStatus) -> tuple[bool, float]:
    loss = status.progress.best_validation_loss
    if loss is None and status.state == "done":
        loss = status.progress.loss
    return loss is None, loss or 0.0


def clock(when: float) -> str:
    """A time of day, with its date where that is not today."""
    local, today = time.localtime(when), time.localtime()
    form = "%H:%M" if local[:3] == today[:3] else "%d %b %H:%M" if local[0] == today[0] else "%Y-%m-%d %H:%M"
    return time.strftime(form, local)


def duration(seconds: float) -> str:
    """Two parts at most: 48 s, 12 min, 3 h 05 min, 2 d 04 h."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24:02d} h"
