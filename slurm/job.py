"""What a job's task runs, on a compute node: the code of the moment of submission, and nothing from elsewhere.

submitit unpickles a reference to `run_task` and the path of a run dir. Its own signal handlers would requeue from
inside a rank, one alone; so Python is replaced by a fresh one, which has none.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from trainer.preemption import STOP_SIGNALS

SUBMISSION = "PACKTRAIN_SUBMISSION"  # set by the job's script
DATA = "data"  # of a submission: the fingerprint of each task's data, a line each


def run_task(run_dir: str) -> None:
    """Becomes ``python -m trainer`` of this submission. Does not return."""
    # They wait until the trainer has handlers for them: importing torch takes longer than some grace times.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    submission = Path(os.environ[SUBMISSION])
    task = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))
    data = (submission / DATA).read_text().splitlines()[task]
    recipe = submission / "recipes" / f"{task}.yaml"
    _become("-m", "trainer", str(recipe), "--run-dir", run_dir, "--data-fingerprint", data)


def run_command(run_dir: str, command: str, *arguments: str) -> None:
    """Becomes ``packtrain COMMAND RUN_DIR`` of this submission. Does not return."""
    _become("-m", "launch.cli", command, run_dir, *arguments)


def _become(*arguments: str) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    for number in (*STOP_SIGNALS, signal.SIGCONT):
        signal.signal(number, signal.SIG_DFL)  # an ignored one would stay so
    os.execv(sys.executable, [sys.executable, "-P", "-u", *arguments])
