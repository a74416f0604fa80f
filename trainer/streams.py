"""A second stream beside the one that computes; on the CPU, where all runs in order, it is none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

Mark = torch.cuda.Event | None


class SideStream:
    """Copies and collectives that run beside the computation on `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """What is queued inside begins when what was queued before is done, and runs beside what is queued later."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> Mark:
        """For `wait`: what has been queued beside so far."""
        return None if self._stream is None else self._stream.record_event()

    def wait(self, mark: Mark) -> None:
        """Lets what is queued from now on in the stream that computes begin when `mark` is reached."""
        if mark is not None:
            torch.cuda.current_stream(self._device).wait_event(mark)

    def wait_for_all(self) -> None:
        """As `wait`, for everything."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
