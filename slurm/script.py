"""The job's script: what sbatch gets, by submitit. The shell around srun is `batch.sh`."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor

from slurm.job import SUBMISSION
from trainer.config import SlurmConfig

# Where caches lie must be the same on the nodes as here, where data and base were put into them.
PASSED_ON = ("PACKTRAIN_CACHE", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "OMP_NUM_THREADS")
CPU_MINUTES = 24 * 60
GPUS_USED = {"merge": 0, "verify": 0, "evaluate": 1, "report": 0}  # commands that may follow, one process each


def training_script(slurm: SlurmConfig, name: str, submission: Path) -> SlurmExecutor:
    """An executor whose jobs train: one task a GPU, told before the time limit, queued again by their own shell.

    Args:
        name: of the run.
        submission: folder of this submission, there or not yet.
    """
    executor = _executor(slurm, submission)
    executor.update_parameters(
        **_asked(slurm, name, slurm.partition),
        nodes=slurm.nodes,
        ntasks_per_node=slurm.tasks_per_node,
        cpus_per_task=slurm.cpus_per_gpu,
        gpus_per_node=_gpus(slurm, slurm.gpus_per_node),
        mem=slurm.memory,
        exclusive=True if slurm.exclusive else None,
        constraint=slurm.constraint,
        time=slurm.minutes,
        signal_delay_s=slurm.stop_seconds,
        setup=[*_setup(slurm, submission), "begin", *_own_setup(slurm)],
        teardown=["end $?"],
        srun_args=_srun_arguments(slurm),
        additional_parameters={"requeue": True, **_further(slurm, submission)},
    )
    return executor


def command_script(
    slurm: SlurmConfig, name: str, command: str, submission: Path, after: str | None, num_tasks: int
) -> SlurmExecutor:
    """An executor whose jobs run one command in one process when the jobs before have succeeded, else never.

    Args:
        name: of the run.
        command: one of `GPUS_USED`.
        after: id of the job, or of the array of `num_tasks`, that has to come first; None: nothing has to.
    """
    executor = _executor(slurm, submission)
    num_gpus = GPUS_USED[command] if slurm.gpus_per_node else 0
    partition = slurm.partition if num_gpus else slurm.cpu_partition or slurm.partition
    kind = "aftercorr" if num_tasks > 1 else "afterok"
    executor.update_parameters(
        **_asked(slurm, f"{name}-{command}", partition),
        nodes=1,
        ntasks_per_node=1,
        cpus_per_task=slurm.cpus_per_gpu,
        gpus_per_node=_gpus(slurm, num_gpus),
        mem=slurm.memory,
        constraint=slurm.constraint if num_gpus else None,
        time=min(slurm.minutes, CPU_MINUTES),
        dependency=f"{kind}:{after}" if after else None,
        setup=[*_setup(slurm, submission), "check_not_cancelled", *_own_setup(slurm)],
        teardown=[f"followed {command} $?"],
        srun_args=_srun_arguments(slurm),
        additional_parameters={"requeue": True, "kill-on-invalid-dep": "yes", **_further(slurm, submission)},
    )
    return executor


def script_text(executor: SlurmExecutor, num_tasks: int = 1) -> str:
    """What sbatch gets, for an array of so many tasks."""
    whole = SlurmExecutor(executor.folder)
    whole.update_parameters(**executor.parameters)
    if num_tasks > 1:
        whole.parameters["map_count"] = num_tasks
    return whole._make_submission_file_text(executor._submitit_command_str, "")


def job_name(text: str) -> str:
    """`text` as a job's name: letters, digits and ``._=,-``."""
    return re.sub(r"[^\w.=,-]+", "-", text, flags=re.ASCII).strip("-") or "run"


def _executor(slurm: SlurmConfig, submission: Path) -> SlurmExecutor:
    return SlurmExecutor(submission / "script", python=slurm.python or shlex.quote(sys.executable))


def _asked(slurm: SlurmConfig, name: str, partition: str | None) -> dict[str, Any]:
    return {
        "job_name": f"packtrain-{job_name(name)}",
        "partition": partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "exclude": ",".join(slurm.exclude) or None,
        "stderr_to_stdout": True,
        "wckey": None,
    }


def _gpus(slurm: SlurmConfig, number: int) -> str | None:
    if not number:
        return None
    return f"{slurm.gpu_type}:{number}" if slurm.gpu_type else str(number)


def _further(slurm: SlurmConfig, submission: Path) -> dict[str, Any]:
    """The submitting folder may be gone when the job starts."""
    return {"chdir": str(submission), **{name: value for name, value in slurm.sbatch.items() if value is not False}}


def _srun_arguments(slurm: SlurmConfig) -> list[str]:
    # --wait=0: rank 0 merges and verifies while the others are done; a cluster's WaitTime would end it.
    arguments = ["--kill-on-bad-exit=1", "--wait=0", "--open-mode=append", "--distribution=block"]
    if slurm.cpus_per_gpu:  # srun no longer takes it over from sbatch
        arguments.append(f"--cpus-per-task={slurm.cpus_per_gpu}")
    return [*arguments, *slurm.srun_args]


def _setup(slurm: SlurmConfig, submission: Path) -> list[str]:
    """Shell that says where everything is, and brings `begin` and `end`."""
    variables = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    variables |= {"HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1", "PYTHONPATH": str(submission / "code")}
    return [
        f"SUBMISSION={shlex.quote(str(submission))}",
        f"MAX_RESTARTS={slurm.max_restarts} LIMIT_SECONDS={60 * slurm.minutes}",
        f"EXCLUDE={shlex.quote(','.join(slurm.exclude))}",
        *_exports({SUBMISSION: str(submission), **variables, **slurm.env}),
        'source "$SUBMISSION/code/slurm/batch.sh"',
    ]


def _own_setup(slurm: SlurmConfig) -> list[str]:
    """The user's shell lines; where one fails the job says which."""
    lines = [f"module load {shlex.quote(module)}" for module in slurm.modules] + slurm.setup
    checked = [part for line in lines for part in (line, f"check_setup $? {shlex.quote(line)}")]
    return [*checked, "set +eu"] if lines else []  # some activation scripts set them, and leave them set


def _exports(variables: Mapping[str, str]) -> list[str]:
    return [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
