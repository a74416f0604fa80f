"""Signals that ask the run to stop in order to be resumed."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from trainer.errors import Preempted

logger = logging.getLogger(__name__)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
POLL_SECONDS = 0.2  # until the thread that waits for signals sees that it is no longer needed


class StopRequest:
    """Set by SIGTERM, SIGUSR2 (time limit, preemption) or Ctrl-C; asked where the run can stop.

    The first two are blocked as long as this is entered, and a thread waits for them. One that came before, while
    Python was importing, is found too if it was blocked by then (`slurm.job` does so). And SLURM signals every process
    of a job step: threads and child processes begin with the mask of the thread that starts them, so neither a worker
    nor a compiler nor a tracker's server dies of a signal that is meant for the run.

    Ctrl-C counts from `hold_interrupts` on, when there is something to save; a second one raises KeyboardInterrupt as
    usual.
    """

    def __init__(self) -> None:
        self._reason: str | None = None
        self._since = 0.0
        self._looks = False
        self._mask: set[int] = set()
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        self._mask = {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)}
        self._looks = True
        for number in STOP_SIGNALS:
            self._catch(number)  # a thread that was there before has them unblocked
        self._waiter = threading.Thread(target=self._wait, name="signals", daemon=True)
        self._waiter.start()
        return self

    def hold_interrupts(self) -> None:
        """Takes Ctrl-C for a request to save and stop; before, it ends the program at once."""
        self._catch(signal.SIGINT)

    @property
    def reason(self) -> str | None:
        """The signal that asks for a stop, by its name; None while none has come."""
        if self._looks:
            self._look()
        return self._reason

    @property
    def age(self) -> float:
        """Seconds since a stop was first asked for, as far as is known; 0 while none was."""
        return time.monotonic() - self._since if self._since else 0.0

    def check(self) -> None:
        """Returns while no stop is asked for.

        Raises:
            Preempted: one is.
        """
        if self.reason:
            raise Preempted(f"stopped by {self.reason}; the same command goes on from there")

    @contextlib.contextmanager
    def cut_short(self) -> Iterator[None]:
        """Ends what is inside where `check` says so; that all processes stop has to be agreed on behind it."""
        with contextlib.suppress(Preempted):
            yield

    def __exit__(self, *_: object) -> None:
        self._looks = False
        self._waiter.join()
        self._look()  # one that is still there would end the process with its work done
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _wait(self) -> None:
        while self._looks:
            if found := signal.sigtimedwait(STOP_SIGNALS, POLL_SECONDS):
                self._receive(found.si_signo, None)

    def _look(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # Python's multiprocessing may have unblocked one
        while found := signal.sigtimedwait(STOP_SIGNALS, 0):
            self._receive(found.si_signo, None)

    def _catch(self, number: int) -> None:
        self._previous[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._reason, self._since = signal.Signals(number).name, self._since or time.monotonic()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        logger.warning("%s received: stopping after this step, with a checkpoint", self._reason)
