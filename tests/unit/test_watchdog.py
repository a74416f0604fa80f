"""What the watchdog concludes from beats. Tests with real processes are in tests/distributed/test_watchdog.py."""

from __future__ import annotations

import errno
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.errors import PacktrainError, PreflightFailed, UserError
from trainer.launchers import World
from trainer.processes import Processes
from trainer.watch.beatline import _beat
from trainer.watch.blame import is_machines
from trainer.watch.heartbeat import Beat, describe_failure
from trainer.watch.verdict import Judge, Limits, Member, Verdict
from trainer.watch.watchdog import Watchdog

LIMITS = Limits()
LOST = RuntimeError("[pair.cc:534] Connection closed by peer [10.0.0.2]:7171")
WAITS = Beat(5, "forward and backward", quiet=50, waiting=50, on_host=True)
WORKS = Beat(5, "forward and backward", quiet=50, working=50)
ON_GPU = Beat(5, "forward and backward", quiet=50, waiting=50)


def failed(error: BaseException, **place: Any) -> Beat:
    return Beat(5, "forward and backward", failure=describe_failure(error), **place)


def judge(*beats: Beat) -> Judge:
    """Of ranks two a host, heard of at 1000 s."""
    court = Judge([Member(rank, f"node{rank // 2}", 100 + rank) for rank in range(len(beats))], LIMITS, 1000.0)
    for rank, beat in enumerate(beats):
        court.take(rank, beat, 1000.0)
    return court


def verdict(*beats: Beat, after: float = 0.0) -> Verdict:
    found = judge(*beats).verdict(1000.0 + after)
    assert found is not None
    return found


def test_who_does_not_come_to_where_all_others_wait_hangs() -> None:
    found = verdict(WAITS, ON_GPU, WORKS, WAITS)
    assert found.culprits == [2] and found.speaker == 0
    assert found.message.startswith("rank 2 on host node1 (pid 102) hangs at step 5, in 'forward and backward'")


@pytest.mark.parametrize(
    "beats",
    [
        [WORKS, WORKS],  # both compile, or compute on the CPU
        [ON_GPU, ON_GPU],  # minutes of work are queued
        [WAITS, Beat(5, "forward and backward", quiet=3, working=3)],
        [Beat(5, "forward and backward", quiet=50, waiting=10), WORKS],  # the fast one has waited for 10 s
        [WAITS, Beat(5, "tokenising", quiet=50, working=50, alone="tokenising")],
        [WAITS, Beat(5, "done", quiet=50, left=True)],  # it has only just left
        [Beat(5, "starting"), Beat(5, "starting")],
    ],
)
def test_work_that_takes_long_is_not_hanging(beats: list[Beat]) -> None:
    assert judge(*beats).verdict(1000.0) is None


def test_who_stays_in_an_earlier_step_hangs_though_all_wait() -> None:
    assert verdict(WAITS, Beat(4, "optimizer step", quiet=60, waiting=60)).culprits == [1]


def test_all_that_wait_for_one_another_end_at_last() -> None:
    long = Beat(5, "forward and backward", quiet=1000, waiting=1000)
    found = verdict(long, long)
    assert found.culprits == [] and "all ranks wait for one another" in found.message and found.speaker == 0


def test_who_left_too_early_is_named() -> None:
    court = judge(WAITS, WAITS, Beat(5, "saving a checkpoint", left=True))
    for rank in (0, 1):
        court.take(rank, WAITS, 1045.0)
    found = court.verdict(1045.0)
    assert found is not None and found.culprits == [2] and "left the run" in found.message


def test_silence_is_named_sooner_once_another_rank_lost_a_peer() -> None:
    court = judge(WORKS, WORKS, WORKS)
    for rank in (0, 1):
        court.take(rank, WORKS, 1010.0)
    assert court.verdict(1010.0) is None
    court.take(1, failed(LOST), 1010.0)
    found = court.verdict(1010.0)
    assert found is not None and found.culprits == [2] and "silent for 10 s" in found.message


def test_a_silent_host_comes_before_the_processes_it_takes_with_it() -> None:
    court = judge(WORKS, WORKS, WORKS, WORKS)
    court.take(0, WORKS, 1025.0)
    court.take(1, WORKS, 1025.0)
    court.lose(1, 1025.0)  # aborted, as NCCL does
    found = court.verdict(1025.0)
    assert found is not None and found.culprits == [2, 3]


def test_the_judges_own_sleep_is_nobodys_silence() -> None:
    court = judge(WORKS, WORKS)
    court.excuse(100.0)
    assert court.verdict(1105.0) is None
    assert court.verdict(1131.0) is not None


def test_a_dead_rank_is_named_with_the_step_that_the_others_have_reached() -> None:
    court = judge(Beat(9, "optimizer step"), Beat(7, "loading a batch"))
    court.lose(1, 1000.0)
    found = court.verdict(1000.0)
    assert found is not None and "died at step 9 (last heard of in 'loading a batch')" in found.message


def test_a_rank_that_said_goodbye_is_not_lost() -> None:
    court = judge(WORKS, Beat(9, "done", left=True))
    court.lose(1, 1000.0)
    assert court.verdict(1000.0) is None


def test_lost_connections_wait_for_their_cause() -> None:
    court = judge(failed(LOST), failed(LOST), WORKS)
    assert court.verdict(1000.5) is None
    court.take(2, failed(ValueError("bad row")), 1003.0)
    found = court.verdict(1003.0)
    assert found is not None and found.culprits == [2] and "ValueError: bad row" in found.message


def test_a_lost_connection_without_a_cause_is_told_in_the_end() -> None:
    court = judge(WORKS, failed(LOST))
    for rank, beat in enumerate([WORKS, failed(LOST)]):
        court.take(rank, beat, 1021.0)
    found = court.verdict(1021.0)
    assert found is not None and found.culprits == [1] and "Connection closed by peer" in found.message


def test_the_first_error_is_named_and_keeps_its_exit_status() -> None:
    found = verdict(WORKS, failed(UserError("model.path", "no such folder")), after=LIMITS.settle)
    assert found.culprits == [1] and found.exit_status == 2 and found.speaker == 0


def test_rank_0_speaks_for_itself_where_it_fails_like_the_others() -> None:
    court = judge(WORKS, failed(UserError("model.path", "no such folder")))
    court.take(0, failed(UserError("model.path", "no such folder")), 1000.3)
    found = court.verdict(1000.3)
    assert found is not None and found.culprits == [0] and found.speaker is None


def test_an_error_is_secondary_where_its_cause_is() -> None:
    try:
        try:
            raise LOST
        except RuntimeError as cause:
            raise ValueError("the checkpoint could not be saved") from cause
    except ValueError as error:
        assert describe_failure(error).is_secondary
    assert not describe_failure(RuntimeError("CUDA out of memory")).is_secondary
    assert not describe_failure(UserError("data", "the word nccl")).is_secondary


def test_a_collective_error_blames_the_rank_that_failed() -> None:
    from torch.distributed.checkpoint.api import CheckpointException

    failures: Any = {1: (OSError("disk full"), None), 2: (LOST, None)}
    assert describe_failure(CheckpointException("save", failures)).blames == [1]


@pytest.mark.parametrize(
    ("norms", "odd"),
    [
        ([1.0, 1.0 + 1e-6, 1.0, 1.0], None),
        ([1.0, 1.0, 1.1, 1.0], [2]),
        ([1.0, math.nan, 1.0, 1.0], [1]),
        ([math.nan] * 4, None),
        ([math.nan, math.nan, math.nan, 1.0], [3]),
    ],
)
def test_the_rank_with_another_gradient_norm_is_named(norms: list[float], odd: list[int] | None) -> None:
    found = judge(*(Beat(5, "optimizer step", norms=[(4, 0.5), (5, norm)]) for norm in norms)).verdict(1000.0)
    assert (found.culprits if found else None) == odd
    assert found is None or "diverged at step 5" in found.message


# Whose machine is at fault

ECC = torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")
EIO = OSError(errno.EIO, "Input/output error")


def test_the_host_of_who_hangs_or_is_lost_is_blamed() -> None:
    assert verdict(WAITS, ON_GPU, WORKS, WAITS).host == "node1"
    assert verdict(WORKS, WAITS, WORKS, WAITS, WAITS, WAITS).host == ""  # on two hosts
    court = judge(WORKS, WORKS, WORKS, WORKS)
    court.lose(3, 1000.0)
    found = court.verdict(1000.0)
    assert found is not None and found.host == "node1" and found.is_loss
    long = Beat(5, "forward and backward", quiet=1000, waiting=1000)
    assert not verdict(long, long).host and not verdict(long, long).is_loss


def test_where_all_other_hosts_fall_silent_the_judges_own_network_is_down() -> None:
    court = judge(*[WORKS] * 6)
    for rank in (0, 1):
        court.take(rank, WORKS, 1035.0)
    found = court.verdict(1035.0)
    assert found is not None and found.culprits == [2, 3, 4, 5] and found.host == "node0"
    court.take(4, WORKS, 1035.0)
    found = court.verdict(1035.0)
    assert found is not None and found.culprits == [2, 3, 5] and found.host == "node1"


@pytest.mark.parametrize(
    ("norms", "host"),
    [([1.0, 1.0, 1.1, 1.0], "node1"), ([1.0, 1.1], ""), ([1.0, 1.0, 1.1, 1.1], ""), ([1.0, 1.1, 1.0, 1.1, 1.0], "")],
)
def test_a_diverged_rank_is_its_hosts_fault_where_most_agree(norms: list[float], host: str) -> None:
    found = judge(*(Beat(5, "optimizer step", norms=[(5, norm)]) for norm in norms)).verdict(1000.0)
    assert found is not None and found.host == host


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ECC, True),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), True),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), False),
        (torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`: out of memory"), False),
        (torch.distributed.DistBackendError("NCCL error in: NCCLUtils.cpp:77, unhandled system error"), True),
        (torch.distributed.DistBackendError("NCCL error in: NCCLUtils.cpp:77, invalid usage"), False),
        (LOST, False),
        (EIO, True),
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (FileNotFoundError("model.safetensors"), False),
        (UserError("model.path", "no such folder"), False),
        (PacktrainError("the loss is NaN"), False),
        (ValueError("a bug"), False),
        (MemoryError(), False),
    ],
)
def test_errors_of_machines(error: BaseException, expected: bool) -> None:
    assert is_machines(error) is expected


def test_the_machines_error_may_lie_beneath_another() -> None:
    for outer, expected in ((PacktrainError("the checkpoint could not be saved"), True), (UserError("a", "b"), True)):
        try:
            raise outer from EIO
        except PacktrainError as error:
            assert is_machines(error) is expected
    try:
        raise UserError("model.path", "does not fit this GPU") from torch.OutOfMemoryError()
    except UserError as error:
        assert not is_machines(error)


def test_an_error_that_is_the_machines_blames_the_one_host_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def at(host: str, error: BaseException) -> Beat:
        monkeypatch.setenv("SLURMD_NODENAME", host)
        return failed(error)

    told = PacktrainError("rank 2 on node1: Input/output error")
    assert verdict(at("node0", told), WORKS, at("node1", EIO), WORKS, after=LIMITS.settle).host == "node1"
    assert verdict(at("node0", EIO), WORKS, at("node1", EIO), WORKS, after=LIMITS.settle).host == ""  # all share it
    unfit = PreflightFailed("rank 3 on node1: wrong sums", blamed="node1")
    assert verdict(*(at(f"node{rank // 2}", unfit) for rank in range(4))).host == "node1"
    assert verdict(WORKS, at("node0", ValueError("a bug")), after=LIMITS.settle).host == ""


def test_norms_told_in_different_beats_are_compared() -> None:
    court = judge(Beat(5, "optimizer step", norms=[(4, 0.5), (5, 1.0)]), Beat(4, "optimizer step", norms=[(4, 0.5)]))
    assert court.verdict(1000.0) is None
    court.take(1, Beat(5, "optimizer step", norms=[(5, 2.0)]), 1002.0)
    assert court.verdict(1002.0) is not None


def test_beats_survive_the_wire() -> None:
    beat = failed(LOST, norms=[(5, math.inf)], alone="merging")
    sent = _beat(json.loads(json.dumps(asdict(beat))))
    assert asdict(sent) | {"norms": [(5, math.inf)]} == asdict(beat)


def test_every_way_to_end_takes_less_than_a_minute() -> None:
    silence = LIMITS.silence + LIMITS.suspect  # of rank 0
    latest = LIMITS.beat + max(LIMITS.stall + LIMITS.beat, silence, LIMITS.suspect + LIMITS.secondary)
    assert latest + 1.5 * LIMITS.grace < 60
    assert LIMITS.fail > LIMITS.secondary + LIMITS.beat


def test_alone_it_does_nothing(tmp_path: Path) -> None:
    error = ValueError("a failure")
    with Watchdog(Processes(World(), torch.device("cpu")), tmp_path / "logs") as watchdog:
        watchdog.on_end = pytest.fail
        watchdog.mark(1, "forward and backward")
        watchdog.observe(1, 1.0)
        with watchdog.alone("tokenising"):
            pass
        assert watchdog.fail(error) is error
    assert not (tmp_path / "logs").exists()
