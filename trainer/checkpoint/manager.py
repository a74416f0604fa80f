"""CheckpointManager: saves by all processes together, in the background, that commit whole or never happened.

``step_N.unfinished/`` is filled by torch's distributed checkpoint, each process writing and hashing its own part in a
thread; rank 0 adds what is derived from it, writes the manifest and renames the folder to ``step_N/``. A kill at any
moment leaves the last committed step as it was.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trainer.checkpoint.layout import (
    MANIFEST,
    STEP_NAME,
    UNFINISHED,
    RunDir,
    begin_folder,
    commit_folder,
    describe_file,
    find_damage,
    read_manifest,
    remove_folder,
    sync,
    write_atomically,
    write_manifest,
)
from trainer.checkpoint.saved import TENSORS, SavedCheckpoint
from trainer.checkpoint.staging import Staging
from trainer.checkpoint.writing import digests, find_difference, write_tensors
from trainer.config import CheckpointConfig
from trainer.errors import PacktrainError
from trainer.launchers import host_name
from trainer.processes import Processes

logger = logging.getLogger(__name__)
T = TypeVar("T")
Tensors = dict[str, torch.Tensor]
Finish = Callable[[Path, SavedCheckpoint], None]


class CheckpointManager:
    """Saves, retains and restores the checkpoints of one run. All processes call the same methods in the same order.

    Args:
        identity: what a checkpoint belongs to (base, data); stored in every manifest.
        finish: adds to a folder what follows from the tensors just written there (an adapter in PEFT's format); runs
            on rank 0, in the background, and reads them back from the files: nothing is asked of the GPUs.
    """

    def __init__(
        self,
        run_dir: RunDir,
        config: CheckpointConfig,
        identity: dict[str, Any],
        processes: Processes,
        finish: Finish,
    ) -> None:
        self.run_dir, self.config, self.identity = run_dir, config, identity
        self.processes, self.finish = processes, finish
        self._staging = Staging()
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._begun: int | None = None
        self._on_first(self._remove_unfinished)

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except PacktrainError as failure:
            if error is None:
                raise
            logger.warning("%s", failure)  # what ends the run is another error

    def reserve(self, state: Tensors) -> None:
        """Makes host memory for states like this one, so that the first save does not have training wait for it."""
        self._staging.copy(state)

    def has_begun(self, step: int) -> bool:
        """Whether `step` is the one saved last, or being saved now."""
        return step == self._begun

    def save(self, step: int, state: Tensors, progress: dict[str, Any], is_best: bool = False) -> bool:
        """Copies `state` to host memory and commits it in the background.

        Args:
            state: tensors equal on all processes, and DTensors of which each has its part.
            progress: JSON values a resumed run starts from (schedule, counters).
            is_best: point ``best`` at this checkpoint once it is committed.

        Returns:
            Whether there was something to save: a step is saved once.

        Raises:
            PacktrainError: the previous save failed, on whichever process.
        """
        self.wait()
        if self._on_first(lambda: self._is_there(step, is_best)):
            return False
        staged = self._staging.copy(state)
        record = {"step": step, "progress": progress, "is_best": is_best, **self.identity}
        self._pending, self._begun = self._background.submit(self._commit, step, staged, record), step
        return True

    def wait(self) -> None:
        """Returns when no save is under way on any process.

        Raises:
            PacktrainError: the save that was under way failed, on whichever process.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except Exception as error:
            raise PacktrainError(
                f"{self.run_dir.checkpoints}: the checkpoint could not be saved: {_tell(error)}"
            ) from error

    def newest_intact(self) -> int | None:
        """The newest step whose every byte is as written; damaged ones are named in a warning and passed over.

        Raises:
            PacktrainError: there are checkpoints and none is intact.
        """
        return self._on_first(self._find_intact)

    def open(self, step: int) -> SavedCheckpoint:
        """The checkpoint of `step`, to be read from."""
        return SavedCheckpoint(self.run_dir.step_dir(step))

    def best_step(self) -> int | None:
        """Step of the checkpoint ``best`` points at, if it is there."""
        return self._on_first(self.run_dir.best_step)

    def discard_after(self, step: int) -> None:
        """Deletes checkpoints newer than `step` (the damaged ones a resume passed over)."""
        self._on_first(lambda: self._discard_after(step))

    def close(self) -> None:
        """Waits for the last save and ends the thread."""
        try:
            self.wait()
        finally:
            self._background.shutdown()

    # ------------------------------------------------------------------------------ in the background, on all ranks

    def _commit(self, step: int, staged: Tensors, record: dict[str, Any]) -> None:
        final = self.run_dir.step_dir(step)
        folder = final.with_name(final.name + UNFINISHED)
        try:
            self._together(lambda: begin_folder(final) if self.processes.is_first else None)
            self._check_alike(staged)
            write_tensors(staged, folder / TENSORS, self.processes.background)
            described = self._together(lambda: self._describe_own(folder))
            files = {name: entry for entries in described for name, entry in entries.items()}
            self._together(lambda: self._complete(folder, final, record, files) if self.processes.is_first else None)
        except BaseException:
            if self.processes.is_first:
                shutil.rmtree(folder, ignore_errors=True)  # a full disk has no room for half a checkpoint
            raise

    def _check_alike(self, staged: Tensors) -> None:
        if self.processes.world_size > 1 and (difference := find_difference(self._together(lambda: digests(staged)))):
            raise PacktrainError(difference)

    def _describe_own(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Hashes and syncs the files that this process wrote, while they are in its page cache."""
        entries = {}
        for path in sorted((folder / TENSORS).glob(f"__{self.processes.rank}_*")):
            sync(path)
            entries[str(path.relative_to(folder))] = describe_file(path)
        return entries

    def _complete(self, folder: Path, final: Path, record: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
        self.finish(folder, SavedCheckpoint(folder, record))
        write_manifest(folder, record, files)
        commit_folder(folder, final)
        self._note_best_and_prune(record["step"], record["is_best"])

    def _together(self, act: Callable[[], Any]) -> list[Any]:
        """Everybody's result of `act`, once all have come here.

        Raises:
            PacktrainError: one failed; on all processes, naming it.
        """
        result, failure = _attempt(act)
        if self.processes.background is None:
            if failure:
                raise failure
            return [result]
        told = f"rank {self.processes.rank} on {host_name(os.environ)}: {_tell(failure)}" if failure else None
        everybody: list[Any] = [None] * self.processes.world_size
        dist.all_gather_object(everybody, (result, told), group=self.processes.background)
        if failures := [told for _, told in everybody if told]:
            raise PacktrainError("; ".join(failures)) from failure
        return [result for result, _ in everybody]

    # ---------------------------------------------------------------------- rank 0 alone, while the others wait for it

    def _on_first(self, act: Callable[[], T]) -> T:
        """The result of `act`, which rank 0 does, on all processes; so is its failure."""
        result, failure = _attempt(act) if self.processes.is_first else (None, None)
        result, told = self.processes.from_first((result, failure and _tell(failure)))
        if failure:
            raise failure
        if told:
            raise PacktrainError(told)
        return result  # type: ignore[return-value]

    def _is_there(self, step: int, is_best: bool) -> bool:
        """Whether `step` is committed already; then this only notes what has become known of it since."""
        if step not in self.run_dir.steps():
            return False
        self._note_best_and_prune(step, is_best)
        return True

    def _find_intact(self) -> int | None:
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

    def _discard_after(self, step: int) -> None:
        for newer in [s for s in self.run_dir.steps() if s > step]:
            remove_folder(self.run_dir.step_dir(newer))

    def _note_best_and_prune(self, step: int, is_best: bool) -> None:
        if is_best:
            self._note_best(step)
        newest = self.run_dir.steps()[-self.config.keep :]
        for old in self.run_dir.steps():
            if old not in newest and old != self.run_dir.best_step():
                remove_folder(self.run_dir.step_dir(old))

    def _note_best(self, step: int) -> None:
        write_atomically(self.run_dir.best, self.run_dir.step_dir(step).name + "\n")

    def _remove_unfinished(self) -> None:
        for leftover in self.run_dir.checkpoints.glob(f"step_*{UNFINISHED}"):
            shutil.rmtree(leftover)
        for folder in self.run_dir.checkpoints.glob("step_*"):
            if STEP_NAME.fullmatch(folder.name) and not (folder / MANIFEST).exists():
                logger.warning("%s is missing: this checkpoint is of no use, and removed", folder / MANIFEST)
                shutil.rmtree(folder)
        self._catch_up_best()

    def _catch_up_best(self) -> None:
        """A kill between a checkpoint's commit and the note that it is the best one leaves an older note.

        Nothing is pruned here: whether the newer ones are intact is not known yet. Without a note, or with one of a
        checkpoint that is gone, nothing is made up: the user may have removed it.
        """
        noted = self.run_dir.best_step()
        for step in reversed(self.run_dir.steps()):
            if noted is None or step <= noted:
                return
            if self._was_best(step):
                self._note_best(step)
                return

    def _was_best(self, step: int) -> bool:
        folder = self.run_dir.step_dir(step)
        with contextlib.suppress(PacktrainError):  # no readable manifest: damaged
            return bool(read_manifest(folder).get("is_best")) and find_damage(folder) is None
        return False


def _attempt(act: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """The result of `act`, or its failure."""
    try:
        return act(), None
    except Exception as error:
        return None, error


def _tell(error: Exception) -> str:
    """What went wrong, for users; what nobody foresaw with its kind."""
    return str(error) if isinstance(error, (OSError, PacktrainError)) else repr(error)
