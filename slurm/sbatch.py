"""Queueing jobs: sbatch, by submitit, and its verdict before."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from submitit import Job, SlurmExecutor

from slurm.cluster import SlurmError
from trainer.errors import PacktrainError, UserError


def ask_sbatch(script: str) -> str:
    """SLURM's verdict on a job: when and where it would start. Queues nothing.

    Raises:
        UserError: it would refuse the job.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        shell = subprocess.run(["bash", "-n", file.name], capture_output=True, text=True, check=False)
        if shell.returncode:
            said = shell.stderr.replace(f"{file.name}: ", "").strip()
            raise UserError(
                "slurm.setup", f"is no valid shell: {said}", fix="mend its quotes; --dry-run shows the script"
            )
        command = ["sbatch", "--test-only", file.name]
        try:
            found = subprocess.run(command, capture_output=True, text=True, timeout=30, errors="replace")
        except subprocess.TimeoutExpired as error:
            raise SlurmError(command, None, "") from error
    said = " ".join(found.stderr.split()).replace("sbatch: ", "")
    if found.returncode:
        fix = "correct the slurm section of the recipe, or the cluster's profile"
        raise UserError("slurm", f"SLURM would refuse the job: {said}", fix=fix)
    return said


def queue(executor: SlurmExecutor, function: Any, arguments: Sequence[tuple[str, ...]]) -> list[Job[Any]]:
    """One job, or an array where there are several."""
    try:
        if len(arguments) == 1:
            return [executor.submit(function, *arguments[0])]
        with executor.batch():
            jobs = [executor.submit(function, *one) for one in arguments]
        return jobs
    except (RuntimeError, OSError) as error:  # submitit's own errors derive from these
        raise PacktrainError(f"sbatch refused the job: {' '.join(str(error).split())}") from error


def array_of(job_id: str) -> str:
    """The whole array of a task of it; a job by itself is its own."""
    return job_id.partition("_")[0]


@contextlib.contextmanager
def cancelled_if_interrupted(queued: list[str]) -> Iterator[None]:
    """A chain is queued whole or not at all, also where the terminal is closed meanwhile."""

    def interrupt(number: int, _: object) -> None:
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    except BaseException:
        for job_id in queued:
            subprocess.run(["scancel", job_id], capture_output=True, check=False)
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
