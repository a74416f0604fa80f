"""CheckpointManager: asynchronous saves that either commit whole or never happened.

``step_N.unfinished/`` is filled by torch's distributed checkpoint in a thread, hashed, synced and renamed to
``step_N/``. A kill at any moment leaves the last committed step as it was.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from trainer.checkpoint.layout import (
    MANIFEST,
    STEP_NAME,
    UNFINISHED,
    RunDir,
    begin_folder,
    commit_folder,
    find_damage,
    read_manifest,
    write_atomically,
    write_manifest,
)
from trainer.config import CheckpointConfig
from trainer.errors import PacktrainError

logger = logging.getLogger(__name__)
# One process is what is meant here, and torch says so at every save and load.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
Tensors = dict[str, torch.Tensor]


class CheckpointManager:
    """Saves, retains and restores the checkpoints of one run.

    Args:
        identity: what a checkpoint belongs to (base, data); stored in every manifest.
        save_adapter: writes the adapter in PEFT's format into a folder; None for full fine-tuning.
    """

    def __init__(
        self,
        run_dir: RunDir,
        config: CheckpointConfig,
        identity: dict[str, Any],
        save_adapter: Callable[[Path], None] | None,
    ) -> None:
        self.run_dir, self.config, self.identity, self.save_adapter = run_dir, config, identity, save_adapter
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._remove_unfinished()

    def save(self, step: int, state: Tensors, progress: dict[str, Any], is_best: bool = False) -> None:
        """Copies `state` to the host and commits it in the background.

        Args:
            progress: JSON values a resumed run starts from (schedule, counters).
            is_best: point ``best`` at this checkpoint once it is committed.

        Raises:
            PacktrainError: the previous save failed.
        """
        self.wait()
        if step in self.run_dir.steps():
            self._after_commit(step, is_best)
            return
        final = self.run_dir.step_dir(step)
        folder = begin_folder(final)
        if self.save_adapter:
            self.save_adapter(folder / "adapter")
        upload = dcp.async_save(state, checkpoint_id=folder / "dcp", no_dist=not dist.is_initialized())
        assert isinstance(upload, Future)

        def commit() -> None:
            upload.result()
            write_manifest(folder, {"step": step, "progress": progress, **self.identity})
            commit_folder(folder, final)
            self._after_commit(step, is_best)

        self._pending = self._committer.submit(commit)

    def wait(self) -> None:
        """Returns when no save is under way.

        Raises:
            PacktrainError: the save that was under way failed.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except (Exception, CheckpointException) as error:  # torch's is no Exception
            raise PacktrainError(f"{self.run_dir.checkpoints}: the checkpoint could not be saved: {error!r}") from error

    def newest_intact(self) -> int | None:
        """The newest step whose every byte is as written; damaged ones are named in a warning and passed over.

        Raises:
            PacktrainError: there are checkpoints and none is intact.
        """
        steps = self.run_dir.steps()
        for step in reversed(steps):
            damage = find_damage(self.run_dir.step_dir(step))
            if damage is None:
                return step
            logger.warning("checkpoint of step %d is damaged: %s. Trying the one before", step, damage)
        if steps:
            raise PacktrainError(
                f"{self.run_dir.checkpoints}: none of the {len(steps)} checkpoints is intact\n"
                "  fix: train anew into another --run-dir"
            )
        return None

    def load(self, step: int, state: Tensors) -> dict[str, Any]:
        """Reads the checkpoint of `step` into the tensors of `state`, in place.

        Returns:
            The `progress` it was saved with.

        Raises:
            PacktrainError: the checkpoint is of another model.
        """
        folder = self.run_dir.step_dir(step)
        try:
            dcp.load(state, checkpoint_id=folder / "dcp", no_dist=not dist.is_initialized())
        except CheckpointException as error:
            raise PacktrainError(f"{folder}: the checkpoint cannot be read into this model: {error}") from error
        return read_manifest(folder)["progress"]

    def best_step(self) -> int | None:
        """Step of the checkpoint ``best`` points at, if it is there."""
        match = STEP_NAME.fullmatch(self.run_dir.best_name())
        step = int(match[1]) if match else None
        return step if step in self.run_dir.steps() else None

    def discard_after(self, step: int) -> None:
        """Deletes checkpoints newer than `step` (the damaged ones a resume passed over)."""
        for newer in [s for s in self.run_dir.steps() if s > step]:
            shutil.rmtree(self.run_dir.step_dir(newer))

    def close(self) -> None:
        """Waits for the last save and ends the thread."""
        try:
            self.wait()
        finally:
            self._committer.shutdown()

    def _after_commit(self, step: int, is_best: bool) -> None:
        if is_best:
            write_atomically(self.run_dir.best, self.run_dir.step_dir(step).name + "\n")
        newest = self.run_dir.steps()[-self.config.keep :]
        for old in self.run_dir.steps():
            if old not in newest and old != self.best_step():
                shutil.rmtree(self.run_dir.step_dir(old))

    def _remove_unfinished(self) -> None:
        for leftover in self.run_dir.checkpoints.glob(f"step_*{UNFINISHED}"):
            shutil.rmtree(leftover)
        for folder in self.run_dir.checkpoints.glob("step_*"):
            if not (folder / MANIFEST).exists():
                logger.warning("%s is missing: this checkpoint is of no use, and removed", folder / MANIFEST)
                shutil.rmtree(folder)
