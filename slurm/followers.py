"""What follows a run: merge, verify and the like, each a job of its own that waits for the one before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm.history import read_followed, read_job
from slurm.job import run_command
from slurm.jobs import Answer, follower_ids
from slurm.sbatch import array_of, queue
from slurm.script import command_script
from trainer.config import SlurmConfig


@dataclass(frozen=True)
class Missing:
    """Runs that are done, and what was to follow them and has not: it failed, or was cancelled."""

    run_dirs: list[Path]
    commands: list[str]

    @property
    def text(self) -> str:
        """For people."""
        runs = f"{self.run_dirs[0].name} is" if len(self.run_dirs) == 1 else f"{len(self.run_dirs)} runs are"
        return f"{runs} done; {' and '.join(self.commands)} {'is' if len(self.commands) == 1 else 'are'} to follow"


def find_missing(run_dirs: Sequence[Path], then: Sequence[str], answer: Answer) -> list[Missing]:
    """Of submitted runs that are done; runs that miss the same are together, as one array.

    Args:
        then: commands that are asked for.
        answer: of SLURM, about these runs' jobs.
    """
    alike: dict[tuple[str, ...], list[Path]] = {}
    for run_dir in run_dirs:
        job = read_job(run_dir)
        is_queued = any(answer.of(job, job_id).is_alive for job_id in follower_ids(job))
        missing = tuple(command for command in then if command not in read_followed(run_dir))
        if job and missing and not is_queued:
            alike.setdefault(missing, []).append(run_dir)
    return [Missing(found, list(commands)) for commands, found in alike.items()]


def queue_followers(
    slurm: SlurmConfig,
    name: str,
    submission: Path,
    run_dirs: Sequence[Path],
    commands: Sequence[str],
    queued: list[str],
) -> Iterator[list[dict[str, str]]]:
    """Queues one command after another for all runs; yields each command's jobs, one a run, for `job.json`.

    Args:
        queued: jobs and arrays before them, whose last one the first command waits for; theirs are added.

    Raises:
        PacktrainError: SLURM refused.
    """
    for command in commands:
        after = queued[-1] if queued else None
        executor = command_script(slurm, name, command, submission, after, len(run_dirs))
        jobs = queue(executor, run_command, [_arguments(command, run_dir) for run_dir in run_dirs])
        queued.append(array_of(jobs[0].job_id))
        ids = [str(job.job_id) for job in jobs]
        yield [{"command": command, "job_id": one, "log": _log(submission, one)} for one in ids]


def _arguments(command: str, run_dir: Path) -> tuple[str, ...]:
    further = ("--json", str(run_dir / "evaluation.json")) if command == "evaluate" else ()
    return (str(run_dir), command, *further)


def _log(submission: Path, job_id: str) -> str:
    """What the command's one process prints."""
    return str(submission / "script" / f"{job_id}_0_log.out")
