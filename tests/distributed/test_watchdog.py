"""A run of three real processes in which one hangs, dies, fails or diverges ends soon, and names it."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from trainer.errors import PacktrainError, Preempted, UserError
from trainer.launchers import World
from trainer.processes import Processes, start_processes
from trainer.watch.verdict import Limits
from trainer.watch.watchdog import Watchdog

SIZE = 3
LIMITS = Limits(
    beat=0.2,
    silence=3.0,
    suspect=1.5,
    settle=0.3,
    secondary=2.5,
    stall=2.0,
    all_wait=60.0,
    fail=6.0,
    connect=20.0,
    leave=5.0,
    drain=0.5,
    grace=2.0,
    courtesy=0.4,
)
LINGERS = 60.0  # seconds
HOST = socket.gethostname()
Life = Callable[[Processes, Watchdog], None]


# --- what the processes do; `culprit` is the rank that goes wrong ---


def train(processes: Processes, watchdog: Watchdog, steps: int = 3) -> None:
    for step in range(steps):
        watchdog.mark(step, "forward and backward")
        processes.barrier()
        watchdog.observe(step, 1.5)


def raises_and_lingers(processes: Processes, watchdog: Watchdog, culprit: int) -> None:
    """As behind a long save: the error is there, and its process cannot leave."""
    train(processes, watchdog)
    if processes.rank == culprit:
        try:
            with watchdog.telling():
                raise ValueError("a planted error")
        finally:
            time.sleep(LINGERS)
    processes.barrier()


def is_killed(processes: Processes, watchdog: Watchdog, culprit: int) -> None:
    train(processes, watchdog)
    watchdog.mark(3, "optimizer step")
    if processes.rank == culprit:
        os.kill(os.getpid(), signal.SIGKILL)
    processes.barrier()


def holds_pythons_lock(processes: Processes, watchdog: Watchdog, culprit: int) -> None:
    train(processes, watchdog)
    watchdog.mark(3, "saving a checkpoint")
    time.sleep(5 * LIMITS.beat)
    if processes.rank == culprit:
        ctypes.PyDLL(None).sleep(1000)
    processes.barrier()


def loops(processes: Processes, watchdog: Watchdog, culprit: int) -> None:
    train(processes, watchdog)
    watchdog.mark(3, "evaluating")
    while processes.rank == culprit:
        pass
    processes.barrier()


def sleeps_while_others_are_in_backward(processes: Processes, watchdog: Watchdog, culprit: int) -> None:
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    model(torch.ones(2, 4)).sum().backward()
    watchdog.mark(3, "forward and backward")
    if processes.rank == culprit:
        time.sleep(1000)
    model(torch.ones(2, 4)).sum().backward()


def raises(processes: Processes, watchdog: Watchdog, culprit: int) -> None:
    train(processes, watchdog)
    watchdog.mark(3, "evaluating")
    if processes.rank == culprit:
        raise ValueError("a planted error")
    processes.barrier()


def misses_a_file(processes: Processes, watchdog: Watchdog, culprit: int) -> None:
    watchdog.mark(0, "loading the model")
    if processes.rank == culprit:
        raise UserError("model.path", "no such folder on this host")
    processes.barrier()


def all_miss_a_file(processes: Processes, watchdog: Watchdog, culprit: int) -> None:
    time.sleep(0.1 * (SIZE - processes.rank))  # rank 0 comes last
    raise UserError("model.path", "no such folder")


def saves_in_parts(processes: Processes, watchdog: Watchdog, culprit: int) -> None:
    """torch's distributed checkpoint tells every process of the failure of one."""
    from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, save

    class Planner(DefaultSavePlanner):
        def create_local_plan(self) -> Any:
            if processes.rank == culprit:
                raise OSError("No space left on device")
            return super().create_local_plan()

    watchdog.mark(7, "saving a checkpoint")
    save({"a": torch.ones(2)}, storage_writer=FileSystemWriter("/nonexistent"), planner=Planner())


def diverges(processes: Processes, watchdog: Watchdog, culprit: int) -> None:
    for step in range(1000):
        watchdog.mark(step, "forward and backward")
        wrong = processes.rank == culprit and step == 4
        watchdog.observe(step, float("nan") if wrong else 1.5 * (1 + 1e-6 * processes.rank))
        processes.barrier()
        time.sleep(0.02)


def leaves_late(processes: Processes, watchdog: Watchdog, culprit: int) -> None:
    train(processes, watchdog)
    if processes.rank == culprit:
        time.sleep(3.0)


def works_alone(processes: Processes, watchdog: Watchdog, culprit: int) -> None:
    if processes.rank == culprit:
        with watchdog.alone("tokenising"):
            time.sleep(3 * LIMITS.stall)
    processes.barrier()


def all_wait_long(processes: Processes, watchdog: Watchdog, culprit: int) -> None:
    """Everybody sits in a receive that is answered late, by another thread."""
    after, before = (processes.rank + 1) % SIZE, (processes.rank - 1) % SIZE

    def answer() -> None:
        time.sleep(3 * LIMITS.stall)
        dist.send(torch.ones(1), after)

    threading.Thread(target=answer).start()
    watchdog.mark(1, "forward and backward")
    dist.recv(torch.zeros(1), before)
    processes.barrier()


def all_work_long(processes: Processes, watchdog: Watchdog, culprit: int) -> None:
    time.sleep(3 * LIMITS.stall)
    processes.barrier()


def are_preempted(processes: Processes, watchdog: Watchdog, culprit: int) -> None:
    train(processes, watchdog)
    time.sleep(0.5 * processes.rank)
    raise Preempted("stopped at step 3 by SIGUSR2")


# --- how they are run ---


def live(rank: int, port: int, logs: Path, life: Any, culprit: int) -> None:
    """One process as `python -m trainer` would be: its own log, its error on stderr from rank 0, an exit status."""
    import logging

    sys.stderr = open(logs / f"stderr_{rank}", "w", buffering=1)  # noqa: SIM115
    logging.getLogger().addHandler(logging.FileHandler(logs / f"rank_{rank}.log"))
    torch.set_num_threads(1)
    world = World(rank, SIZE, rank, SIZE, "127.0.0.1", port)
    status = 0
    try:
        with contextlib.ExitStack() as stack:
            processes = stack.enter_context(start_processes(world, needs_group=True))
            with Watchdog(processes, logs, LIMITS) as watchdog:
                watchdog.on_end = lambda verdict: (logs / f"ended_{rank}").write_text(verdict.message)  # type: ignore
                try:
                    life(processes, watchdog, culprit)
                except BaseException as error:
                    raise watchdog.fail(error) from error
    except PacktrainError as error:
        (logs / f"raised_{rank}").write_text(f"{type(error).__name__}: {error}")
        status = error.exit_status
    except BaseException as error:
        (logs / f"raised_{rank}").write_text(f"{type(error).__name__}: {error}")
        status = 1
    sys.stderr.flush()
    os._exit(status)


class Ended:
    """How a run of `life` ended: exit statuses, seconds, and what each rank wrote."""

    def __init__(self, logs: Path, life: Any, culprit: int = -1) -> None:
        self.logs, self.culprit = logs, culprit
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "torch.distributed.checkpoint", __name__])
        ranks = [
            context.Process(target=live, args=(rank, port, logs, life, culprit), daemon=True) for rank in range(SIZE)
        ]
        started = time.monotonic()
        try:
            for rank in ranks:
                rank.start()
            self.pids = [rank.pid for rank in ranks]
            for number, rank in enumerate(ranks):
                if number != culprit or life is not holds_pythons_lock:  # which cannot end
                    rank.join(40)
            self.seconds = time.monotonic() - started
            self.statuses = [rank.exitcode for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()

    def read(self, name: str) -> dict[int, str]:
        """What each rank left under this name; ranks that left nothing are not in it."""
        found = {rank: self.logs / name.format(rank) for rank in range(SIZE)}
        return {rank: path.read_text() for rank, path in found.items() if path.exists() and path.read_text()}

    @property
    def survivors(self) -> list[int]:
        return [rank for rank in range(SIZE) if rank != self.culprit]


def test_a_killed_rank_is_named_at_once(tmp_path: Path) -> None:
    for culprit in (2, 0):
        logs = tmp_path / str(culprit)
        logs.mkdir()
        ended = Ended(logs, is_killed, culprit)
        named = f"rank {culprit} on host {HOST} (pid {ended.pids[culprit]}) died at step 3"
        spoken = ended.read("stderr_{}")
        assert list(spoken) == [0 if culprit else 1] and spoken[min(spoken)].startswith(named)
        assert [ended.statuses[rank] for rank in ended.survivors] == [1, 1]
        assert list(ended.read("ended_{}")) == list(spoken)
        assert list(ended.read("rank_{}.stacks.txt")) == ended.survivors
        assert all(named in text for text in ended.read("rank_{}.log").values())


def test_a_rank_that_holds_pythons_lock_is_named_with_its_stack(tmp_path: Path) -> None:
    culprit = 1
    ended = Ended(tmp_path, holds_pythons_lock, culprit)
    logged = ended.read("rank_{}.log")
    assert list(logged) == ended.survivors
    for text in logged.values():
        assert f"rank {culprit} on host {HOST} (pid {ended.pids[culprit]}) is silent for" in text
        assert "at step 3, in 'saving a checkpoint'" in text
    assert list(ended.read("stderr_{}")) == [min(ended.survivors)]
    assert [ended.statuses[rank] for rank in ended.survivors] == [1, 1]
    assert holds_pythons_lock.__name__ in ended.read("rank_{}.stacks.txt")[culprit]


@pytest.mark.parametrize("life", [loops, sleeps_while_others_are_in_backward])
def test_a_hanging_rank_is_named_with_its_stack(tmp_path: Path, life: Life) -> None:
    ended = Ended(tmp_path, life, 1)
    logged = ended.read("rank_{}.log")
    assert list(logged) == [0, 1, 2]
    for text in logged.values():
        assert f"rank 1 on host {HOST} (pid {ended.pids[1]}) hangs at step 3" in text
    assert life.__name__ in ended.read("rank_{}.stacks.txt")[1]
    assert list(ended.read("stderr_{}")) == [0]
    assert ended.statuses == [1, 1, 1]


@pytest.mark.parametrize("culprit", [0, 1])
def test_an_error_on_one_rank_ends_all(tmp_path: Path, culprit: int) -> None:
    ended = Ended(tmp_path, raises, culprit)
    assert ended.statuses == [1, 1, 1]
    assert ended.read("raised_{}")[culprit] == "ValueError: a planted error"
    named = (
        f"rank {culprit} on host {HOST} (pid {ended.pids[culprit]}) failed at step 3, in 'evaluating': ValueError: a"
    )
    assert all(named in text for text in ended.read("rank_{}.log").values())
    # Rank 0's own error is told by whoever called it.
    assert list(ended.read("stderr_{}")) == ([0] if culprit else [])


@pytest.mark.parametrize("culprit", [0, 1])
def test_an_error_is_told_while_the_process_is_still_on_its_way_out(tmp_path: Path, culprit: int) -> None:
    ended = Ended(tmp_path, raises_and_lingers, culprit)
    assert ended.seconds < LINGERS / 2
    spoken = ended.read("stderr_{}")
    assert list(spoken) == [0] and list(ended.read("ended_{}")) == [0]
    assert spoken[0].startswith(f"rank {culprit} on host {HOST}") and "ValueError: a planted error" in spoken[0]
    assert ended.statuses == [1, 1, 1]


def test_wrong_input_on_one_rank_is_the_users_error_on_all(tmp_path: Path) -> None:
    ended = Ended(tmp_path, misses_a_file, 2)
    assert ended.statuses == [2, 2, 2]
    assert "no such folder on this host" in ended.read("stderr_{}")[0]


def test_the_same_error_on_all_ranks_is_raised_as_it_is(tmp_path: Path) -> None:
    ended = Ended(tmp_path, all_miss_a_file)
    assert ended.statuses == [2, 2, 2]
    assert ended.read("raised_{}") == dict.fromkeys(range(SIZE), "UserError: model.path: no such folder")
    assert not ended.read("stderr_{}")


def test_a_failed_save_names_the_rank_that_failed(tmp_path: Path) -> None:
    ended = Ended(tmp_path, saves_in_parts, 1)
    spoken = ended.read("stderr_{}")
    assert list(spoken) == [0]
    assert spoken[0].startswith(f"rank 1 on host {HOST}") and "No space left on device" in spoken[0]
    assert ended.read("raised_{}")[2].startswith("RankFailed: rank 1")


def test_a_diverged_rank_is_named_with_all_values(tmp_path: Path) -> None:
    ended = Ended(tmp_path, diverges, 2)
    text = ended.read("stderr_{}")[0]
    assert text.startswith(f"rank 2 on host {HOST}") and "diverged at step 4" in text and "rank 2: nan" in text
    assert ended.statuses == [1, 1, 1]


@pytest.mark.parametrize("life", [leaves_late, works_alone, all_wait_long, all_work_long])
def test_nothing_is_said_of_a_healthy_run(tmp_path: Path, life: Life) -> None:
    ended = Ended(tmp_path, life, 1)
    assert ended.statuses == [0, 0, 0]
    assert [path.name for path in tmp_path.iterdir() if path.read_text()] == []
    assert not list(tmp_path.glob("*.stacks.txt"))


def test_a_preempted_run_is_not_a_failed_one(tmp_path: Path) -> None:
    ended = Ended(tmp_path, are_preempted)
    assert ended.statuses == [75, 75, 75]
    assert not ended.read("stderr_{}") and not ended.read("ended_{}")
