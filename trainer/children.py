"""Child processes that do not outlive who started them."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable

from trainer.errors import EXIT_FAILURE

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with(parent: int, number: int = signal.SIGKILL) -> Callable[[], None]:
    """For a child before it becomes the command: the kernel sends it `number` when `parent` dies, in any way."""
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        libc.prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it died before it was asked for
            os._exit(EXIT_FAILURE)

    return prepare
