"""`packtrain submit`: a recipe to SLURM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from trainer.errors import UserError
from trainer.recipe import load_recipe

if TYPE_CHECKING:
    from slurm.submit import Plan, Submitted
    from slurm.sweep import Variation
    from trainer.config import RunConfig


def submit(
    recipe: Path,
    *,
    nodes: str | None = None,
    gpus_per_node: str | None = None,
    run_dir: Path | None = None,
    cluster: Path | None = None,
    array: list[str] | None = None,
    then: str = "",
    dry_run: bool = False,
    overrides: Annotated[dict[str, Any] | None, Parameter(parse=False)] = None,
) -> None:
    """Queue a recipe on SLURM; it saves at the time limit, queues itself again, and goes on until it is done.

    The job runs the code and the recipe of this moment. Data are tokenised and the base model is fetched here, before
    GPUs are held. The same command continues a run that was cancelled or given up.

    Args:
        recipe: a YAML file; its slurm section says what to ask SLURM for.
        nodes: number of nodes; for slurm.nodes.
        gpus_per_node: GPUs a node, one process each; for slurm.gpus_per_node.
        run_dir: where the run is kept, on a file system that the nodes share; default: runs/ and the recipe's name.
        cluster: a cluster's profile, a YAML file of the slurm section's fields, for what the recipe leaves open;
            default: ~/.config/packtrain/cluster.yaml where that exists.
        array: field=value,value: a run for each combination, as one array; may be given several times. The same
            command again queues those that are not done.
        then: commands that follow when a run is done, such as merge,verify; each a job of its own. The same command
            again queues those that failed or were cancelled.
        dry_run: show the job's script, what it may cost and SLURM's verdict on it; queue nothing.
        overrides: dotted field -> value, laid over the recipe.
    """
    from slurm.cluster import find_profile
    from slurm.sbatch import ask_sbatch
    from slurm.submit import plan
    from slurm.sweep import expand

    asked = _asked(overrides or {}, nodes, gpus_per_node)
    profile = find_profile(cluster)
    variations = expand(array or [])
    home = run_dir or Path("runs") / recipe.stem
    configs = _load(recipe, asked, profile, variations)
    commands = [command.strip() for command in then.split(",")] if then else []
    found = plan(configs, home, variations, commands)
    if not found.run_dirs and not found.missing:
        what = "every run is done or queued" if variations else "this run is done"
        print(f"{home}: {what}; nothing to submit (packtrain status {home})")
        return
    verdict = ask_sbatch(found.script) if found.run_dirs else ""
    if dry_run:
        if found.run_dirs:
            print(f"{found.script}\n\n{_cost(found)}\nSLURM: {verdict}")
        print(*(one.text for one in found.missing), "nothing was queued (--dry-run)", sep="\n")
        return
    from slurm.prepare import prepare
    from slurm.submit import submit as queue

    _tell(found, queue(found, prepare(found.configs)), home)


def _asked(overrides: dict[str, Any], nodes: str | None, gpus_per_node: str | None) -> dict[str, Any]:
    short = {"slurm.nodes": nodes, "slurm.gpus_per_node": gpus_per_node}
    for field, value in short.items():
        if value is not None and field in overrides:
            option = field.removeprefix("slurm.").replace("_", "-")
            raise UserError(f"--{field}", f"given twice, also as --{option}", fix="keep one of them")
    return overrides | {field: value for field, value in short.items() if value is not None}


def _load(
    recipe: Path, overrides: dict[str, Any], profile: Path | None, variations: list[Variation]
) -> list[RunConfig]:
    for variation in variations:
        if twice := overrides.keys() & variation.values.keys():
            raise UserError(f"--{twice.pop()}", "given once, and varied by --array", fix="keep one of them")
    values: list[dict[str, str]] = [variation.values for variation in variations] or [{}]
    configs = [load_recipe(recipe, overrides | one, profile) for one in values]
    _check_all_differ(configs, variations)
    return configs


def _check_all_differ(configs: list[RunConfig], variations: list[Variation]) -> None:
    """1e-4 and 0.0001 are one value, however it is written."""
    names: dict[str, str] = {}
    for config, variation in zip(configs, variations, strict=False):
        if (same := names.setdefault(config.model_dump_json(), variation.name)) != variation.name:
            raise UserError("--array", f"{same} and {variation.name} are one and the same run", fix="keep one of them")


def _cost(found: Plan) -> str:
    slurm, runs = found.slurm, len(found.run_dirs)
    hours, minutes = divmod(slurm.minutes, 60)
    gpus = f"{slurm.nodes} x {slurm.gpus_per_node} GPU{'s' * (slurm.gpus_per_node != 1)}"
    each = f"{gpus} for at most {hours}:{minutes:02d} h"
    several = f"{runs} runs on " if runs > 1 else ""
    restarts = f"at most {slurm.max_restarts} restart{'s' * (slurm.max_restarts != 1)}"
    return f"at stake: {several}{each} = {found.gpu_hours:,.1f} GPU-hours a start, {restarts}"


def _tell(found: Plan, submitted: list[Submitted], home: Path) -> None:
    for first in submitted[:1]:
        print(f"submitted as job {first.job_id.partition('_')[0]}; {_cost(found)}")
        for follower in first.then:
            print(f"  then {follower['command']}: job {follower['job_id'].partition('_')[0]}")
    for missing in found.missing:
        print(f"{missing.text}: queued")
    print(f"  packtrain status {home}")
    if len(submitted) == 1:
        print(f"  packtrain logs {home} -f")
