"""What a process of the run says of itself every few seconds, for the watchdog to compare with the others."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from trainer.errors import EXIT_FAILURE, as_read
from trainer.launchers import host_name
from trainer.watch.blame import causes, is_machines

# How the libraries report that another process is gone: the cause lies there, not here.
_LOST_PEER = (
    "closed by peer",
    "reset by peer",
    "connection refused",
    "broken pipe",
    "remote process exited",
    "nccl",
    "gloo/transport",
    "timed out waiting",
    "socket timeout",
    "failed to recv, got 0 bytes",
)
_MAX_ERROR_TEXT = 2000  # characters: a CUDA error can be pages long
# A thread that used less of a core than this was blocked, not computing.
_IDLE_SHARE = 0.1
_SHORTEST_LOOK = 0.1  # seconds; the clocks of threads tick coarsely
# Frames from the innermost in which a blocked call of torch.distributed shows: decorators and dispatch lie between.
_INNERMOST = 4
_COLLECTIVE_CODE = ("/torch/distributed/", "/torch/nn/parallel/", "/deepspeed/")
_FILE_CODE = "/torch/distributed/checkpoint/"  # blocked there means a slow disk
_BACKWARD_CODE = "/torch/autograd/"  # collectives of DDP are waited for inside backward, in C++


@dataclass(frozen=True)
class Failure:
    """An error that ends a process.

    Attributes:
        text: the error as users read it, with its type where packtrain did not foresee it.
        exit_status: with which the run has to end for it.
        is_secondary: it only says that another process is gone.
        blames: ranks that it names as its cause.
        host: the one whose machine is at fault; empty where none is.
    """

    text: str
    exit_status: int
    is_secondary: bool
    blames: list[int]
    host: str = ""


@dataclass(frozen=True)
class Beat:
    """Where a process is.

    Attributes:
        step, activity: of the last mark.
        quiet: seconds since the last mark.
        waiting: seconds for which the main thread has only been seen waiting for a collective or for its GPU.
        working: seconds for which it has only been seen outside such waits.
        on_host: it waits in a call on the host, which needs other processes; a GPU may also be busy with own work.
        alone: what it does while the others may wait for it; empty in common work.
        norms: ``(step, gradient norm)`` observed since the beat before.
        failure: what ended the main thread.
        left: the process is done.
    """

    step: int
    activity: str
    quiet: float = 0.0
    waiting: float = 0.0
    working: float = 0.0
    on_host: bool = False
    alone: str = ""
    norms: list[tuple[int, float]] = field(default_factory=list)
    failure: Failure | None = None
    left: bool = False


def describe_failure(error: BaseException) -> Failure:
    """`error` as the other processes need to know it."""
    text = as_read(error)
    if len(text) > _MAX_ERROR_TEXT:
        text = f"{text[:_MAX_ERROR_TEXT]} ..."
    chain = list(causes(error))
    # Saving and loading in parts tell every process who failed (torch.distributed.checkpoint's CheckpointException).
    told = [getattr(link, "failures", None) for link in chain]
    reported: dict[int, Any] = next((failures for failures in told if isinstance(failures, dict)), {})
    blamed = [rank for rank, (cause, _) in sorted(reported.items()) if not _looks_like_lost_peer(cause)]
    secondary = not blamed if reported else any(map(_looks_like_lost_peer, chain))
    return Failure(text, getattr(error, "exit_status", EXIT_FAILURE), secondary, blamed, blamed_host(error))


def blamed_host(error: BaseException) -> str:
    """The host that `error` names as the one at fault, else this one if its machine is; empty where none is."""
    return getattr(error, "blamed", "") or (host_name(os.environ) if is_machines(error) else "")


def _looks_like_lost_peer(error: BaseException) -> bool:
    # torch's own (DistError, DistBackendError and so on) derive from RuntimeError.
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _LOST_PEER)


class Pulse:
    """Notes of the thread that makes it, and beats made of them by another thread.

    Args:
        gpu: number of this process's CUDA device among the visible ones; None on the CPU.
        probe_after: seconds without a mark after which the GPU is asked whether it is busy.
    """

    def __init__(self, gpu: int | None, probe_after: float) -> None:
        self.failure: Failure | None = None
        self._alone = ""
        self._place = (0, "starting", time.monotonic())
        self._told = (0, "")
        self._norms: deque[tuple[int, float]] = deque()
        self._main = threading.get_ident()
        self._gpu = None if gpu is None else _GpuProbe(gpu)
        self._probe_after = probe_after
        self._since: tuple[bool, float] = (False, time.monotonic())  # (waits, from when on)
        self._clocks, self._shares = (time.monotonic(), 0.0, 0.0), (1.0, 1.0)

    def mark(self, step: int, activity: str) -> bool:
        """A new place. One assignment, so that the reading thread sees all of it or nothing.

        Returns:
            Whether it differs from what the last beat said.
        """
        self._place = (step, activity, time.monotonic())
        return (step, activity) != self._told

    def observe(self, step: int, norm: float) -> None:
        """To be told once, in the next beat."""
        self._norms.append((step, norm))

    @contextlib.contextmanager
    def alone(self, activity: str) -> Iterator[None]:
        """Inside, this process works while the others may wait."""
        before, self._alone = self._alone, activity
        try:
            yield
        finally:
            step, common, _ = self._place
            self.mark(step, common)  # before the flag falls: the quiet time starts here
            self._alone = before

    def beat(self, left: bool = False) -> Beat:
        """Looks at the main thread. For one calling thread."""
        now = time.monotonic()
        alone = self._alone  # read before the place: when it has fallen the mark behind it is seen
        step, activity, marked = self._place
        self._told = (step, activity)
        quiet = now - marked
        slept = now - self._clocks[0] > self._probe_after  # the whole process did, and so nobody looked
        on_host = self._waits_on_host()
        waits = on_host or (self._gpu is not None and quiet > self._probe_after and self._gpu.is_busy())
        if waits != self._since[0] or slept:
            self._since = (waits, now)
        lasting = now - max(marked, self._since[1])
        norms = [self._norms.popleft() for _ in range(len(self._norms))]
        waiting, working = (lasting, 0.0) if waits else (0.0, lasting)
        return Beat(step, activity, quiet, waiting, working, on_host, alone, norms, self.failure, left)

    def _waits_on_host(self) -> bool:
        main_share, process_share = self._cpu_shares()
        frame, files = sys._current_frames().get(self._main), list[str]()
        while frame is not None and len(files) < _INNERMOST:
            files.append(frame.f_code.co_filename.replace(os.sep, "/"))
            frame = frame.f_back
        if files and _BACKWARD_CODE in files[0]:
            return process_share < _IDLE_SHARE  # other threads of the process may compute the backward pass
        in_collective = any(code in name and _FILE_CODE not in name for name in files for code in _COLLECTIVE_CODE)
        return in_collective and main_share < _IDLE_SHARE

    def _cpu_shares(self) -> tuple[float, float]:
        """Shares of a core that the main thread and the whole process have used since the last look."""
        now, (last, last_main, last_process) = time.monotonic(), self._clocks
        elapsed = now - last
        if elapsed > _SHORTEST_LOOK:
            main, process = time.clock_gettime(time.pthread_getcpuclockid(self._main)), time.process_time()
            self._shares = ((main - last_main) / elapsed, (process - last_process) / elapsed)
            self._clocks = (now, main, process)
        return self._shares


class _GpuProbe:
    """Whether work is queued on the GPU's default stream, without touching Python's lock.

    torch's `Stream.query` holds the lock, and a driver that is stuck would stop all threads with it. So a thread of
    its own asks the driver (``cuStreamQuery``), and one that does not come back counts as busy.
    """

    _NOT_READY = 600  # CUDA_ERROR_NOT_READY

    def __init__(self, gpu: int) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")  # calls of a CDLL release Python's lock
        self._number = gpu
        self._asked, self._answered = threading.Event(), threading.Event()
        self._busy = False
        threading.Thread(target=self._ask, name="gpu probe", daemon=True).start()

    def is_busy(self) -> bool:
        """Waits at most half a second for the answer."""
        self._answered.clear()
        self._asked.set()
        return self._busy if self._answered.wait(0.5) else True

    def _ask(self) -> None:
        device, context = ctypes.c_int(), ctypes.c_void_p()
        ready = False
        while True:
            self._asked.wait()
            self._asked.clear()
            if not ready:
                self._driver.cuInit(0)
                self._driver.cuDeviceGet(ctypes.byref(device), self._number)
                self._driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)  # the one torch uses
                self._driver.cuCtxSetCurrent(context)
                ready = True
            self._busy = self._driver.cuStreamQuery(None) == self._NOT_READY
            self._answered.set()
