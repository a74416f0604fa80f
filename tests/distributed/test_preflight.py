"""The first seconds of a run of several processes: a machine that is not fit for it is named before anything else."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distributed.pool import Pools
from trainer import host_checks
from trainer.errors import PreflightFailed, UserError
from trainer.host_checks import MIB, Place, Reduction, check_hosts, check_reduction, find_slow, versions
from trainer.preflight import check_same_everywhere
from trainer.processes import Processes

SIZE = 4
HEALTHY = Place(rank=0, host="n0", clock=0.0, shared=2048 * MIB, shared_free=2000 * MIB, driver="580.65")


class Said(logging.Handler):
    """What the checks log."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def look(processes: Processes, plant: str = "", culprits: tuple[int, ...] = ()) -> dict[str, Any]:
    """How the checks end on this rank, as if of two hosts; `plant` goes wrong on `culprits`."""
    logger, said = logging.getLogger("trainer"), Said()
    half = processes.world_size // 2
    groups = [dist.new_group(list(range(first, first + half))) for first in (0, half)]
    is_culprit = processes.rank in culprits
    all_reduce, look_around, marks = dist.all_reduce, host_checks._look, list[str]()

    def reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if plant == "never ends" and kwargs.get("async_op"):
            return NeverEnds()
        if plant == "miscomputes" and tensor.is_floating_point() and is_culprit:
            tensor += 1  # what it gives to the others is wrong
        done = all_reduce(tensor, *args, **kwargs)
        if plant == "misreads" and tensor.is_floating_point() and is_culprit:
            tensor[7] += 1
        return done

    def look_elsewhere(rank: int) -> Place:
        wrong = {"small": {"shared": MIB}, "full": {"shared_free": MIB}, "late": {"clock": time.time() - 60}}
        wrong |= {"driver": {"driver": "1.2"}}
        return dataclasses.replace(look_around(rank), **(wrong.get(plant, {}) if is_culprit else {}))

    logger.addHandler(said)
    logger.setLevel(logging.INFO)
    local = (processes.local_rank, processes.local_world_size, processes.host)
    processes.local_rank, processes.local_world_size = processes.rank % half, half
    processes.host = groups[processes.rank // half]
    os.environ["SLURMD_NODENAME"] = f"n{processes.rank // half}"
    try:
        host_checks._look, dist.all_reduce = look_elsewhere, reduce  # type: ignore[assignment]
        host_checks.REDUCED_WITHIN = 0.3
        check_hosts(processes, marks.append)
        if plant == "version":
            check_same_everywhere(processes, versions() | ({"torch": "0.1"} if is_culprit else {}))
    except (PreflightFailed, UserError) as error:
        return {"error": str(error), "blamed": error.blamed, "said": said.lines, "marks": marks}
    finally:
        host_checks._look, dist.all_reduce = look_around, all_reduce
        host_checks.REDUCED_WITHIN = 60.0
        processes.local_rank, processes.local_world_size, processes.host = local
        del os.environ["SLURMD_NODENAME"]
        logger.removeHandler(said)
    return {"error": None, "said": said.lines, "marks": marks}


class NeverEnds:
    def is_completed(self) -> bool:
        return False


def timed(processes: Processes) -> float:
    """Seconds that everything takes, versions too."""
    processes.barrier()
    started = time.monotonic()
    check_hosts(processes, lambda activity: None)
    check_same_everywhere(processes, versions())
    return time.monotonic() - started


@pytest.mark.parametrize("world_size", [SIZE])
def test_healthy_hosts_pass_in_a_moment(world_size: int, pool: Pools) -> None:
    found = pool(SIZE).run(look)
    assert [one["error"] for one in found] == [None] * SIZE
    (line,) = found[0]["said"]
    assert line.startswith("preflight: 4 processes on 2 hosts, clocks within 0.")
    assert re.search(r"gloo all-reduce \d+\.\d\d GB/s, \d+\.\d\d GB/s within a host; took 0\.\d s", line)
    assert max(pool(SIZE).run(timed)) < 2.0


@pytest.mark.parametrize("world_size", [SIZE])
@pytest.mark.parametrize(
    ("plant", "culprits", "says", "blamed"),
    [
        ("small", (2, 3), "/dev/shm on n1: 1 MiB, of which ", "n1"),
        ("full", (0, 1), "/dev/shm on n0: ", "n0"),
        ("small", (0, 1, 2, 3), "/dev/shm on n0: 1 MiB", ""),  # the cluster's own setting
        (
            "miscomputes",
            (1,),
            "rank 0 on host n0, rank 1 on host n0: an all-reduce over gloo within the host gave",
            "n0",
        ),
        ("misreads", (3,), "rank 3 on host n1: an all-reduce over gloo within the host gave wrong sums", "n1"),
        ("never ends", (), "rank 3 on host n1: an all-reduce over gloo within the host did not end within 0 s", ""),
        ("version", (2,), "torch: rank 2 on n1 (0.1) has another one than rank 0 (2.", ""),
    ],
)
def test_what_is_not_fit_is_named_on_all_ranks(
    world_size: int, plant: str, culprits: tuple[int, ...], says: str, blamed: str, pool: Pools
) -> None:
    for one in pool(SIZE).run(look, plant, culprits):
        assert says in one["error"] and "fix: " in one["error"]
        assert one["blamed"] == blamed


@pytest.mark.parametrize("world_size", [SIZE])
@pytest.mark.parametrize(
    ("plant", "says"),
    [
        ("late", "the clock of host n1 is 60 s behind rank 0's"),
        ("driver", "hosts have different NVIDIA drivers: n0: "),
    ],
)
def test_what_is_odd_and_harmless_is_a_warning(world_size: int, plant: str, says: str, pool: Pools) -> None:
    found = pool(SIZE).run(look, plant, (2, 3))
    assert [one["error"] for one in found] == [None] * SIZE
    assert any(says in line for line in found[0]["said"])


def places(*hosts: str) -> list[Place]:
    return [dataclasses.replace(HEALTHY, rank=rank, host=host) for rank, host in enumerate(hosts)]


def test_sums_that_are_wrong_everywhere_are_nobodys_fault() -> None:
    found = places("n0", "n1", "n2")
    assert check_reduction(found, [Reduction(speed=3.0), Reduction(speed=1.0), Reduction(speed=2.0)], "") == 1.0
    for wrong, blamed in (((1,), "n1"), ((0, 1, 2), "")):
        with pytest.raises(PreflightFailed, match="gave wrong sums") as error:
            check_reduction(found, [Reduction(right=rank not in wrong) for rank in range(3)], "of all processes")
        assert error.value.blamed == blamed


def test_a_far_slower_host_is_named_where_there_are_others_to_compare_with() -> None:
    assert find_slow({"n0": 200.0, "n1": 20.0}) == {}
    assert find_slow({"n0": 200.0, "n1": 20.0, "n2": 190.0}) == {"n1": 20.0}
    assert find_slow({"n0": 200.0, "n1": 90.0, "n2": 190.0}) == {}


def test_one_process_needs_shared_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.launchers import World

    alone = Processes(World(), torch.device("cpu"))
    check_hosts(alone, lambda activity: None)
    monkeypatch.setattr(host_checks, "_look", lambda rank: dataclasses.replace(HEALTHY, shared=32 * MIB))
    with pytest.raises(PreflightFailed, match="32 MiB, of which .*\n  allowed: 64 MiB.*\n  fix: ") as error:
        check_hosts(alone, lambda activity: None)
    assert error.value.blamed == "n0"


def test_small_shared_memory_is_a_warning_for_several(caplog: pytest.LogCaptureFixture) -> None:
    small = dataclasses.replace(HEALTHY, shared=512 * MIB)
    host_checks.check_shared_memory([small])
    assert not caplog.text
    host_checks.check_shared_memory([small, dataclasses.replace(HEALTHY, host="n1")])
    assert "/dev/shm is small on n0: 512 MiB" in caplog.text


def test_versions_name_what_computes() -> None:
    libraries = {"torch", "transformers", "peft", "bitsandbytes", "flash-attn-4"}  # of the last also that it is missing
    assert versions().keys() == {"python", *libraries, "packtrain's code"}
