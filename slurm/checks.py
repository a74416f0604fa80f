"""What can be wrong with a submission, looked at before anything is queued; each raises UserError."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from slurm.cluster import ClusterFacts, Partition
from slurm.script import GPUS_USED
from trainer.checkpoint.layout import RunDir
from trainer.config import RunConfig, SlurmConfig
from trainer.errors import UserError

logger = logging.getLogger(__name__)

NOT_IN_PATHS = "%:\\\n\r\t"  # sbatch fills in %j and the like, PYTHONPATH is a list, a submission's runs are lines


def check_home(home: Path, is_sweep: bool) -> None:
    if home.exists() and not home.is_dir():
        raise UserError(str(home), "is a file", "a folder, there or not yet", "name another --run-dir")
    own = {".lock", "state.json", "job.json", "sweep.json", "submissions"}
    if home.exists() and (found := {entry.name for entry in home.iterdir()}) and not found & own:
        raise UserError(
            str(home),
            f"no run made this folder, which holds {_some(sorted(found))}",
            "the folder of a run, an empty one, or none yet",
            "name another --run-dir",
        )
    if is_sweep and RunDir(home).state.exists():
        raise UserError(str(home), "is a run, and a sweep has a folder of its own", fix="name another --run-dir")
    if not is_sweep and (home / "sweep.json").exists():
        raise UserError(str(home), "is a sweep", fix="give its --array, or name another --run-dir")
    if wrong := sorted({letter for letter in str(home) if letter in NOT_IN_PATHS}):
        raise UserError(
            "--run-dir",
            f"{str(home)!r} has {', '.join(map(repr, wrong))} in it, which job scripts cannot carry",
            "a path without them",
            "name another --run-dir",
        )


def check_then(config: RunConfig, then: Sequence[str]) -> None:
    for index, command in enumerate(then):
        if command not in GPUS_USED or command in then[:index]:
            found = f"{command} given twice" if command in then[:index] else repr(command)
            raise UserError("--then", found, ", ".join(GPUS_USED))
    if config.adapter is None:
        if "merge" in then:
            raise UserError("--then", "merge, and a full fine-tune is whole as it is", fix="leave merge out")
    elif "verify" in then and "merge" not in then[: then.index("verify")] and not config.export.merge:
        raise UserError("--then", "verify, and nothing merges before it", fix="--then merge,verify")


def check_strategy(config: RunConfig) -> None:
    slurm = config.slurm
    num_processes = slurm.nodes * slurm.tasks_per_node
    if config.strategy.kind == "single" and num_processes > 1:
        raise UserError(
            "strategy.kind",
            f"single, and {slurm.nodes} x {slurm.tasks_per_node} processes were asked for",
            "auto, ddp, fsdp2, zero1, zero2 or zero3 for several",
            "--nodes 1 --gpus-per-node 1, or another strategy.kind",
        )


def check_request(slurm: SlurmConfig, cluster: ClusterFacts, then: Sequence[str]) -> None:
    """Compares what is asked for with what the partition has, where SLURM itself would only let the job wait."""
    partition = _partition("slurm.partition", slurm.partition, cluster)
    if then and slurm.cpu_partition:
        _partition("slurm.cpu_partition", slurm.cpu_partition, cluster)
    if partition is None:
        return
    _check_most("slurm.nodes", slurm.nodes, partition.num_nodes, f"partition {partition.name} has", "nodes")
    gpus = partition.gpus_per_node
    _check_most("slurm.gpus_per_node", slurm.gpus_per_node, gpus, f"a node of {partition.name} has", "GPUs")
    cpus = slurm.tasks_per_node * (slurm.cpus_per_gpu or 1)
    _check_most("slurm.cpus_per_gpu", cpus, partition.cpus_per_node, f"a node of {partition.name} has", "cores")
    if partition.max_minutes is not None and slurm.minutes > partition.max_minutes:
        hours = f"{partition.max_minutes // 60:02d}:{partition.max_minutes % 60:02d}:00"
        raise UserError("slurm.time", slurm.time, f"at most {hours} in partition {partition.name}", "the run goes on")
    if slurm.gpu_type and slurm.gpu_type not in partition.gpu_types:
        known = ", ".join(sorted(partition.gpu_types)) or f"none: {partition.name} gives its GPUs no type"
        raise UserError("slurm.gpu_type", slurm.gpu_type, known)
    if not partition.is_up:
        logger.warning("partition %s is down at present: the job will wait", partition.name)
    unknown = sorted({name for name in slurm.exclude if "[" not in name} - set(cluster.nodes))
    if unknown:
        raise UserError("slurm.exclude", ", ".join(unknown), f"nodes of the cluster: {_some(cluster.nodes)}")


def _partition(where: str, name: str | None, cluster: ClusterFacts) -> Partition | None:
    if name is None:
        return cluster.default
    wanted = name.split(",")  # SLURM takes several, and the first that is free
    for one in wanted:
        if one not in cluster.partitions:
            raise UserError(where, f"{one!r} is no partition here", _some(cluster.partitions))
    return cluster.partitions[wanted[0]] if len(wanted) == 1 else None


def _check_most(where: str, asked: int, most: int, who: str, what: str) -> None:
    if asked > most:
        raise UserError(where, f"{asked}; {who} {most} {what}", f"at most {most}")


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:20]) + (" ..." if len(listed) > 20 else "")
