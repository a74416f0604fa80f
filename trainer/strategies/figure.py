"""A number that the device computes, read without waiting for what it was given to do afterwards."""

from __future__ import annotations

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
