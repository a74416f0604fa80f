"""Whether the machines of a run are fit for it, as far as a second can tell: the first thing its processes do."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from blake3 import blake3

from trainer.errors import PreflightFailed, only
from trainer.launchers import host_name
from trainer.processes import Processes

logger = logging.getLogger(__name__)
MIB = 2**20
SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED, LEAST_FREE, ENOUGH_SHARED = 64 * MIB, 16 * MIB, 1024 * MIB
DRIVER = Path("/proc/driver/nvidia/version")
CLOCKS_APART = 5.0  # seconds
FAR_SLOWER = 4.0  # times
# Between GPUs enough to come near their full speed; on the CPU it only has to work.
REDUCED_BYTES = {"cuda": 64 * MIB, "cpu": MIB}
TIMED_REDUCTIONS = 5
REDUCED_WITHIN = 60.0  # seconds; the first one sets up NCCL's connections
POLL_SECONDS = 0.001
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
OPTIONAL_PACKAGES = ("flash-attn-4",)


@dataclass(frozen=True)
class Place:
    """What a process finds where it runs.

    Attributes:
        clock: seconds, read by all processes at one moment.
        shared, shared_free: bytes of shared memory.
        driver: NVIDIA's; empty without one.
    """

    rank: int
    host: str
    clock: float
    shared: int
    shared_free: int
    driver: str


@dataclass(frozen=True)
class Reduction:
    """How an all-reduce went for one process.

    Attributes:
        ended: within `REDUCED_WITHIN`.
        right: all sums were.
        speed: bus bandwidth in bytes a second: of the slowest link, whatever the number of processes
            (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md).
    """

    ended: bool = True
    right: bool = True
    speed: float = 0.0


def versions() -> dict[str, str]:
    """What has to be equal on all hosts: Python, the libraries that compute (or that one is missing), and this code."""
    root, code = Path(__file__).parent, blake3()
    for path in sorted(root.rglob("*.py")):
        code.update(str(path.relative_to(root)).encode())
        code.update(path.read_bytes())
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    for name in OPTIONAL_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {"python": platform.python_version(), **found, "packtrain's code": code.hexdigest(length=8)}


def check_hosts(processes: Processes, mark: Callable[[str], None]) -> None:
    """Looks at shared memory and clocks, and has all processes add up numbers together.

    Args:
        mark: told what comes next.

    Raises:
        PreflightFailed: on every process; names ranks and hosts that are not fit, and the one to blame if it is one.
    """
    started = time.monotonic()
    mark("preflight: looking at the hosts")
    processes.barrier()
    places = processes.gather(_look(processes.rank))
    check_shared_memory(places)
    if processes.world_size == 1:
        return
    said = [_warn_of_clocks(places), *_check_reductions(processes, places, mark)]
    _warn_of_drivers(places)
    num_hosts = len({place.host for place in places})
    logger.info(
        "preflight: %d processes on %d host%s, %s; took %.1f s",
        processes.world_size,
        num_hosts,
        "s" * (num_hosts > 1),
        ", ".join(said),
        time.monotonic() - started,
    )


def check_shared_memory(places: Sequence[Place]) -> None:
    """NCCL, and the workers that prepare data, talk through shared memory; without it they end by a bus error.

    Raises:
        PreflightFailed: a host has next to none.
    """
    hosts = {place.host: place for place in places}.values()
    found = "{0.host}: {1:.0f} MiB, of which {2:.0f} are free"
    said = {place: found.format(place, place.shared / MIB, place.shared_free / MIB) for place in hosts}
    if bad := [place for place in hosts if place.shared < LEAST_SHARED or place.shared_free < LEAST_FREE]:
        raise PreflightFailed(
            f"{SHARED_MEMORY} on {'; '.join(said[place] for place in bad)}\n"
            f"  allowed: {LEAST_SHARED // MIB} MiB, of which {LEAST_FREE // MIB} are free; better 1 GiB or more\n"
            f"  fix: mount -o remount,size=8G {SHARED_MEMORY}, for a container --shm-size 8g; "
            "remove what programs that crashed have left there",
            blamed=only(place.host for place in bad),
        )
    if len(places) > 1 and (small := [place for place in hosts if place.shared < ENOUGH_SHARED]):
        logger.warning("%s is small on %s; 1 GiB is safe", SHARED_MEMORY, "; ".join(said[place] for place in small))


def reduce_together(processes: Processes, group: dist.ProcessGroup | None, ranks: range) -> Reduction:
    """Adds up numbers over the GPUs (or over the hosts, without), and measures how fast that goes.

    Args:
        group: of `ranks`, this process among them; None: all.
    """
    numbers = torch.empty(REDUCED_BYTES[processes.device.type] // 4, device=processes.device)
    total = float(sum(rank + 1 for rank in ranks))

    def is_right() -> bool:
        numbers.fill_(processes.rank + 1)
        dist.all_reduce(numbers, group=group)
        return bool((numbers == total).all())

    numbers.fill_(0)
    first: Any = dist.all_reduce(numbers, group=group, async_op=True)
    deadline = time.monotonic() + REDUCED_WITHIN
    while not first.is_completed():
        if time.monotonic() > deadline:
            return Reduction(ended=False)
        time.sleep(POLL_SECONDS)
    first.wait()  # raises what went wrong
    right = is_right()
    numbers.fill_(0)
    _synchronize(processes.device)
    started = time.perf_counter()
    for _ in range(TIMED_REDUCTIONS):
        dist.all_reduce(numbers, group=group)
    _synchronize(processes.device)
    seconds = (time.perf_counter() - started) / TIMED_REDUCTIONS
    moved = 2 * (len(ranks) - 1) / len(ranks) * numbers.nbytes
    return Reduction(True, is_right() and right, moved / seconds)


def check_reduction(places: Sequence[Place], reductions: Sequence[Reduction], what: str) -> float:
    """The slowest process's speed.

    Args:
        reductions: of all processes.
        what: over what they were done.

    Raises:
        PreflightFailed: one did not end, or gave wrong sums.
    """
    results = list(zip(places, reductions, strict=True))
    late = [place for place, reduction in results if not reduction.ended]
    wrong = [place for place, reduction in results if not reduction.right]
    if late:
        _refuse(
            late,
            f"an all-reduce {what} did not end within {REDUCED_WITHIN:.0f} s",
            "NCCL_DEBUG=INFO shows what it waits for; NCCL_SOCKET_IFNAME names the network between the hosts",
        )
    if wrong:
        _refuse(wrong, f"an all-reduce {what} gave wrong sums", "have the GPUs and the links between them tested")
    return min(reduction.speed for reduction in reductions)


def find_slow(speeds: dict[str, float]) -> dict[str, float]:
    """The hosts that are far slower than most, by their speeds; of two nobody can tell."""
    usual = statistics.median(speeds.values())
    return {host: speed for host, speed in speeds.items() if len(speeds) > 2 and speed * FAR_SLOWER < usual}


def _look(rank: int) -> Place:
    clock = time.time()
    shared, free = 0, 0
    if SHARED_MEMORY.is_dir():
        found = os.statvfs(SHARED_MEMORY)
        shared, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    driver = re.search(r"\d+\.\d+(\.\d+)?", DRIVER.read_text()) if DRIVER.exists() else None
    return Place(rank, host_name(os.environ), clock, shared, free, driver[0] if driver else "")


def _check_reductions(processes: Processes, places: Sequence[Place], mark: Callable[[str], None]) -> list[str]:
    """Within each host first: who is at fault there can be told."""
    over = "NCCL" if processes.device.type == "cuda" else "gloo"
    first, size = processes.rank - processes.local_rank, processes.local_world_size
    said = []
    if 1 < size < processes.world_size:
        mark(f"preflight: an all-reduce over {over} within the host")
        within = processes.gather(reduce_together(processes, processes.host, range(first, first + size)))
        speed = check_reduction(places, within, f"over {over} within the host")
        said = [f"{speed / 1e9:.2f} GB/s within a host"]
        speeds = {place.host: reduction.speed for place, reduction in zip(places, within, strict=True)}
        for host, slow in find_slow(speeds).items():
            logger.warning("preflight: %.2f GB/s within host %s, far less than within the others", slow / 1e9, host)
    mark(f"preflight: an all-reduce over {over} of all")
    together = processes.gather(reduce_together(processes, None, range(processes.world_size)))
    speed = check_reduction(places, together, f"over {over} of all processes")
    return [f"{over} all-reduce {speed / 1e9:.2f} GB/s", *said]


def _refuse(places: Sequence[Place], what: str, fix: str) -> None:
    named = ", ".join(f"rank {place.rank} on host {place.host}" for place in places)
    named = named if len(named) <= 300 else f"{named[:300]} ..."
    raise PreflightFailed(f"{named}: {what}\n  fix: {fix}", only(place.host for place in places))


def _warn_of_clocks(places: Sequence[Place]) -> str:
    clocks = {place.host: place.clock for place in places}
    for host, clock in clocks.items():
        ahead = clock - places[0].clock
        if abs(ahead) > CLOCKS_APART:
            where = "before" if ahead > 0 else "behind"
            logger.warning("preflight: the clock of host %s is %.0f s %s rank 0's", host, abs(ahead), where)
    return f"clocks within {max(clocks.values()) - min(clocks.values()):.1f} s"


def _warn_of_drivers(places: Sequence[Place]) -> None:
    """Not refused: a cluster that is being updated node by node goes on working."""
    drivers = {place.host: place.driver for place in places}
    if len(set(drivers.values())) > 1:
        said = ", ".join(f"{host}: {driver or 'none'}" for host, driver in drivers.items())
        logger.warning("preflight: hosts have different NVIDIA drivers: %s", said[:300])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
