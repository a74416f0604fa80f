"""May this recipe continue in that run dir? Asked before anything is written there."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from trainer.checkpoint.layout import RunDir, newest_manifest
from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.recipe import load_recipe

LOCK = ".lock"
# The watchdog of a process cut off from the others ends it within a minute; an NFS server then takes its lock away.
LOST_NODE_SECONDS = 180.0

logger = logging.getLogger(__name__)
# What a resumed run may say differently: it changes neither the model, nor the samples, nor the optimizer.
FREE_TO_CHANGE = (
    "strategy.",
    "train.device",
    "train.log_every",
    "train.micro_batch",
    "train.recompute",
    "train.offload_activations",
    "eval.",
    "checkpoint.",
    "tracking.",
    "export.",
    "slurm.",
)


def check_recipe_unchanged(run: RunDir, config: RunConfig) -> None:
    """Refuses to write into a folder that no run made, or to continue a run with another recipe.

    Raises:
        UserError: the run dir is a file or holds files of others that a run would write over; or a field that shapes
            the training differs from its ``recipe.yaml``; all are named.
    """
    _check_own_folder(run)
    if not run.steps():
        return
    if not run.recipe.exists():
        raise UserError(
            str(run.recipe),
            "no such file, although there are checkpoints: whether they are of this recipe is unknown",
            fix="put it back, or train anew into another --run-dir",
        )
    before, now = _flatten(load_recipe(run.recipe).model_dump()), _flatten(config.model_dump())
    changed = [
        f"{name} (was {before.get(name)!r}, now {now.get(name)!r})"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not name.startswith(FREE_TO_CHANGE)
    ]
    if changed:
        raise UserError(
            str(run.recipe),
            "this run dir holds checkpoints of another recipe: " + "; ".join(changed),
            fix="use the recipe the run began with, or train anew into another --run-dir",
        )


def _check_own_folder(run: RunDir) -> None:
    if run.path.exists() and not run.path.is_dir():
        raise UserError(str(run.path), "is a file", "a folder, there or not yet", "name another --run-dir")
    if (run.path / LOCK).exists() or run.state.exists():
        return
    written = (run.recipe, run.metrics, run.checkpoints, run.best, run.adapter, run.model, run.merged, run.report)
    if foreign := [path.name for path in written if path.exists()]:
        raise UserError(
            str(run.path),
            f"no run made this folder, and a run would write over its {', '.join(foreign)}",
            "the folder of a run, or one of its own",
            "name another --run-dir",
        )


def check_identity(run: RunDir, identity: dict[str, Any]) -> None:
    """Refuses to continue on another base or other data than the checkpoints were taken on.

    Args:
        identity: ``base`` and ``data`` as they are now.

    Raises:
        UserError: one differs.
    """
    saved = newest_manifest(run)
    for key, what in {"base": "base model", "data": "training data"}.items():
        if saved and not _is_same(saved.get(key), identity[key]):
            raise UserError(
                str(run.path),
                f"its checkpoints were trained with another {what}: {saved.get(key)}, now {identity[key]}",
                fix="restore what was there, or train anew into another --run-dir",
            )


def _is_same(saved: Any, now: Any) -> bool:
    """Of a base by all that was noted then, wherever its files lie."""
    if not isinstance(saved, dict) or not isinstance(now, dict):
        return saved == now
    return all(now.get(name) == value for name, value in saved.items() if name != "path")


def check_data(found: str, expected: str | None) -> None:
    """Refuses to train on other data than were submitted; times and places of the files do not count.

    Args:
        found: the data's fingerprint.
        expected: what it was; None: nobody said.

    Raises:
        UserError: they differ.
    """
    if expected is not None and found != expected:
        raise UserError(
            "data",
            f"not the tokens that were submitted (fingerprint {expected}, now {found}): a data file, the template or "
            "the tokenizer was edited since",
            fix="restore what was there, or submit again to train on what is there now",
        )


@contextlib.contextmanager
def only_one_trainer(run: RunDir) -> Iterator[None]:
    """Holds the run dir's lock; the system frees it however the process ends.

    Raises:
        UserError: another process trains in this run dir.
    """
    with _open_lock(run) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise UserError(
                str(run.path),
                f"process {lock.read().strip() or 'unknown'} is training in this run dir",
                fix="wait for it, stop it, or use another --run-dir",
            ) from error
        except OSError as error:  # such as Lustre mounted without flock
            logger.warning("%s: its file system has no locks (%s): nothing keeps two trainers apart", run.path, error)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def check_nobody_trains(run: RunDir, check: Callable[[], None] = lambda: None) -> None:
    """Says so before minutes are spent on loading; `only_one_trainer` is what keeps two apart.

    A job that SLURM has queued again waits: what ran on a node that was lost runs on there until it notices.

    Args:
        check: called while waiting; what it raises ends that.

    Raises:
        UserError: another process trains in this run dir.
    """
    is_queued_again = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    deadline = time.monotonic() + (LOST_NODE_SECONDS if is_queued_again else 0)
    while (run.path / LOCK).exists():
        try:
            with only_one_trainer(run):
                return
        except UserError:
            if time.monotonic() > deadline:
                raise
            check()
            time.sleep(1)


def _open_lock(run: RunDir) -> TextIO:
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        return open(run.path / LOCK, "a+")
    except OSError as error:
        raise UserError(
            str(run.path), f"cannot be written: {error}", "a folder of yours", "name another --run-dir"
        ) from error


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots; lists stay whole."""
    if not isinstance(value, dict):
        return {prefix: value}
    joined = f"{prefix}." if prefix else ""
    return {name: item for key, inner in value.items() for name, item in _flatten(inner, joined + key).items()}
