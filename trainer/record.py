"""What a run says of itself: ``state.json``, log files, and how it ended, whichever process and error that was."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from functools import partial

import torch

from trainer.checkpoint.layout import RunDir, write_atomically
from trainer.config import RunConfig
from trainer.errors import EXIT_TO_BE_RESUMED, EXIT_USER_ERROR, PacktrainError, Preempted, UserError, as_read
from trainer.launchers import World, host_name
from trainer.metrics.report import write_report
from trainer.metrics.trackers import read_metrics
from trainer.preemption import StopRequest
from trainer.processes import Processes
from trainer.recipe import dump_recipe
from trainer.resume import only_one_trainer
from trainer.watch.heartbeat import blamed_host
from trainer.watch.verdict import Verdict
from trainer.watch.watchdog import RankFailed, Watchdog

SHORTEST_GRACE = 2.0  # seconds from a signal to the end of a job, at least

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def meeting(run: RunDir, world: World, stop: StopRequest) -> Iterator[None]:
    """Inside, the processes find one another; nobody watches over them before."""
    try:
        yield
    except Exception as error:
        if world.rank == 0:
            _write_never_began(run, stop, error, blamed_host(error))
        raise


@contextlib.contextmanager
def watched(run: RunDir, processes: Processes, stop: StopRequest) -> Iterator[Watchdog]:
    """A watchdog over the processes; whatever ends this one is told to the others before it leaves."""

    def never_began(verdict: Verdict) -> None:
        _write_never_began(run, stop, RankFailed(verdict), verdict.host)

    watchdog = Watchdog(processes, run.logs)
    watchdog.on_end = never_began  # until `recorded`
    with watchdog:
        try:
            yield watchdog
        except KeyboardInterrupt:
            raise
        except Preempted as preempted:
            if processes.is_first:
                _write_to_be_resumed(run, str(preempted))
            with contextlib.suppress(RuntimeError):  # one that is gone already has stopped too
                processes.barrier()  # the first one out may have the launcher end the others
            raise
        except BaseException as error:
            cause = watchdog.fail(error)  # another process may have been the first to fail
            if processes.is_first and watchdog.on_end is never_began:
                _write_never_began(run, stop, cause, watchdog.blamed(cause))
            if cause is error:
                raise
            raise cause from error


@contextlib.contextmanager
def recorded(
    run: RunDir, config: RunConfig, processes: Processes, watchdog: Watchdog, stop: StopRequest
) -> Iterator[None]:
    """From here on the run dir is ours: recipe, log files, and a ``state.json`` that says how it ended."""
    run.logs.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(run.logs / f"rank_{processes.rank}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        if processes.world_size > 1 and not processes.is_first:  # it alone has nothing to tell otherwise
            logger.info("rank %d on %s, %s", processes.rank, host_name(os.environ), processes.device)
        state = _state_recorded(run, config, handler, watchdog, stop)
        with state if processes.is_first else contextlib.nullcontext(), explaining_memory():
            started = processes.from_first(run.read_state().get("started", 0.0) if processes.is_first else 0.0)
            watchdog.on_end = partial(_write_verdict, run, stop, started)  # from here on the recipe is there for all
            yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


@contextlib.contextmanager
def _state_recorded(
    run: RunDir, config: RunConfig, handler: logging.Handler, watchdog: Watchdog, stop: StopRequest
) -> Iterator[None]:
    steps = run.steps()
    started = time.time()
    run.write_state("running", steps[-1] if steps else 0, started=started, pid=os.getpid())
    write_atomically(run.recipe, dump_recipe(config))
    try:
        yield
        run.write_state("done", run.read_state()["step"])
        logger.info("done: %s", write_report(run))
    except Preempted as preempted:
        _write_to_be_resumed(run, str(preempted))
        raise
    except KeyboardInterrupt:
        run.write_state("cancelled", _last_step(run), "Ctrl-C twice")
        raise
    except BaseException as error:
        # To the log file alone: on the terminal whoever catches the error shows it.
        handler.handle(logger.makeRecord(logger.name, logging.ERROR, __file__, 0, str(error), (), sys.exc_info()))
        with contextlib.suppress(OSError):  # the disk may be full
            if run.read_state().get("started", started) == started:  # else a later start is at work: this one was lost
                if getattr(error, "exit_status", None) == EXIT_TO_BE_RESUMED:
                    _write_to_be_resumed(run, str(error))
                else:
                    _write_failed(run, stop, as_read(error), watchdog.blamed(error), _is_loss(error))
        if isinstance(error, OSError):
            fix = "make room or mend the file system; the same command goes on from the last checkpoint"
            raise PacktrainError(f"{run.path}: {error}\n  fix: {fix}") from error
        raise


@contextlib.contextmanager
def explaining_memory() -> Iterator[None]:
    """Running out of a GPU's memory gets a fix, which the other processes are told where it is inside of `telling`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        fix = "the same command goes on from the last checkpoint, with leaner sizes where train.micro_batch or "
        fix += "train.recompute is auto; where both are named, lower the one or set the other to full"
        raise PacktrainError(f"the GPU's memory is full: {error}\n  fix: {fix}") from error


def _write_verdict(run: RunDir, stop: StopRequest, started: float, verdict: Verdict) -> None:
    record = run.read_state()
    if record.get("state") != "running" or record.get("started") != started:
        return
    if verdict.exit_status == EXIT_TO_BE_RESUMED:
        _write_to_be_resumed(run, verdict.message)
    else:
        _write_failed(run, stop, verdict.message, verdict.host, verdict.is_loss)


def _write_failed(run: RunDir, stop: StopRequest, reason: str, blamed: str, is_loss: bool) -> None:
    # No fault: the processes of a job that is being ended are killed one after the other, some time after a signal. One
    # that has only just come says nothing: srun sends it to the others once a rank is dead.
    if is_loss and stop.age >= SHORTEST_GRACE:
        why = f"{stop.reason} came, and the time it left was too short to save: {reason}"
        _write_to_be_resumed(run, why)
    else:
        run.write_state("failed", _last_step(run), reason, **({"blamed": blamed} if blamed else {}))


def _write_never_began(run: RunDir, stop: StopRequest, error: BaseException, blamed: str) -> None:
    """Says so where a job's script reads it. Whoever sits at a terminal is told there: wrong input changes no file."""
    of_job = run.job.exists() and "SLURM_JOB_ID" in os.environ
    is_users = getattr(error, "exit_status", None) == EXIT_USER_ERROR
    if not (of_job or (run.state.exists() and not is_users)):
        return
    with contextlib.suppress(OSError, UserError), only_one_trainer(run):  # else what is told is another process's
        _write_failed(run, stop, as_read(error), blamed, _is_loss(error))


def _is_loss(error: BaseException) -> bool:
    return isinstance(error, RankFailed) and error.is_loss


def _write_to_be_resumed(run: RunDir, why: str) -> None:
    run.write_state("preempted", max(run.steps(), default=0), why)


def _last_step(run: RunDir) -> int:
    """The last step that was done, saved or not."""
    return max((record["step"] for record in read_metrics(run.metrics) if record["kind"] == "step"), default=0)
