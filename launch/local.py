"""Processes of one run on this host: started together, signalled together, and never left behind."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from trainer.children import die_with
from trainer.errors import EXIT_DONE, EXIT_FAILURE, EXIT_TO_BE_RESUMED, EXIT_USER_ERROR, PacktrainError
from trainer.launchers import LOOPBACK

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
# After the first failure: the watchdog needs up to half a minute to find and name who failed first ...
SECONDS_TO_END = 45.0
# ... but once rank 0 is gone, with whom it judges, or all others are, who is left may end by itself and no more.
SECONDS_AFTER_RANK_0 = 12.0
SECONDS_AFTER_SECOND_CTRL_C = 8.0
POLL_SECONDS = 0.05
LINES_SHOWN, TAIL_BYTES = 15, 1 << 14
INTERRUPTED = {-signal.SIGINT, 128 + signal.SIGINT}
SHOW_CURSOR = "\x1b[?25h"


class Rank:
    """One process of the run.

    Its rank 0 has the terminal; the others write to ``logs/rank_N.out``. Each is a session of its own: Ctrl-C in a
    terminal reaches the launcher alone, which passes it on once.
    """

    def __init__(self, command: Sequence[str], rank: int, environ: Mapping[str, str], logs: Path) -> None:
        self.rank = rank
        self._files = [logs / f"rank_{rank}.out", logs / f"rank_{rank}.log"]
        self._sizes = [file.stat().st_size if file.exists() else 0 for file in self._files]
        with contextlib.ExitStack() as stack:
            output = None if rank == 0 else stack.enter_context(open(self._files[0], "ab"))
            self.process = subprocess.Popen(
                command,
                env={**environ, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with(os.getpid()),
            )

    @property
    def status(self) -> int | None:
        """The exit status, a signal's number negative; None while it runs."""
        return self.process.poll()

    def send(self, number: int) -> None:
        """A signal for this process alone: what it has started, it ends."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """Ends this process and all that it has started, stopped ones too; what it left behind if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def last_lines(self) -> str:
        """What it has written last in this run; empty where that is nothing, or went to the terminal."""
        for file, size in zip(self._files, self._sizes, strict=True):
            if written := _tail(file, size).strip():
                lines = written.splitlines()[-LINES_SHOWN:]
                return "\n".join([f"the end of {file}:", *(f"  {line}" for line in lines)])
        return ""


def run_processes(
    command: Sequence[str],
    num_processes: int,
    environ: Mapping[str, str],
    logs: Path,
    goes_on: Callable[[], bool] = lambda: False,
) -> int:
    """Runs `command` once for each rank, with torchrun's environment variables, until all have ended.

    SIGINT, SIGTERM and SIGUSR2 are passed on to all; a second Ctrl-C ends them. When one fails, the others get time to
    find out why and to end by themselves, and are then ended.

    Args:
        logs: folder for what ranks above 0 write; rank 0 has this process's stdout and stderr.
        goes_on: asked where all have stopped in order to be resumed, and no signal has come: whether to start them
            again at once.

    Returns:
        0 all done; 2 the user's input is wrong; 75 stopped in order to be resumed; 1 failed, and rank 0 has said why.

    Raises:
        PacktrainError: a process failed that rank 0 cannot speak for; its last lines are in the message.
        KeyboardInterrupt: Ctrl-C ended the run before it could save.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with received_signals() as received:
        while True:
            status = _run_once(command, num_processes, environ, logs, received)
            if status != EXIT_TO_BE_RESUMED or received or not goes_on():
                return status


def _run_once(
    command: Sequence[str], num_processes: int, environ: Mapping[str, str], logs: Path, received: Sequence[int]
) -> int:
    shared = {
        **environ,
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(_free_port()),
    }
    shared.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_processes)))
    ranks: list[Rank] = []
    try:
        for rank in range(num_processes):
            ranks.append(Rank(command, rank, shared, logs))
        first_failed = _wait(ranks, received)
    finally:
        _send(ranks, signal.SIGKILL)
        _give_back_terminal(ranks)
    return _exit_status(ranks, first_failed, received)


def _wait(ranks: Sequence[Rank], received: Sequence[int]) -> tuple[Rank, int] | None:
    """Returns when all have ended, with the rank that failed first and its status."""
    first_failed: tuple[Rank, int] | None = None
    deadline = math.inf
    num_sent = 0
    while any(rank.status is None for rank in ranks):
        now = time.monotonic()
        for number in received[num_sent:]:
            num_sent += 1
            _send(ranks, number)
            if number == signal.SIGINT and _is_impatient(received):
                deadline = min(deadline, now + SECONDS_AFTER_SECOND_CTRL_C)
        if first_failed is None and (first_failed := _find_failed(ranks, received)):
            deadline = min(deadline, now + SECONDS_TO_END)
        if _nobody_waits(ranks, first_failed is not None, received):
            deadline = min(deadline, now + SECONDS_AFTER_RANK_0)
        if now > deadline:
            _send(ranks, signal.SIGKILL)
            return first_failed  # who was killed here is no cause
        time.sleep(POLL_SECONDS)
    return first_failed or _find_failed(ranks, received)


def _nobody_waits(ranks: Sequence[Rank], failed: bool, received: Sequence[int]) -> bool:
    """Whether those that still run have nobody left to find a cause with, or to meet: one died of a signal in time."""
    by_signal = {-number for number in received} | (INTERRUPTED if signal.SIGINT in received else set())
    others_ended = ranks[0].status is not None or all(rank.status is not None for rank in ranks[1:])
    return (failed and others_ended) or any(rank.status in by_signal for rank in ranks)


def _is_impatient(received: Sequence[int]) -> bool:
    """Ctrl-C came a second time: end now, saved or not."""
    return list(received).count(signal.SIGINT) > 1


def _send(ranks: Sequence[Rank], number: int) -> None:
    for rank in ranks:
        if number == signal.SIGKILL:
            rank.kill()
        else:
            rank.send(number)


def _find_failed(ranks: Sequence[Rank], received: Sequence[int]) -> tuple[Rank, int] | None:
    """Of those found ended at once, one killed by a signal is the cause and the others its victims."""
    fine = _benign(received)
    failed = [(rank, status) for rank in ranks if (status := rank.status) is not None and status not in fine]
    return min(failed, key=lambda item: (item[1] >= 0, item[0].rank), default=None)


def _benign(received: Sequence[int]) -> set[int]:
    """Statuses that are no failure: a signal that was passed on may come before a process can handle it."""
    ended_by_us = {-number for number in received}
    return {EXIT_DONE, EXIT_TO_BE_RESUMED} | ended_by_us | (INTERRUPTED if signal.SIGINT in received else set())


def _exit_status(ranks: Sequence[Rank], first_failed: tuple[Rank, int] | None, received: Sequence[int]) -> int:
    statuses = {rank.status for rank in ranks}
    if _is_impatient(received) or (first_failed is None and statuses & INTERRUPTED):
        raise KeyboardInterrupt
    if first_failed is None:
        return EXIT_DONE if statuses == {EXIT_DONE} else EXIT_TO_BE_RESUMED
    rank, status = first_failed
    exit_status = EXIT_USER_ERROR if EXIT_USER_ERROR in statuses else EXIT_FAILURE
    if ranks[0].status == EXIT_USER_ERROR or (rank.rank == 0 and status > 0):
        return exit_status
    error = PacktrainError("\n".join(filter(None, [f"rank {rank.rank} {how_it_ended(status)}", rank.last_lines()])))
    error.exit_status = exit_status
    raise error


def _tail(file: Path, start: int) -> str:
    """What comes after `start` in the file, of much the end."""
    if not file.exists():
        return ""
    with open(file, "rb") as opened:
        opened.seek(max(start, file.stat().st_size - TAIL_BYTES))
        return opened.read().decode(errors="replace")


def how_it_ended(status: int) -> str:
    """An exit status in words; a signal's number is negative."""
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    return f"was killed by {name}" + (" (out of host memory?)" if status == -signal.SIGKILL else "")


@contextlib.contextmanager
def received_signals() -> Iterator[list[int]]:
    """Signals as they come in; nothing else happens on them. Those that were ignored stay so (nohup)."""
    received: list[int] = []

    def receive(number: int, _: FrameType | None) -> None:
        received.append(number)

    previous = {n: signal.signal(n, receive) for n in FORWARDED if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((LOOPBACK, 0))
        return found.getsockname()[1]


def _give_back_terminal(ranks: Sequence[Rank]) -> None:
    """A progress bar hides the cursor; one that was killed could not show it again."""
    if ranks and (ranks[0].status or 0) < 0 and sys.stderr.isatty():
        sys.stderr.write(SHOW_CURSOR + "\n")
