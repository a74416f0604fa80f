"""Reading, computing and writing at the same time, one tensor after the other, in a fixed amount of memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")


class Buffer:
    """Host memory for one tensor at a time. Used again and again: the kernel's zeroing of new pages is not cheap."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def room(self, nbytes: int) -> torch.Tensor:
        """``[nbytes]`` uint8, whatever it held before."""
        if len(self._bytes) < nbytes:
            self._bytes = torch.empty(0, dtype=torch.uint8)  # gone before the larger one is made
            self._bytes = torch.empty(nbytes, dtype=torch.uint8)
        return self._bytes[:nbytes]


def run_pipeline(
    items: Iterable[Item],
    read: Callable[[Item, Buffer], torch.Tensor],
    compute: Callable[[Item, torch.Tensor], torch.Tensor],
    write: Callable[[Item, torch.Tensor], None],
    num_buffers: int,
) -> None:
    """Takes every item, in order, through `read` (a thread), `compute` (this thread) and `write` (another thread).

    What one of them raises comes out here, after the threads have ended.

    Args:
        read: may use the buffer, which is its tensor's until that one is written.
        num_buffers: items that are under way at most, in whatever stage.
    """
    pending, free = iter(items), [Buffer() for _ in range(num_buffers)]
    reads: deque[tuple[Item, Buffer, Future[torch.Tensor]]] = deque()
    writes: deque[tuple[Buffer, Future[None]]] = deque()
    with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as writer:
        try:
            while True:
                while free and (found := next(pending, None)) is not None:
                    buffer = free.pop()
                    reads.append((found, buffer, reader.submit(read, found, buffer)))
                if reads:
                    item, buffer, reading = reads.popleft()
                    tensor = compute(item, reading.result())
                    writes.append((buffer, writer.submit(write, item, tensor)))
                    del tensor, reading  # held by whoever writes it, and no longer
                elif not writes:
                    return
                must_wait = not reads
                while writes and (must_wait or writes[0][1].done()):
                    buffer, writing = writes.popleft()
                    writing.result()
                    free.append(buffer)
                    must_wait = False
        finally:
            reader.shutdown(cancel_futures=True)
            writer.shutdown(cancel_futures=True)
