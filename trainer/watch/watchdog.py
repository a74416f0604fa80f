"""Ends the run when one of its processes hangs, dies or diverges, and names it.

Every process beats to rank 0 over a connection of its own, from a thread of its own: no collective can delay it. Rank 0
compares the beats (`verdict.py`) and tells all the same verdict; a closed connection is a process that ended:
it shows at once. Only rank 0's own silence or end is judged by the others, each for itself.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from trainer.errors import PacktrainError, Preempted
from trainer.launchers import host_name
from trainer.processes import Processes
from trainer.watch.beatline import Hub, Line, Spoke, open_listener
from trainer.watch.heartbeat import Failure, Pulse, blamed_host, describe_failure
from trainer.watch.verdict import Limits, Member, Verdict

logger = logging.getLogger(__name__)


class RankFailed(PacktrainError):
    """Another rank ended the run. The watchdog has told the user already.

    Args:
        verdict: names rank, host, step and cause.
    """

    told = True

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.message)
        self.exit_status, self.blamed, self.is_loss = verdict.exit_status, verdict.host, verdict.is_loss


class Watchdog:
    """Watches over the processes of a run, from `__enter__` to `__exit__` on all of them. Alone it does nothing.

    After a verdict the process has ``limits.grace`` seconds to end by itself and is ended then, wherever it stands: it
    may hang in a collective, or in taking down the process group.

    Args:
        processes: of the run; their process group is used once, to exchange addresses.
        logs: folder of ``rank_N.log``; ``rank_N.stacks.txt`` beside it gets the stacks of all threads at the end.

    Attributes:
        on_end: called with the verdict in the process that tells the user, in the watchdog's thread.
    """

    on_end: Callable[[Verdict], None] | None = None

    def __init__(self, processes: Processes, logs: Path, limits: Limits | None = None) -> None:
        self._processes, self._logs = processes, logs
        self._limits = limits or Limits()
        self._watches = processes.world_size > 1
        gpu = processes.device.index if self._watches and processes.device.type == "cuda" else None
        self._pulse = Pulse(gpu, self._limits.probe)
        self._verdict: Verdict | None = None
        self._woke, self._asked = 0.0, False
        self._leaving, self._over = threading.Event(), threading.Event()

    def __enter__(self) -> Watchdog:
        if self._watches:
            self._logs.mkdir(parents=True, exist_ok=True)
            # Open before it is needed: faulthandler writes to it when Python no longer runs.
            self._stacks = open(self._stacks_path, "a", encoding="utf-8")
            self._line = self._connect()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not self._watches:
            return
        raised = self.fail(error) if error and not self._asked else error
        self._leaving.set()
        self._line.wake()
        self._over.wait(2 * self._limits.drain + self._limits.leave)
        if raised is not error and raised is not None:
            raise raised
        if error is None and self._verdict is not None:
            raise RankFailed(self._verdict)

    def blamed(self, error: BaseException) -> str:
        """The host whose machine is at fault for `error`, which ends this process; empty where none is."""
        return self._verdict.host if self._verdict else blamed_host(error)

    def mark(self, step: int, activity: str) -> None:
        """This process is about to do `activity` after `step` steps. Costs a microsecond."""
        now = time.monotonic()
        if self._pulse.mark(step, activity) and self._watches and now - self._woke > self._limits.beat / 2:
            self._woke = now
            self._line.wake()  # news is told early: a process may die before its next beat

    def observe(self, step: int, grad_norm: float) -> None:
        """The gradient norm of `step`, which all ranks must find alike."""
        if self._watches:
            self._pulse.observe(step, grad_norm)

    @contextlib.contextmanager
    def alone(self, activity: str) -> Iterator[None]:
        """Inside, this process does what the others may wait for however long it takes; it must not die or stop."""
        with self._pulse.alone(activity):
            yield

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """An error that leaves it is told to the others at once: what it passes on its way out may take minutes."""
        try:
            yield
        except BaseException as error:
            self._tell_others(error)
            raise

    def fail(self, error: BaseException) -> BaseException:
        """The main thread failed: tells the others and waits to learn whether one of them is the cause.

        Returns:
            The error to raise here: `error`, or a `RankFailed` caused by it that names the culprit.
        """
        failure = self._tell_others(error)
        if failure is None:
            return error
        self._asked = True
        if isinstance(error, KeyboardInterrupt) or not self._over.wait(self._limits.fail):
            return error
        verdict = self._verdict
        if verdict is None:
            return error
        if self._processes.rank in verdict.culprits or not (failure.is_secondary or failure.blames):
            return error
        other = RankFailed(verdict)
        other.__cause__ = error
        return other

    def _tell_others(self, error: BaseException) -> Failure | None:
        """None where nobody failed: all stop together in order to be resumed."""
        if not self._watches or isinstance(error, Preempted):
            return None
        failure = self._pulse.failure = self._pulse.failure or describe_failure(error)
        self._line.wake()
        return failure

    @property
    def _stacks_path(self) -> Path:
        return self._logs / f"rank_{self._processes.rank}.stacks.txt"

    def _connect(self) -> Line:
        """Rank 0 listens on a free port; a token keeps strangers out."""
        processes = self._processes
        listener = open_listener() if processes.is_first else None
        token = secrets.token_hex(16) if processes.is_first else ""
        port = listener.getsockname()[1] if listener else 0
        told = processes.gather((host_name(os.environ), os.getpid(), port, token))
        members = [Member(rank, host, pid) for rank, (host, pid, _, _) in enumerate(told)]
        _, _, port, token = told[0]
        if listener:
            return Hub(listener, token, members, self._limits)
        address = (processes.master_addr, port)
        return Spoke(address, token, processes.rank, members, self._limits)

    def _watch(self) -> None:
        """The watchdog's thread."""
        verdict = None
        while verdict is None and not self._leaving.is_set():
            # Where a call holds Python's lock this thread gets no turn; the stacks are kept all the same.
            faulthandler.dump_traceback_later(self._limits.silence, file=self._stacks)
            verdict = self._line.exchange(self._pulse.beat(), self._limits.beat)
        faulthandler.cancel_dump_traceback_later()
        verdict = verdict or self._line.leave(lambda: self._pulse.beat(left=True))
        if verdict is None:
            self._leave()
        else:
            self._end(verdict)

    def _leave(self) -> None:
        self._stacks.close()
        if not self._stacks_path.stat().st_size:
            self._stacks_path.unlink()
        self._over.set()

    def _end(self, verdict: Verdict) -> None:
        """Tells and keeps what is known, and ends this process: nothing in here may be waited for without end."""
        self._verdict = verdict
        faulthandler.dump_traceback_later(1.5 * self._limits.grace, file=self._stacks, exit=True)
        self._line.announce(verdict)
        if self._processes.rank == verdict.speaker:
            with contextlib.suppress(OSError, ValueError):
                print(verdict.message, file=sys.stderr, flush=True)
        tells = self._processes.rank == (verdict.speaker or 0)
        deadline = time.monotonic() + self._limits.grace + (0.0 if tells else self._limits.courtesy)
        for step in (self._dump_stacks, self._log, self._tell_owner, self._line.close):
            try:
                step(verdict)
            except Exception:
                logger.exception("watchdog: %s failed", step.__name__)
        self._over.set()
        time.sleep(max(0.0, deadline - time.monotonic()))
        if verdict.speaker is None and self._processes.is_first:  # its main thread had the time to, and is stuck
            print(verdict.message, file=sys.stderr, flush=True)
            if self.on_end:
                self.on_end(verdict)
        _flush_logs()
        os._exit(verdict.exit_status)

    def _dump_stacks(self, verdict: Verdict) -> None:
        self._stacks.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {verdict.message}\n")
        self._stacks.flush()
        faulthandler.dump_traceback(self._stacks)

    def _log(self, verdict: Verdict) -> None:
        """To the log files alone: the terminal has the message from one rank."""
        text = f"{verdict.message}\nthe stacks of this process: {self._stacks_path}"
        record = logger.makeRecord(logger.name, logging.ERROR, __file__, 0, text, (), None)
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handle(record)

    def _tell_owner(self, verdict: Verdict) -> None:
        if self._processes.rank == verdict.speaker and self.on_end:
            self.on_end(verdict)


def _flush_logs() -> None:
    stream: TextIO
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    for handler in logging.getLogger().handlers:
        with contextlib.suppress(OSError, ValueError):
            handler.flush()
