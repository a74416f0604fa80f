"""Which process of a run this is, as its launcher says: torchrun, accelerate, srun, or none. Imports no torch."""

from __future__ import annotations

import ctypes
import logging
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from trainer.errors import UserError

logger = logging.getLogger(__name__)
LOOPBACK = "127.0.0.1"
# Ports that srun's processes meet at: unprivileged, and below those that systems hand out by themselves.
FIRST_PORT, NUM_PORTS = 20000, 12000
# From one start of a job to the next: a node that was given up for lost may still run the processes of the last one.
PORTS_A_RESTART = 1009
MANY = 1 << 20  # GPUs, more than any host has
START_ALL = (
    "start all processes by one launcher: packtrain train RECIPE --gpus N, torchrun --nproc-per-node N -m trainer"
)


@dataclass(frozen=True)
class World:
    """This process among those its launcher started.

    Attributes:
        master_addr, master_port: where rank 0 listens.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str = LOOPBACK
    master_port: int = 0


def read_world(environ: Mapping[str, str]) -> World:
    """Who this process is, from its environment.

    RANK and its kin (torchrun, accelerate launch, deepspeed, `packtrain train`) come first, also inside a SLURM step;
    then srun's variables. SLURM sets most of those in the shell of sbatch and salloc too, where one process runs; a
    step id they have not.

    Raises:
        UserError: variables are missing or contradict one another, or hosts differ in their number of processes.
    """
    if "RANK" in environ or environ.get("WORLD_SIZE", "1") != "1":
        return _check(_read_torchrun(environ), "RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE", START_ALL)
    if environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID", "")).isdigit() and "SLURM_PROCID" in environ:
        fix = "give every node as many tasks, in blocks: srun --ntasks-per-node=N --distribution=block"
        return _check(_read_srun(environ), "SLURM_PROCID, SLURM_LOCALID, SLURM_STEP_TASKS_PER_NODE", fix)
    _check_alone(environ)
    return World()


def count_gpus(environ: Mapping[str, str]) -> int:
    """NVIDIA GPUs this process may use; asks the driver's NVML, as CUDA once initialised cannot be forked."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    count = ctypes.c_uint(0)
    if nvml.nvmlInit_v2() != 0:
        return 0
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    nvml.nvmlShutdown()
    return visible_gpus(count.value, environ.get("CUDA_VISIBLE_DEVICES"))


def visible_gpus(installed: int, chosen: str | None) -> int:
    """How many of the `installed` GPUs CUDA_VISIBLE_DEVICES leaves: the list up to its first entry that is none."""
    if chosen is None:
        return installed
    visible: list[str] = []
    for entry in chosen.replace(" ", "").split(","):
        is_gpu = int(entry) < installed if entry.isdigit() else entry.startswith(("GPU-", "MIG-"))
        if not is_gpu or entry in visible:
            break
        visible.append(entry)
    return min(len(visible), installed)


def host_name(environ: Mapping[str, str]) -> str:
    """This host as its cluster calls it: the name that SLURM can leave out of a job."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def granted_gpus(environ: Mapping[str, str]) -> int | None:
    """GPUs that SLURM gave to this process, alone or together with its host's others; None where it says nothing."""
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if "SLURM_JOB_ID" not in environ:
        return None
    if chosen is not None:
        return 1 if chosen.startswith("MIG-") else visible_gpus(MANY, chosen)  # CUDA shows one MIG slice at most
    if environ.get("SLURM_GPUS_ON_NODE", "").isdigit():
        return int(environ["SLURM_GPUS_ON_NODE"])
    given = environ.get("SLURM_STEP_GPUS") or environ.get("SLURM_JOB_GPUS")
    return visible_gpus(MANY, given) if given else None


def _read_torchrun(environ: Mapping[str, str]) -> World:
    world_size = _number(environ, "WORLD_SIZE")
    rank = _number(environ, "RANK")
    if (rank, world_size) == (0, 1):
        return World()
    local_world_size = _number(environ, "LOCAL_WORLD_SIZE", "LOCAL_SIZE")  # the second is deepspeed's
    num_hosts = _number(environ, "GROUP_WORLD_SIZE") if "GROUP_WORLD_SIZE" in environ else None
    if num_hosts is not None and num_hosts * local_world_size != world_size:
        hosts = f"{num_hosts} host{'s' * (num_hosts != 1)}"
        raise UserError(
            "WORLD_SIZE",
            f"{world_size} processes on {hosts}, {local_world_size} of them on this one",
            "as many processes on every host",
            "give --nproc-per-node the same number on every host",
        )
    return World(
        rank,
        world_size,
        _number(environ, "LOCAL_RANK"),
        local_world_size,
        _text(environ, "MASTER_ADDR"),
        _number(environ, "MASTER_PORT"),
    )


def _read_srun(environ: Mapping[str, str]) -> World:
    world_size = _number(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if world_size == 1:
        return World()
    tasks = expand_tasks_per_node(_text(environ, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"))
    if len(set(tasks)) > 1:
        raise UserError(
            "SLURM_STEP_TASKS_PER_NODE",
            f"nodes run {', '.join(map(str, tasks))} tasks",
            "as many tasks on every node",
            "srun --ntasks-per-node=N, N being the GPUs of a node",
        )
    on_node = [int(task) for task in (environ.get("SLURM_GTIDS") or "0").split(",")]
    if on_node != list(range(on_node[0], on_node[0] + len(on_node))):
        raise UserError(
            "SLURM_GTIDS",
            f"this node runs tasks {environ['SLURM_GTIDS']}",
            "tasks that count up node by node",
            "srun --distribution=block",
        )
    job, step = _number(environ, "SLURM_JOB_ID", "SLURM_JOBID"), _number(environ, "SLURM_STEP_ID", "SLURM_STEPID")
    nodes = _text(environ, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    master_addr = LOOPBACK if len(tasks) == 1 else first_host(nodes)
    restart = environ.get("SLURM_RESTART_COUNT") or "0"
    # Apart for neighbouring jobs, for the steps of one and for its starts; equal for all tasks.
    place = job * 7 + step + (int(restart) * PORTS_A_RESTART if restart.isdigit() else 0)
    master_port = FIRST_PORT + place % NUM_PORTS
    return World(
        _number(environ, "SLURM_PROCID"),
        world_size,
        _number(environ, "SLURM_LOCALID"),
        tasks[0],
        environ.get("MASTER_ADDR") or master_addr,
        _number(environ, "MASTER_PORT") if environ.get("MASTER_PORT") else master_port,
    )


def expand_tasks_per_node(text: str) -> list[int]:
    """SLURM's ``4(x2),2`` as ``[4, 4, 2]``, one number a node.

    Raises:
        UserError: it is not written so.
    """
    tasks: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if not found:
            raise UserError("SLURM_STEP_TASKS_PER_NODE", repr(text), "numbers such as 4(x2),2")
        tasks += [int(found[1])] * int(found[2] or 1)
    return tasks


def first_host(nodes: str) -> str:
    """The first host of SLURM's list, where rank 0 runs: ``n01`` of ``n[01-03,7],gpu05``. Needs no scontrol."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None  # the pattern matches nothing too
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def _check(world: World, names: str, fix: str) -> World:
    """Ranks count up host by host, with as many on each: groups of a host's processes are made from that."""
    is_rank = 0 <= world.rank < world.world_size
    is_local_rank = 0 <= world.local_rank < world.local_world_size
    in_blocks = is_rank and is_local_rank and world.rank % world.local_world_size == world.local_rank
    if not in_blocks or world.world_size % world.local_world_size:
        raise UserError(
            names,
            f"rank {world.rank} of {world.world_size}, on its host {world.local_rank} of {world.local_world_size}",
            "ranks from 0 that count up host by host, as many on every host",
            fix,
        )
    return world


def _check_alone(environ: Mapping[str, str]) -> None:
    """Nothing says that there are others. Some launchers mean that there are."""
    # accelerate sets the first for a process it starts by itself, the others when several were asked for.
    if all(environ.get(name) for name in ("ACCELERATE_USE_CPU", "MASTER_ADDR", "MASTER_PORT")):
        raise UserError(
            "RANK, WORLD_SIZE",
            "not set, although accelerate's num_processes is above 1: its CPU mode starts one process, or several that "
            "do not know of one another",
            fix=f"{START_ALL}; or num_processes: 1",
        )
    if environ.get("SLURM_NTASKS", "1") != "1" and "SLURM_STEP_ID" not in environ:
        logger.warning(
            "SLURM gave %s tasks, and this process was started without srun: it does not count as one of them "
            "(srun python -m trainer RECIPE starts them all)",
            environ["SLURM_NTASKS"],
        )


def _number(environ: Mapping[str, str], *names: str) -> int:
    text = _text(environ, *names)
    if not text.isdigit():
        raise UserError(names[0], repr(text), "a number from 0", START_ALL)
    return int(text)


def _text(environ: Mapping[str, str], *names: str) -> str:
    """The first of `names` that is set."""
    for name in names:
        if environ.get(name):
            return environ[name]
    others = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE") if environ.get(name)]
    said = f", although {' and '.join(f'{name}={environ[name]}' for name in others)}" if others else ""
    raise UserError(names[0], f"is not set{said}", fix=START_ALL)
