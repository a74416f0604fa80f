"""Processes that stay joined between tests, so that a process group is started once and not for every test.

They are forked from a server that has imported torch, transformers, peft and bitsandbytes once: starting a group takes
a second instead of a dozen for each process, and the processes share the memory of what was imported.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PRELOADED = [
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "transformers.models.llama.modeling_llama",
    "peft",
    "bitsandbytes.optim",
    "deepspeed",
    "trainer.run",
]
GRACE = 5.0  # seconds in which the other ranks may tell what they know of a failure
BYTES_EACH = 700 * 2**20  # a process at work, at most


class WorkerFailed(Exception):
    """A rank raised, died or took too long; the text holds every rank's traceback or stack."""


class Pool:
    """`size` processes in one group, each with one thread.

    Args:
        size: number of ranks, all of one host.
        on_gpus: one each, over NCCL; else the CPU over gloo, whatever the host has.
    """

    def __init__(self, size: int, on_gpus: bool = False) -> None:
        self.size = size
        self._folder = Path(tempfile.mkdtemp(prefix="packtrain-pool-"))
        context: Any = multiprocessing.get_context("spawn") if on_gpus else _context()  # CUDA cannot be forked
        port = free_port()
        self._connections: list[Connection] = []
        self._workers = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            worker = context.Process(
                target=_serve, args=(rank, size, port, theirs, self._log(rank), on_gpus), daemon=True
            )
            worker.start()
            theirs.close()
            self._connections.append(ours)
            self._workers.append(worker)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """Calls ``function(processes, *args)`` on every rank.

        Args:
            function: at the top of a module; arguments and results travel by pickle.
            timeout: seconds.

        Returns:
            The results, by rank.

        Raises:
            WorkerFailed: a rank did; the pool is closed, since the others may be waiting for it anywhere.
        """
        assert self.is_open, "ask for the pool again"
        call = pickle.dumps((function, args))
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout
        for connection in self._connections:
            with contextlib.suppress(OSError):  # a dead rank is told below, by its silence
                connection.send_bytes(call)
        while len(answers) < self.size and (left := deadline - time.monotonic()) > 0:
            pending = {c: rank for rank, c in enumerate(self._connections) if rank not in answers}
            for ready in wait(list(pending), left):
                assert isinstance(ready, Connection)
                answers[pending[ready]] = self._answer(pending[ready], ready)
                if not answers[pending[ready]][0]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        if len(answers) < self.size or not all(good for good, _ in answers.values()):
            raise WorkerFailed(self._explain(answers, timeout))
        return [answers[rank][1] for rank in range(self.size)]

    @property
    def is_open(self) -> bool:
        """Whether another `run` may come."""
        return bool(self._workers)

    def close(self) -> None:
        """Ends the processes."""
        for worker in self._workers:
            worker.kill()  # leaving the group in order would need every rank's help
        for worker in self._workers:
            worker.join()
        for connection in self._connections:
            connection.close()
        self._workers, self._connections = [], []
        shutil.rmtree(self._folder, ignore_errors=True)

    def _answer(self, rank: int, connection: Connection) -> tuple[bool, Any]:
        try:
            return pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            self._workers[rank].join(GRACE)
            return False, f"died with exit code {self._workers[rank].exitcode}\n{self._tail(rank)}"

    def _explain(self, answers: dict[int, tuple[bool, Any]], timeout: float) -> str:
        silent = [rank for rank in range(self.size) if rank not in answers]
        for rank in silent:
            with contextlib.suppress(OSError):
                os.kill(self._workers[rank].pid or 0, signal.SIGUSR1)
        time.sleep(1.0 if silent else 0.0)
        texts = [f"rank {rank}: {text}" for rank, (good, text) in sorted(answers.items()) if not good]
        if not texts:
            texts = [f"not done after {timeout:.0f} s"]
        texts += [f"rank {rank} was still at:\n{self._tail(rank)}" for rank in silent]
        self.close()
        return f"on {self.size} processes\n" + "\n".join(texts)

    def _log(self, rank: int) -> Path:
        return self._folder / f"rank_{rank}.log"

    def _tail(self, rank: int) -> str:
        with contextlib.suppress(OSError):
            return self._log(rank).read_text(errors="replace")[-6000:]
        return ""


class Pools:
    """A pool for every number of processes asked for; the ones used longest ago make room where memory is short."""

    def __init__(self) -> None:
        self._pools: dict[int, Pool] = {}

    def __call__(self, size: int) -> Pool:
        pool = self._pools.pop(size, None)
        if pool is None or not pool.is_open:
            while self._pools and _available_bytes() < size * BYTES_EACH:
                self._pools.pop(next(iter(self._pools))).close()
            pool = Pool(size)
        self._pools[size] = pool  # the last one is the one used last
        return pool

    def close(self) -> None:
        """Ends all processes."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()


class Started:
    """``python -m trainer ARGUMENTS`` on `size` processes of their own, as torchrun would start them.

    Args:
        folder: for what each rank says, ``said_<rank>.log``.
        before: called with the rank in each process before it starts, at the top of a module.
    """

    def __init__(
        self, size: int, arguments: list[str], folder: Path, before: Callable[[int], None] | None = None
    ) -> None:
        port, self.folder = free_port(), folder
        self._ranks = [_start_rank(rank, size, port, arguments, folder, before) for rank in range(size)]

    def send(self, number: signal.Signals) -> None:
        """A signal to all that run."""
        for rank in self._ranks:
            if rank.is_alive():
                os.kill(rank.pid or 0, number)

    def kill(self) -> None:
        """SIGKILL to all of them, at once."""
        for rank in self._ranks:
            rank.kill()
        self.wait(GRACE)

    def wait(self, timeout: float) -> list[int | None]:
        """Exit statuses by rank, once all have ended; None for one that has not after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        for rank in self._ranks:
            rank.join(max(0.0, deadline - time.monotonic()))
        return [rank.exitcode for rank in self._ranks]

    @property
    def is_alive(self) -> bool:
        """Whether all are."""
        return all(rank.is_alive() for rank in self._ranks)

    def said(self) -> str:
        """What all ranks wrote to their terminals."""
        return "\n".join(f"{path.name}:\n{path.read_text()}" for path in sorted(self.folder.glob("said_*.log")))


def _start_rank(
    rank: int, size: int, port: int, arguments: list[str], folder: Path, before: Callable[[int], None] | None
) -> BaseProcess:
    environ = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    variables = {name: str(value) for name, value in environ.items()}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    log = folder / f"said_{rank}.log"
    process = _context().Process(target=_main, args=(arguments, variables, log, rank, before), daemon=True)
    process.start()
    return process


def _main(
    arguments: list[str], variables: dict[str, str], log: Path, rank: int, before: Callable[[int], None] | None
) -> None:
    _settle(log)
    os.environ.update(variables)
    sys.argv = ["trainer", *arguments]
    if before:
        before(rank)
    from trainer.__main__ import main

    sys.exit(main())


def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _serve(rank: int, size: int, port: int, connection: Connection, log: Path, on_gpus: bool) -> None:
    """A rank's life: joins the group, then answers calls until nobody calls any more."""
    _settle(log, on_gpus)
    import torch

    from trainer.launchers import World
    from trainer.processes import start_processes

    torch.set_num_threads(1)
    with start_processes(World(rank, size, rank, size, "127.0.0.1", port), needs_group=True) as processes:
        while True:
            try:
                call = connection.recv_bytes()
            except EOFError:
                os._exit(0)
            try:
                function, args = pickle.loads(call)
                answer = pickle.dumps((True, function(processes, *args)))
            except BaseException:
                answer = pickle.dumps((False, traceback.format_exc()))
            connection.send_bytes(answer)
            _keep()


def _settle(log: Path, on_gpus: bool = False) -> None:
    """What a rank says, and the stacks it leaves, go to its own file."""
    if not on_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    file = open(log, "w", buffering=1)  # noqa: SIM115 - as long as the process
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    faulthandler.enable(file)
    faulthandler.register(signal.SIGUSR1, file)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _keep()


def _keep() -> None:
    """What there is stays, and is no longer searched for garbage, as DeepSpeed does again and again.

    That is a million imported objects, and those of every engine there was: autograd never lets go of their functions.
    """
    gc.collect()
    gc.freeze()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def free_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _available_bytes() -> int:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024
