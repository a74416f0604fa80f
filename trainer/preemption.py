"""Signals that ask the run to stop in order to be resumed."""

from __future__ import annotations

import logging
import signal
from types import FrameType

logger = logging.getLogger(__name__)


class StopRequest:
    """Set by SIGTERM, SIGUSR2 (time limit, preemption) or Ctrl-C; the loop reads it at step boundaries.

    The handler only sets a flag: saving inside a handler would interrupt a step half-way. Ctrl-C counts from
    `hold_interrupts` on, when there is something to save; a second one raises KeyboardInterrupt as usual.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGUSR2):
            self._catch(number)
        return self

    def hold_interrupts(self) -> None:
        """Takes Ctrl-C for a request to save and stop; before, it ends the program at once."""
        self._catch(signal.SIGINT)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _catch(self, number: int) -> None:
        self._previous[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        logger.warning("%s received: stopping after this step, with a checkpoint", self.reason)
