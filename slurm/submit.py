"""submit(): from a recipe to queued jobs. Everything that can be wrong is looked at before anything is queued."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from submitit import Job, SlurmExecutor

from slurm.checks import GPUS_USED, check_home, check_request, check_strategy, check_then
from slurm.cluster import SlurmError, SlurmMissing, cluster_name, read_cluster
from slurm.history import ATTEMPTS, BLAMED, CANCELLED, SWEEP, read_job, read_sweep
from slurm.job import run_command, run_task
from slurm.jobs import ask
from slurm.script import command_script, script_text, training_script
from slurm.snapshot import (
    check_not_submitting,
    new_submission,
    next_submission,
    submitting,
    take_snapshot,
    with_absolute_paths,
)
from slurm.sweep import Variation
from trainer.checkpoint.layout import RunDir, write_atomically
from trainer.config import RunConfig, SlurmConfig
from trainer.errors import PacktrainError, UserError
from trainer.resume import check_nobody_trains, check_recipe_unchanged


@dataclass(frozen=True)
class Plan:
    """What is to be queued.

    Attributes:
        home: folder of the run, or of the sweep.
        slurm: what all runs ask for.
        configs: one for each run that is to be queued.
        run_dirs: likewise; none where every run of a sweep is done or queued already.
        then: commands that follow each run, in their order.
        variations: all runs of the sweep; empty for a run by itself.
        submission: the folder that will hold what the jobs need.
    """

    home: Path
    slurm: SlurmConfig
    configs: list[RunConfig]
    run_dirs: list[Path]
    then: list[str]
    variations: list[Variation]
    submission: Path

    @property
    def name(self) -> str:
        return self.home.name

    @property
    def gpu_hours(self) -> float:
        """At most, for one start of every run."""
        slurm = self.slurm
        return len(self.run_dirs) * slurm.nodes * slurm.gpus_per_node * slurm.minutes / 60

    @property
    def executor(self) -> SlurmExecutor:
        return training_script(self.slurm, self.name, self.submission)

    @property
    def script(self) -> str:
        """Exactly what sbatch gets."""
        return script_text(self.executor, len(self.run_dirs))


@dataclass
class Submitted:
    """What was queued; `job.json` of a run dir.

    Attributes:
        job_id: of the run; of an array such as ``12_3``.
        cluster: that it was submitted on; empty where SLURM does not tell.
        then: ``{"command": ..., "job_id": ...}`` for each command that follows.
    """

    job_id: str
    cluster: str
    name: str
    submission: str
    submitted: float
    nodes: int
    gpus_per_node: int
    tasks_per_node: int
    time_minutes: int
    partition: str | None
    max_restarts: int
    then: list[dict[str, str]] = field(default_factory=list)


def plan(configs: Sequence[RunConfig], home: Path, variations: Sequence[Variation], then: Sequence[str]) -> Plan:
    """Looks at everything that needs neither data nor model, in a second or two and without torch.

    Args:
        configs: one for each variation, or just one.
        home: run dir, or the sweep's folder, which gets a run dir for each variation.
        then: commands that follow.

    Raises:
        UserError: something is wrong with what is asked for; nothing was written.
        SlurmError: SLURM does not answer.
    """
    home = Path(os.path.abspath(home.expanduser()))  # without .., whose folder may go; links stay, nodes may differ
    if not shutil.which("srun"):  # submitit asks for it, too
        raise SlurmMissing("srun")
    check_home(home, is_sweep=bool(variations))
    check_then(configs[0], then)
    slurm = configs[0].slurm
    check_request(slurm, read_cluster(), then)
    check_not_submitting(home)
    run_dirs = [home / variation.name for variation in variations] or [home]
    open_runs = _not_queued(run_dirs)
    if not variations and not open_runs:
        job_id = read_job(home)["job_id"]
        raise UserError(
            str(home), f"job {job_id} has this run", fix="packtrain cancel ends it; packtrain status shows it"
        )
    open_runs = [index for index in open_runs if RunDir(run_dirs[index]).read_state().get("state") != "done"]
    chosen = []
    for index in open_runs:
        check_strategy(configs[index])
        chosen.append(with_absolute_paths(configs[index]))
        check_recipe_unchanged(RunDir(run_dirs[index]), chosen[-1])
        if run_dirs[index].exists():
            check_nobody_trains(RunDir(run_dirs[index]))
    return Plan(
        home=home,
        slurm=slurm,
        configs=chosen,
        run_dirs=[run_dirs[index] for index in open_runs],
        then=list(then),
        variations=list(variations),
        submission=next_submission(home),
    )


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


def submit(plan: Plan) -> list[Submitted]:
    """Queues the runs, and what follows them.

    Raises:
        PacktrainError: SLURM refused; nothing is queued, or what was is cancelled.
    """
    submission = new_submission(plan.home, plan.submission)
    with submitting(plan.home):
        return _submit(plan, submission)


def _submit(plan: Plan, submission: Path) -> list[Submitted]:
    for run_dir in plan.run_dirs:
        run_dir.mkdir(parents=True, exist_ok=True)
        run_dir.chmod(0o700)
    try:
        take_snapshot(submission, plan.configs, plan.run_dirs)
    except shutil.Error as error:  # one entry a file
        _, _, why = error.args[0][0]
        raise PacktrainError(f"{submission}: cannot be written: {why}") from error
    for run_dir in plan.run_dirs:
        _start_afresh(RunDir(run_dir))
    if plan.variations:
        _note_sweep(plan.home, plan.variations)
    slurm, cluster = plan.slurm, cluster_name()
    queued: list[str] = []
    with _cancelled_if_interrupted(queued):
        jobs = _queue(plan.executor, run_task, [(str(run_dir),) for run_dir in plan.run_dirs])
        queued.append(_array_of(jobs[0].job_id))
        told = [
            Submitted(
                job_id=job.job_id,
                cluster=cluster,
                name=plan.name,
                submission=str(submission),
                submitted=time.time(),
                nodes=slurm.nodes,
                gpus_per_node=slurm.gpus_per_node,
                tasks_per_node=slurm.tasks_per_node,
                time_minutes=slurm.minutes,
                partition=slurm.partition,
                max_restarts=slurm.max_restarts,
            )
            for job in jobs
        ]
        _note_jobs(plan.run_dirs, told)
        for command in plan.then:
            num_gpus = GPUS_USED[command] if slurm.gpus_per_node else 0
            name = f"{plan.name}-{command}"
            executor = command_script(slurm, name, submission, num_gpus, queued[-1], len(plan.run_dirs))
            following = _queue(executor, run_command, [_arguments(command, run_dir) for run_dir in plan.run_dirs])
            queued.append(_array_of(following[0].job_id))
            for one, job in zip(told, following, strict=True):
                one.then.append({"command": command, "job_id": job.job_id})
            _note_jobs(plan.run_dirs, told)
    return told


def _note_jobs(run_dirs: Sequence[Path], told: Sequence[Submitted]) -> None:
    """``job.json`` of each run: whoever asks for its status or cancels it finds the jobs there."""
    for run_dir, one in zip(run_dirs, told, strict=True):
        write_atomically(RunDir(run_dir).job, json.dumps(asdict(one), indent=1) + "\n")


def _queue(executor: SlurmExecutor, function: Any, arguments: Sequence[tuple[str, ...]]) -> list[Job[Any]]:
    """One job, or an array where there are several."""
    try:
        if len(arguments) == 1:
            return [executor.submit(function, *arguments[0])]
        with executor.batch():
            jobs = [executor.submit(function, *one) for one in arguments]
        return jobs
    except (RuntimeError, OSError) as error:  # submitit's own errors derive from these
        raise PacktrainError(f"sbatch refused the job: {' '.join(str(error).split())}") from error


@contextlib.contextmanager
def _cancelled_if_interrupted(queued: list[str]) -> Iterator[None]:
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


def _not_queued(run_dirs: Sequence[Path]) -> list[int]:
    """Which runs SLURM does not have, waiting or running."""
    answer, jobs = ask(run_dirs), [read_job(run_dir) for run_dir in run_dirs]
    return [index for index, job in enumerate(jobs) if not (job and answer.of(job, job["job_id"]).is_alive)]


def _note_sweep(home: Path, variations: Sequence[Variation]) -> None:
    """``sweep.json``: what is varied, and the runs; those of earlier submissions stay."""
    earlier = read_sweep(home) or {"fields": [], "runs": []}
    runs = {run["run_dir"]: run for run in earlier["runs"]}
    runs |= {one.name: {"run_dir": one.name, "values": one.values} for one in variations}
    fields = [*dict.fromkeys([*earlier["fields"], *variations[0].values])]
    write_atomically(home / SWEEP, json.dumps({"fields": fields, "runs": list(runs.values())}, indent=1) + "\n")


def _array_of(job_id: str) -> str:
    return job_id.partition("_")[0]


def _arguments(command: str, run_dir: Path) -> tuple[str, ...]:
    further = ("--json", str(run_dir / "evaluation.json")) if command == "evaluate" else ()
    return (str(run_dir), command, *further)


def _start_afresh(run: RunDir) -> None:
    """Whoever submits again wants the run to go on: a cancellation is over, and so are the counts of what failed."""
    for name in (CANCELLED, BLAMED):
        (run.path / name).unlink(missing_ok=True)
    if run.read_state().get("state") in ("failed", "cancelled"):
        run.state.unlink()  # attempts.jsonl has it
    with open(run.path / ATTEMPTS, "a", encoding="utf-8") as file:
        file.write(json.dumps({"event": "submit", "time": int(time.time())}, separators=(",", ":")) + "\n")
