"""submit(): from a recipe to queued jobs. Everything that can be wrong is looked at before anything is queued."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from submitit import SlurmExecutor

from slurm.checks import check_home, check_request, check_strategy, check_then
from slurm.cluster import SlurmMissing, cluster_name, read_cluster
from slurm.followers import Missing, find_missing, queue_followers
from slurm.history import ATTEMPTS, BLAMED, CANCELLED, SWEEP, read_job, read_sweep
from slurm.job import DATA, run_task
from slurm.jobs import ask
from slurm.sbatch import array_of, cancelled_if_interrupted, queue
from slurm.script import script_text, training_script
from slurm.snapshot import (
    check_not_submitting,
    make_submission,
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
        missing: those of them that have not followed runs which are done.
        variations: all runs of the sweep; empty for a run by itself.
        submission: the folder that will hold what the jobs need.
    """

    home: Path
    slurm: SlurmConfig
    configs: list[RunConfig]
    run_dirs: list[Path]
    then: list[str]
    missing: list[Missing]
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
        then: ``{"command": ..., "job_id": ..., "log": ...}`` for each command that follows.
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


def _without_merge(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"export": config.export.model_copy(update={"merge": False})})


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
    if "merge" in then:  # in a job of its own, without the GPUs
        configs = [_without_merge(config) for config in configs]
    slurm = configs[0].slurm
    check_request(slurm, read_cluster(), then)
    check_not_submitting(home)
    run_dirs = [home / variation.name for variation in variations] or [home]
    answer, jobs = ask(run_dirs), [read_job(run_dir) for run_dir in run_dirs]
    is_queued = [bool(job) and answer.of(job, job["job_id"]).is_alive for job in jobs]
    if not variations and is_queued[0]:
        found, fix = f"job {jobs[0]['job_id']} has this run", "packtrain cancel ends it; packtrain status shows it"
        if (home / CANCELLED).exists():
            found, fix = f"job {jobs[0]['job_id']} is being cancelled", "the same command again when it is gone"
        raise UserError(str(home), found, fix=fix)
    is_done = [RunDir(run_dir).read_state().get("state") == "done" for run_dir in run_dirs]
    open_runs = [index for index in range(len(run_dirs)) if not (is_queued[index] or is_done[index])]
    done = [run_dir for index, run_dir in enumerate(run_dirs) if is_done[index] and not is_queued[index]]
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
        missing=find_missing(done, then, answer),
        variations=list(variations),
        submission=next_submission(home),
    )


def submit(plan: Plan, data: Sequence[str]) -> list[Submitted]:
    """Queues the runs and what follows them, and what has not followed runs that are done.

    Args:
        data: fingerprint of each run's data; a job that finds other data does not train.

    Returns:
        what was queued of each of `plan.run_dirs`.

    Raises:
        PacktrainError: SLURM refused; nothing is queued, or what was is cancelled.
    """
    with submitting(plan.home):
        told = _submit(plan, data, make_submission(plan.submission)) if plan.run_dirs else []
        for missing in plan.missing:
            _follow_up(plan, missing, make_submission(next_submission(plan.home)))
    return told


def _submit(plan: Plan, data: Sequence[str], submission: Path) -> list[Submitted]:
    for run_dir in plan.run_dirs:
        run_dir.mkdir(parents=True, exist_ok=True)
        run_dir.chmod(0o700)
    try:
        take_snapshot(submission, plan.configs, plan.run_dirs)
        write_atomically(submission / DATA, "".join(f"{fingerprint}\n" for fingerprint in data))
    except shutil.Error as error:  # one entry a file
        _, _, why = error.args[0][0]
        raise PacktrainError(f"{submission}: cannot be written: {why}") from error
    for run_dir in plan.run_dirs:
        _start_afresh(RunDir(run_dir))
    if plan.variations:
        _note_sweep(plan.home, plan.variations)
    slurm, cluster = plan.slurm, cluster_name()
    queued: list[str] = []
    with cancelled_if_interrupted(queued):
        jobs = queue(plan.executor, run_task, [(str(run_dir),) for run_dir in plan.run_dirs])
        queued.append(array_of(jobs[0].job_id))
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
        for following in queue_followers(slurm, plan.name, submission, plan.run_dirs, plan.then, queued):
            for one, follower in zip(told, following, strict=True):
                one.then.append(follower)
            _note_jobs(plan.run_dirs, told)
    return told


def _follow_up(plan: Plan, missing: Missing, submission: Path) -> None:
    """Queues what has not followed runs that are done."""
    take_snapshot(submission, [], missing.run_dirs)
    runs = [RunDir(run_dir) for run_dir in missing.run_dirs]
    for run in runs:
        (run.path / CANCELLED).unlink(missing_ok=True)
    queued: list[str] = []
    with cancelled_if_interrupted(queued):
        for following in queue_followers(plan.slurm, plan.name, submission, missing.run_dirs, missing.commands, queued):
            for run, follower in zip(runs, following, strict=True):
                job = read_job(run.path)
                others = [one for one in job["then"] if one["command"] != follower["command"]]
                write_atomically(run.job, json.dumps(job | {"then": [*others, follower]}, indent=1) + "\n")


def _note_jobs(run_dirs: Sequence[Path], told: Sequence[Submitted]) -> None:
    """``job.json`` of each run: whoever asks for its status or cancels it finds the jobs there."""
    for run_dir, one in zip(run_dirs, told, strict=True):
        write_atomically(RunDir(run_dir).job, json.dumps(asdict(one), indent=1) + "\n")


def _note_sweep(home: Path, variations: Sequence[Variation]) -> None:
    """``sweep.json``: what is varied, and the runs; those of earlier submissions stay."""
    earlier = read_sweep(home) or {"fields": [], "runs": []}
    runs = {run["run_dir"]: run for run in earlier["runs"]}
    runs |= {one.name: {"run_dir": one.name, "values": one.values} for one in variations}
    fields = [*dict.fromkeys([*earlier["fields"], *variations[0].values])]
    write_atomically(home / SWEEP, json.dumps({"fields": fields, "runs": list(runs.values())}, indent=1) + "\n")


def _start_afresh(run: RunDir) -> None:
    """Whoever submits again wants the run to go on: a cancellation is over, and so are the counts of what failed."""
    for name in (CANCELLED, BLAMED):
        (run.path / name).unlink(missing_ok=True)
    if run.read_state().get("state") in ("failed", "cancelled"):
        run.state.unlink()  # attempts.jsonl has it
    with open(run.path / ATTEMPTS, "a", encoding="utf-8") as file:
        file.write(json.dumps({"event": "submit", "time": int(time.time())}, separators=(",", ":")) + "\n")
