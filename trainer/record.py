"""What a run says of itself: ``state.json``, log files, and how it ended, whichever process and error that was."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from functools import partial

import torch

from trainer.checkpoint.layout import RunDir, write_atomically
from trainer.config import RunConfig
from trainer.errors import PacktrainError, Preempted
from trainer.metrics.report import write_report
from trainer.metrics.trackers import read_metrics
from trainer.processes import Processes
from trainer.recipe import dump_recipe
from trainer.watch.watchdog import Watchdog

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def watched(run: RunDir, processes: Processes) -> Iterator[Watchdog]:
    """A watchdog over the processes; whatever ends this one is told to the others before it leaves."""
    with Watchdog(processes, run.logs) as watchdog:
        try:
            yield watchdog
        except KeyboardInterrupt:
            raise
        except Preempted as stop:
            if processes.is_first:
                _write_preempted(run, stop)
            processes.barrier()  # the first one out may have the launcher end the others
            raise
        except BaseException as error:
            cause = watchdog.fail(error)  # another process may have been the first to fail
            if cause is error:
                raise
            raise cause from error


@contextlib.contextmanager
def recorded(run: RunDir, config: RunConfig, processes: Processes, watchdog: Watchdog) -> Iterator[None]:
    """From here on the run dir is ours: recipe, log files, and a ``state.json`` that says how it ended."""
    run.logs.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(run.logs / f"rank_{processes.rank}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        if processes.world_size > 1 and not processes.is_first:  # it alone has nothing to tell otherwise
            logger.info("rank %d on %s, %s", processes.rank, socket.gethostname(), processes.device)
        with _state_recorded(run, config, handler) if processes.is_first else contextlib.nullcontext():
            processes.barrier()  # the recipe is there for all
            watchdog.on_end = partial(_write_failed, run)
            yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


@contextlib.contextmanager
def _state_recorded(run: RunDir, config: RunConfig, handler: logging.Handler) -> Iterator[None]:
    steps = run.steps()
    run.write_state("running", steps[-1] if steps else 0, started=time.time(), pid=os.getpid())
    write_atomically(run.recipe, dump_recipe(config))
    try:
        yield
        run.write_state("done", run.read_state()["step"])
        logger.info("done: %s", write_report(run))
    except Preempted as stop:
        _write_preempted(run, stop)
        raise
    except KeyboardInterrupt:
        run.write_state("cancelled", _last_step(run), "Ctrl-C twice")
        raise
    except BaseException as error:
        # To the log file alone: on the terminal whoever catches the error shows it.
        handler.handle(logger.makeRecord(logger.name, logging.ERROR, __file__, 0, str(error), (), sys.exc_info()))
        with contextlib.suppress(OSError):  # the disk may be full
            run.write_state("failed", _last_step(run), f"{type(error).__name__}: {error}")
        if isinstance(error, OSError):
            fix = "make room or mend the file system; the same command goes on from the last checkpoint"
            raise PacktrainError(f"{run.path}: {error}\n  fix: {fix}") from error
        if isinstance(error, torch.OutOfMemoryError):
            fix = "lower train.micro_batch or set train.recompute: full; then it goes on from the last checkpoint"
            raise PacktrainError(f"the GPU's memory is full: {error}\n  fix: {fix}") from error
        raise


def _write_failed(run: RunDir, message: str) -> None:
    if run.read_state().get("state") == "running":
        run.write_state("failed", _last_step(run), message)


def _write_preempted(run: RunDir, stop: Preempted) -> None:
    run.write_state("preempted", max(run.steps(), default=0), str(stop))


def _last_step(run: RunDir) -> int:
    """The last step that was done, saved or not."""
    return max((record["step"] for record in read_metrics(run.metrics) if record["kind"] == "step"), default=0)
