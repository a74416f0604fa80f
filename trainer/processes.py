"""The processes of a run: who am I, how many are we, and the small things we agree on between steps.

Small agreements travel over gloo on the host, never over the GPUs: they need no device synchronisation.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trainer.devices import CPU, DeviceKind, choose_device
from trainer.errors import PacktrainError, PreflightFailed, UserError, only
from trainer.launchers import World, host_name

T = TypeVar("T")
# The watchdog ends a run that hangs; these time-outs only have to be longer than anything that is slow and well.
COLLECTIVE_TIMEOUT = timedelta(hours=2)
MEETING_TIMEOUT = timedelta(minutes=10)  # all processes of a job start together; nobody watches over them before
TELLING_TIMEOUT = timedelta(seconds=10)


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
def start_processes(world: World, needs_group: bool, kind: DeviceKind = "auto") -> Iterator[Processes]:
    """Joins the run's processes; leaves them at the end.

    Args:
        needs_group: sharding engines want a process group even for one process.
        kind: ``train.device``.

    Raises:
        UserError, PreflightFailed: a process has no GPU of its own, or did not come; on all processes that did.
    """
    device, fault = CPU, None
    try:
        device = choose_device(world.local_rank, kind)
    except PacktrainError as error:
        if world.world_size == 1:
            raise
        fault = error  # the others wait, and are to be told
    if world.world_size == 1 and not needs_group:
        yield Processes(world, device)
        return
    # The CPU's backend from the start: saving in the background and agreeing on stops must not touch the GPUs.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if world.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT)
    else:
        store, rank, world_size = _meet(world)
        check_devices(store, rank, world_size, _uuid(device), fault)
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


def _meet(world: World) -> tuple[dist.Store, int, int]:
    url = f"tcp://{world.master_addr}:{world.master_port}"
    try:
        return next(dist.rendezvous(url, world.rank, world.world_size, timeout=MEETING_TIMEOUT))
    except dist.DistError as error:
        place = f"{world.master_addr}:{world.master_port}"
        if "EADDRINUSE" in str(error):
            what, fix = "is taken by another program", "start again, or set MASTER_PORT to a port that is free"
        else:
            what = f"did not bring all {world.world_size} processes together within {MEETING_TIMEOUT}"
            fix = "let the hosts connect to one another on all ports; MASTER_ADDR may name rank 0's host otherwise"
        reason = str(error).splitlines()[0][:300]
        raise PreflightFailed(
            f"rank {world.rank} on host {host_name(os.environ)}: {place} {what}: {reason}\n  fix: {fix}"
        ) from error


def check_devices(store: dist.Store, rank: int, world_size: int, uuid: str, fault: PacktrainError | None) -> None:
    """Refuses a process without a GPU of its own, before NCCL does in words of its own.

    Args:
        uuid: of this process's GPU; empty on the CPU.
        fault: what keeps this process from having one.

    Raises:
        PreflightFailed: on every process, naming the one at fault and what it is.
        UserError: on every process; all are at fault alike, or two have the same GPU.
    """
    own: dict[str, Any] = {"uuid": uuid, "host": host_name(os.environ)}
    if fault:
        own |= {"fault": str(fault), "status": fault.exit_status, "blamed": fault.blamed}
    store.set(f"packtrain/device/{rank}", json.dumps(own))
    told = [json.loads(store.get(f"packtrain/device/{other}")) for other in range(world_size)]
    try:
        _judge_devices(told, fault)
    except PacktrainError:
        store.set(f"packtrain/told/{rank}", "")
        if rank == 0:  # it holds the store, and leaves last
            with contextlib.suppress(dist.DistError):
                store.wait([f"packtrain/told/{other}" for other in range(world_size)], TELLING_TIMEOUT)
        raise


def _judge_devices(told: list[dict[str, Any]], own_fault: PacktrainError | None) -> None:
    faults = {rank: one for rank, one in enumerate(told) if "fault" in one}
    if own_fault and len(faults) == len(told) and len({one["fault"] for one in faults.values()}) == 1:
        own_fault.blamed = only(one["blamed"] for one in told)
        raise own_fault
    if faults:
        first = next(iter(faults.values()))["fault"]
        ranks = [f"rank {rank} on host {one['host']}" for rank, one in faults.items() if one["fault"] == first]
        error = PreflightFailed(f"{', '.join(ranks)}: {first}", only(one["blamed"] for one in faults.values()))
        error.exit_status = max(one["status"] for one in faults.values())  # wrong input can be seen by some alone
        raise error
    seen: dict[str, int] = {}
    for rank, one in enumerate(told):
        if one["uuid"] and one["uuid"] in seen:
            raise UserError(
                "CUDA_VISIBLE_DEVICES",
                f"ranks {seen[one['uuid']]} and {rank} have the same GPU",
                "one GPU for each process",
                "start as many processes a host as it has GPUs; under srun: --gpus-per-task 1, or leave it out",
            )
        seen[one["uuid"]] = rank


def _uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
