"""The processes of a run: who am I, how many are we, and the small things we agree on between steps.

Small agreements travel over gloo on the host, never over the GPUs: they need no device synchronisation.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from trainer.errors import UserError
from trainer.launchers import World, count_gpus

T = TypeVar("T")
# The watchdog ends a run that hangs; these time-outs only have to be longer than anything that is slow and well.
COLLECTIVE_TIMEOUT = timedelta(hours=2)
MEETING_TIMEOUT = timedelta(minutes=10)  # all processes of a job start together; nobody watches over them before


class Processes:
    """This process among those of the run.

    Attributes:
        rank: from 0 over all hosts.
        world_size: number of processes.
        local_rank: from 0 on this host.
        local_world_size: processes on this host.
        master_addr: where rank 0 can be reached.
        device: this process's GPU, or the CPU.
        host: process group of this host's processes for tensors on `device`; None when alone.
        background: gloo group of all processes for the thread that saves; None when alone.
    """

    def __init__(self, world: World, device: torch.device) -> None:
        self.rank, self.world_size = world.rank, world.world_size
        self.local_rank, self.local_world_size = world.local_rank, world.local_world_size
        self.master_addr = world.master_addr
        self.device = device
        self.host: dist.ProcessGroup | None = None
        self.background: dist.ProcessGroup | None = None
        if self.world_size == 1:
            return
        # A group is made by all processes together, in one order.
        for first in range(0, self.world_size, self.local_world_size):
            members = list(range(first, first + self.local_world_size))
            group = dist.new_group(members, timeout=COLLECTIVE_TIMEOUT)
            if self.rank in members:
                self.host = group
        self.background = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone speaks and writes."""
        return self.rank == 0

    def sum(self, *values: int) -> list[int]:
        """Each value added up over all processes."""
        if self.world_size == 1:
            return list(values)
        totals = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(totals)
        return totals.tolist()

    def sum_float(self, value: float) -> float:
        """`value` added up over all processes, in float64."""
        if self.world_size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return total.item()

    def max(self, value: float) -> float:
        """The largest `value` of any process."""
        if self.world_size == 1:
            return value
        largest = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.item()

    def min(self, value: float) -> float:
        """The smallest `value` of any process."""
        return -self.max(-value)

    def from_first(self, value: T) -> T:
        """Rank 0's `value` (anything that pickles) on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Everybody's `value`, by rank, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value)  # over gloo where the object's bytes lie on the CPU
        return values  # type: ignore[return-value]

    def barrier(self) -> None:
        """Returns when every process has come here."""
        self.sum(0)


@contextlib.contextmanager
def start_processes(world: World, needs_group: bool) -> Iterator[Processes]:
    """Joins the run's processes; leaves them at the end.

    Args:
        needs_group: sharding engines want a process group even for one process.
    """
    device = choose_device(world.local_rank)
    if world.world_size == 1 and not needs_group:
        yield Processes(world, device)
        return
    # The CPU's backend from the start: saving in the background and agreeing on stops must not touch the GPUs.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if world.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT)
    else:
        url = f"tcp://{world.master_addr}:{world.master_port}"
        meeting = dist.rendezvous(url, world.rank, world.world_size, timeout=MEETING_TIMEOUT)
        store, rank, world_size = next(meeting)
        check_own_gpus(store, rank, world_size, _uuid(device))
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )
    try:
        yield Processes(world, device)
    finally:
        dist.destroy_process_group()


def choose_device(local_rank: int = 0) -> torch.device:
    """This process's GPU where there are GPUs, else the CPU.

    Raises:
        UserError: GPUs that torch cannot use, or fewer than processes.
    """
    if not torch.cuda.is_available():
        if num_gpus := count_gpus(os.environ):
            raise UserError(
                "torch",
                f"{torch.__version__} cannot use this host's {num_gpus} GPUs, and a CPU would take weeks",
                "a torch built for CUDA, and a driver that is new enough for it",
                "pip install torch from the CUDA index, or hide the GPUs: CUDA_VISIBLE_DEVICES=",
            )
        return torch.device("cpu")
    # Fixed blocks that stay behind when sizes change cost gigabytes; read by torch at its first allocation.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    visible = torch.cuda.device_count()
    # srun may show each task its own GPU alone, which is then number 0.
    index = local_rank if visible > 1 else 0
    if index >= visible:
        raise UserError(
            "LOCAL_RANK",
            f"{local_rank}, and this host shows {visible} GPUs",
            f"0 to {visible - 1}",
            "start one process a GPU",
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def check_own_gpus(store: dist.Store, rank: int, world_size: int, uuid: str) -> None:
    """Refuses two processes on one GPU, before NCCL does in words of its own.

    Args:
        uuid: of this process's GPU; empty on the CPU.

    Raises:
        UserError: on every process, naming the two.
    """
    store.set(f"packtrain/gpu/{rank}", uuid)
    seen: dict[str, int] = {}
    for other in range(world_size):
        found = store.get(f"packtrain/gpu/{other}").decode()
        if found and found in seen:
            raise UserError(
                "CUDA_VISIBLE_DEVICES",
                f"ranks {seen[found]} and {other} have the same GPU",
                "one GPU for each process",
                "start as many processes a host as it has GPUs; under srun: --gpus-per-task 1, or leave it out",
            )
        seen[found] = other


def _uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
