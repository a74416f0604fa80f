"""Signals that ask the run to stop in order to be resumed."""

from __future__ import annotations

import logging
import signal
from types import FrameType

logger = logging.getLogger(__name__)


class StopRequest:
    """Set by SIGTERM, SIGUSR2 (time limit, preemption) or Ctrl-C; the loop reads it at step boundaries.

    The handler only sets a flag: saving inside a handler would interrupt a step half-way. A second Ctrl-C raises
    KeyboardInterrupt as usual.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        logger.warning("%s received: saving a checkpoint after this step, then stopping", self.reason)
