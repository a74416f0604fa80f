"""Takes many tensors through the same steps, several at once, in a fixed amount of memory."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch

POLL_SECONDS = 0.1
Step = Callable[[Any, Any], Any]  # an item and what the step before made of it


@dataclass(frozen=True)
class InTurn:
    """A step that takes one item after the other, in their order."""

    run: Step


class Buffer:
    """Host memory for one tensor at a time. Used again and again: the kernel's zeroing of new pages is not cheap.

    Args:
        nbytes: of the largest tensor that it is for; a larger one gets memory of its own.
        pinned: a GPU copies from and to it at its full rate.
    """

    def __init__(self, nbytes: int = 0, pinned: bool = False) -> None:
        self._bytes = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)

    def room(self, nbytes: int) -> torch.Tensor:
        """``[nbytes]`` uint8, whatever it held before."""
        return self._bytes[:nbytes] if nbytes <= len(self._bytes) else torch.empty(nbytes, dtype=torch.uint8)


def run_pipeline(
    items: Iterable[Any],
    steps: Sequence[Step | InTurn],
    num_workers: int,
    buffer_bytes: int = 0,
    device: torch.device | None = None,
) -> None:
    """Takes every item through all `steps`; the first gets a buffer, which is the item's until its last step is done.

    A worker is a thread that takes one item after the other: as many are under way at most. It has its share of the
    processors, and on CUDA a stream of its own. Where a step fails, the items before that one still come to their end.

    Raises:
        Exception: what the step of the earliest item raised, after all threads have ended.
    """
    turns, pending, lock = _Turns(len(steps)), enumerate(items), threading.Lock()
    on_gpu = device is not None and device.type == "cuda"
    num_threads = torch.get_num_threads()
    own_threads = max(1, min(num_threads, len(os.sched_getaffinity(0)) // num_workers))

    def work() -> None:
        torch.set_num_threads(own_threads)
        buffer = Buffer(buffer_bytes, pinned=on_gpu)
        with torch.cuda.stream(torch.cuda.Stream(device)) if on_gpu else contextlib.nullcontext():
            while True:
                with lock:
                    number, item = next(pending, (None, None))
                if number is None or not turns.take(number, item, buffer, steps):
                    return

    with ThreadPoolExecutor(num_workers, "worker") as pool:
        try:
            workers = [pool.submit(work) for _ in range(num_workers)]
            # A signal's handler runs in the main thread alone, which does not wake for one that another thread got.
            while wait(workers, POLL_SECONDS).not_done:
                pass
            for ended in workers:
                ended.result()
        except BaseException as error:  # such as Ctrl-C
            turns.fail(-1, error)
            raise
        finally:
            torch.set_num_threads(num_threads)  # a worker's call holds for threads that are yet to be
    if turns.failure is not None:
        raise turns.failure


class _Dropped(Exception):
    """An item before this one has failed."""


class _Turns:
    """Who may go on: an item's step in turn only after that of the item before, and nothing after a failure."""

    def __init__(self, num_steps: int) -> None:
        self.failure: BaseException | None = None
        self._failed: float = math.inf
        self._next, self._changed = [0] * num_steps, threading.Condition()

    def take(self, number: int, item: Any, buffer: Buffer, steps: Sequence[Step | InTurn]) -> bool:
        """Takes one item through all steps; False where the worker has to end."""
        value: Any = buffer
        try:
            for place, step in enumerate(steps):
                if isinstance(step, InTurn):
                    with self._turn(place, number):
                        value = step.run(item, value)
                else:
                    self._check(number)
                    value = step(item, value)
        except _Dropped:
            return False
        except BaseException as error:
            self.fail(number, error)
            return False
        return True

    def fail(self, number: int, error: BaseException) -> None:
        """Ends every item behind `number`."""
        with self._changed:
            if number < self._failed:
                self._failed, self.failure = number, error
            self._changed.notify_all()

    def _check(self, number: int) -> None:
        if self._failed < number:
            raise _Dropped

    @contextlib.contextmanager
    def _turn(self, place: int, number: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._next[place] == number or self._failed < number)
            self._check(number)
        yield
        with self._changed:
            self._next[place] += 1
            self._changed.notify_all()
