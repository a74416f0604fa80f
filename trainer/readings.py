"""Numbers that the device computes and times that it reaches, read without waiting for what it does afterwards."""

from __future__ import annotations

from time import perf_counter

import torch


class Figure:
    """A scalar on its way to the host: behind all that its device was given so far, ahead of what comes later.

    Reading a tensor itself waits until everything queued by then is done, and the device is idle while the host
    queues more.

    Args:
        number: a scalar on any device.
    """

    def __init__(self, number: torch.Tensor) -> None:
        self._number = number.detach().to("cpu", non_blocking=True)  # from a GPU: into pinned memory
        self._arrival = torch.cuda.current_stream(number.device).record_event() if number.is_cuda else None

    @property
    def is_here(self) -> bool:
        """Whether it was on the host from the start: reading it waits for nothing, on every process alike."""
        return self._arrival is None

    def __float__(self) -> float:
        """Waits for it."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._number.item()


class Moment:
    """When a device is done with all that it was given so far, by its own clock. The CPU's is now.

    The host is ahead of a GPU by as much as a queue holds, and reads what a step gave whenever it is its turn: between
    two readings more or less than a step may have gone by.
    """

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self._at = perf_counter()
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(device))

    def seconds_until(self, later: Moment) -> float:
        """Waits until both are past."""
        if self._event is None or later._event is None:
            return later._at - self._at
        later._event.synchronize()
        return self._event.elapsed_time(later._event) / 1000
