"""Imports are most of the time from a command to its first step. Imports no torch."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """For imports of whole libraries: modules stay as long as the process, so nothing among them is garbage.

    The collector would search all of them again and again, which takes a fifth of the time, and later in each of its
    full passes, between two steps.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
