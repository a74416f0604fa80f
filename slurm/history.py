"""What submissions and their jobs leave in a run dir, read back. Imports no torch.

job.json          the newest submission
attempts.jsonl    a line at each submission, at start and end of each of the job's starts, at the end of what follows
blamed            a host a line, each time it was at fault
cancelled         mark of `packtrain cancel`: no start and no requeue passes it
sweep.json        in the folder of a sweep: what is varied, and its runs
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.checkpoint.layout import RunDir
from trainer.errors import UserError

SWEEP, ATTEMPTS, BLAMED, CANCELLED = "sweep.json", "attempts.jsonl", "blamed", "cancelled"
BLAMES_TO_EXCLUDE = 2  # as in batch.sh
MOST_LEVELS = 4  # of folders that are looked through for runs


@dataclass(frozen=True)
class Attempt:
    """One start of the job.

    Attributes:
        start: seconds since 1970.
        first_step: of the checkpoint it began with, 0 without one.
        end: None while it runs, and where it died with its node before it could say so.
        last_step: of the newest checkpoint at its end.
        state: what the run said at its end.
        action: requeue, finish or give up.
        why: of the action, where there is more to say.
    """

    start: float
    job_id: str
    restart: int
    nodes: str
    first_step: int
    end: float | None = None
    last_step: int | None = None
    status: int | None = None
    state: str = ""
    action: str = ""
    why: str = ""


@dataclass(frozen=True)
class History:
    """All starts of a run, and how many of them since it was submitted last."""

    attempts: list[Attempt]
    num_recent: int

    @property
    def restarts(self) -> int:
        """How often the newest submission was queued again and started."""
        return max(0, self.num_recent - 1)


@dataclass(frozen=True)
class Mark:
    """A run was cancelled; `now`: without waiting for a checkpoint."""

    now: bool


def read_job(run_dir: Path) -> dict[str, Any]:
    """``job.json``; empty where the run was not submitted, or something else has written in it."""
    job = _read_dict(RunDir(run_dir).job)
    then = job.get("then", [])
    is_whole = (
        isinstance(job.get("job_id"), str)
        and isinstance(job.get("submission"), str)
        and isinstance(job.get("submitted", 0.0), int | float)
        and isinstance(then, list)
        and all(isinstance(one, dict) and {"command", "job_id"} <= one.keys() for one in then)
    )
    return job if is_whole else {}


def read_sweep(folder: Path) -> dict[str, Any]:
    """``sweep.json`` with ``fields`` and ``runs``; empty where the folder is no sweep's."""
    sweep = _read_dict(folder / SWEEP)
    runs = sweep.get("runs")
    is_whole = (
        isinstance(sweep.get("fields"), list)
        and isinstance(runs, list)
        and all(isinstance(run, dict) and isinstance(run.get("run_dir"), str) for run in runs)
    )
    return sweep if is_whole else {}


def read_history(run_dir: Path) -> History:
    """``attempts.jsonl``; a line that was cut off by a full disk is left out."""
    attempts: list[Attempt] = []
    num_before = 0
    for record in _read_lines(run_dir / ATTEMPTS):
        event = record.get("event")
        with contextlib.suppress(KeyError, TypeError, ValueError):  # written by something else
            if event == "submit":
                num_before = len(attempts)
            elif event == "start":
                attempts.append(_start(record))
            elif event == "end" and attempts and _is_end_of(record, attempts[-1]):
                attempts[-1] = _ended(attempts[-1], record)
    return History(attempts, len(attempts) - num_before)


def read_followed(run_dir: Path) -> set[str]:
    """Commands that have followed the run's newest start, and succeeded."""
    found: set[str] = set()
    for record in _read_lines(run_dir / ATTEMPTS):
        if record.get("event") == "start":
            found = set()
        elif record.get("event") == "followed" and record.get("status") == 0:
            found.add(str(record.get("command")))
    return found


def _start(record: dict[str, Any]) -> Attempt:
    return Attempt(
        float(record["time"]),
        str(record.get("job_id", "")),
        int(record.get("restart", 0)),
        str(record.get("nodes", "")),
        int(record.get("step", 0)),
    )


def _ended(attempt: Attempt, record: dict[str, Any]) -> Attempt:
    return replace(
        attempt,
        end=float(record["time"]),
        last_step=record.get("step"),
        status=record.get("status"),
        state=str(record.get("state", "")),
        action=str(record.get("action", "")),
        why=str(record.get("why", "")),
    )


def read_blamed(run_dir: Path) -> dict[str, int]:
    """How often each node was at fault."""
    try:
        text = (run_dir / BLAMED).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return dict(Counter(line.strip() for line in text.splitlines() if line.strip()))


def read_mark(run_dir: Path) -> Mark | None:
    """The mark of `packtrain cancel`, where it is there."""
    path = run_dir / CANCELLED
    return Mark(now=_read_dict(path).get("now") is True) if path.exists() else None


def is_run(folder: Path) -> bool:
    """Whether a run, submitted or not, has written here."""
    run = RunDir(folder)
    return any(path.exists() for path in (run.job, run.state, run.metrics, run.recipe))


def find_submitted(folder: Path) -> list[Path]:
    """Runs and sweeps that were submitted, in `folder` and below, the newest first. A sweep's runs are left out."""
    found = list(_walk(folder, MOST_LEVELS))
    return sorted(found, key=_submitted, reverse=True)


def check_run(folder: Path) -> None:
    """For commands about one run.

    Raises:
        UserError: `folder` is not there, is a sweep's, or no run has written in it.
    """
    if sweep := read_sweep(folder):
        names = [str(folder / run["run_dir"]) for run in sweep["runs"]]
        found = f"{folder} is a sweep of {len(names)} run{'s' * (len(names) != 1)}"
        raise UserError("RUN_DIR", found, "one of them: " + ", ".join(names[:3]))
    if not is_run(folder):
        missing = "no such folder" if not folder.is_dir() else "no run has written in this folder"
        raise UserError("RUN_DIR", f"{folder}: {missing}", "the folder of a run")


def _is_end_of(record: dict[str, Any], attempt: Attempt) -> bool:
    """A job that was cancelled before it started anything ends without a start."""
    return attempt.end is None and record.get("restart", attempt.restart) == attempt.restart


def _walk(folder: Path, levels: int) -> Iterator[Path]:
    try:
        if (folder / SWEEP).exists() or RunDir(folder).job.exists():
            yield folder
        elif levels and not RunDir(folder).state.exists():
            for entry in sorted(folder.iterdir()):
                if entry.is_dir() and not entry.name.startswith("."):
                    yield from _walk(entry, levels - 1)
    except OSError:  # another user's
        return


def _submitted(folder: Path) -> float:
    if sweep := read_sweep(folder):
        times = [read_job(folder / str(run.get("run_dir"))).get("submitted", 0.0) for run in sweep["runs"]]
        return float(max(times, default=0.0))
    return float(read_job(folder).get("submitted", 0.0))


def _read_dict(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("time"), int | float):
            yield record
