"""A server that another program is: started, watched until it answers and after, and ended with all it has started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from launch.local import LINES_SHOWN, POLL_SECONDS, how_it_ended
from trainer.children import die_with
from trainer.errors import PacktrainError, first_error

SECONDS_TO_STOP = 30.0  # between the request to end and the end of patience
SECONDS_FOR_LAST_LINES = 1.0
HIDDEN = "***"
STOPS = (signal.SIGINT, signal.SIGTERM)
T = TypeVar("T")


class Server:
    """A child process in a session of its own, whose output goes on to stderr; a context manager that ends it.

    Args:
        received: signals that have come in, as `launch.local.received_signals` notes them.
        secret: never shown, should the child print it.
    """

    def __init__(
        self, command: Sequence[str], environ: Mapping[str, str], received: Sequence[int], secret: str = ""
    ) -> None:
        self._received, self._secret = received, secret
        self._last: deque[str] = deque(maxlen=LINES_SHOWN)
        self._first_error = ""
        self._process = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in a terminal is for this process alone, which passes it on once
            preexec_fn=die_with(os.getpid(), signal.SIGTERM),  # so that it can end its own children
        )
        self._reader = threading.Thread(target=self._pass_on_output, daemon=True)
        self._reader.start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def wait_until(self, answers: Callable[[], bool], seconds: float) -> None:
        """Returns when `answers` first says so.

        Raises:
            PacktrainError: the child ended, a signal came, or `seconds` are over.
            KeyboardInterrupt: Ctrl-C.
        """
        deadline = time.monotonic() + seconds
        while not answers():
            self._check()
            if time.monotonic() > deadline:
                raise PacktrainError(
                    f"the server does not answer after {seconds:g} s\n{self._last_lines()}"
                    "  fix: look at what it says; --wait SECONDS gives it longer"
                )
            time.sleep(POLL_SECONDS)

    def call(self, function: Callable[[], T]) -> T:
        """What `function` returns or raises, unless the child ends or a signal comes before; see `wait_until`."""
        pool = ThreadPoolExecutor(1)
        try:
            future = pool.submit(function)
            while not future.done():
                self._check()
                time.sleep(POLL_SECONDS)
            return future.result()
        finally:
            pool.shutdown(wait=False)

    def wait(self) -> None:
        """Returns when a signal asks to stop.

        Raises:
            PacktrainError: the child ended by itself.
        """
        while not self._stops():
            self._check()
            time.sleep(POLL_SECONDS)

    def _check(self) -> None:
        """Raises what ends the waiting: that the child has ended, or a signal."""
        if (status := self._process.poll()) is not None:
            self._reader.join(SECONDS_FOR_LAST_LINES)
            why = f"; the first error it named: {self._first_error}" if self._first_error else ""
            raise PacktrainError(f"the server {how_it_ended(status)}{why}\n{self._last_lines()}".rstrip())
        if stops := self._stops():
            if signal.SIGINT in stops:
                raise KeyboardInterrupt
            raise PacktrainError("stopped by SIGTERM before the server answered")

    def _stops(self) -> list[int]:
        return [number for number in self._received if number in STOPS]

    def _stop(self) -> None:
        """Asks the child to end, and kills it where it does not or a second signal comes; then what it has left."""
        deadline, num_stops = time.monotonic() + SECONDS_TO_STOP, len(self._stops())
        if self._process.poll() is None:
            self._process.terminate()
        while self._process.poll() is None and time.monotonic() < deadline and len(self._stops()) <= max(1, num_stops):
            time.sleep(POLL_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _last_lines(self) -> str:
        return "".join(f"  {line}\n" for line in ["its last lines:", *self._last]) if self._last else ""

    def _pass_on_output(self) -> None:
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            line = raw.decode(errors="replace").rstrip("\n")
            shown = line.replace(self._secret, HIDDEN) if self._secret else line
            self._last.append(shown)
            self._first_error = self._first_error or first_error(shown)
            print(shown, file=sys.stderr, flush=True)
