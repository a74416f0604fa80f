"""The result of a run, taken from a committed checkpoint's files: no GPU gathers anything at the end."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.checkpoint.layout import RunDir, find_damage, folder_appears_when_complete
from trainer.checkpoint.result import is_run
from trainer.checkpoint.saved import SavedCheckpoint
from trainer.config import RunConfig
from trainer.errors import PacktrainError
from trainer.export.consolidate import SERVING, consolidate
from trainer.export.serving import tokenizer_as_trained, write_serving_files
from trainer.model.adapter_files import save_adapter
from trainer.recipe import load_recipe

Finish = Callable[[Path, SavedCheckpoint], None]


def finish_adapter(model: nn.Module) -> Finish:
    """Adds ``adapter/`` in PEFT's format to a checkpoint, read back from its tensors."""

    def finish(folder: Path, saved: SavedCheckpoint) -> None:
        names = [name for name in saved.names if name.startswith("model.")]
        weights = {name.removeprefix("model."): tensor for name, tensor in saved.read_many(names).items()}
        save_adapter(model, folder / "adapter", weights)

    return finish


def finish_full(config: RunConfig, model_config: Any, tokenizer: Any) -> Finish:
    """Adds config, tokenizer and generation settings, so that the checkpoint alone can become a model.

    They are made here and kept: at a save the training's thread may be using the tokenizer, and the hub be gone.
    """
    own_config = copy.deepcopy(model_config)
    own_config.dtype = getattr(torch, config.model.dtype)
    with tempfile.TemporaryDirectory(prefix="packtrain-serving-") as place:
        serving = Path(place)
        own_config.save_pretrained(serving)
        write_serving_files(serving, config.model, own_config, tokenizer, config.data.template)
        files = {path.relative_to(serving): path.read_bytes() for path in serving.rglob("*") if path.is_file()}

    def finish(folder: Path, saved: SavedCheckpoint) -> None:
        for name, data in files.items():
            path = folder / SERVING / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    return finish


def write_result(run: RunDir, step: int, config: RunConfig, tokenizer: Any) -> None:
    """Writes ``adapter/`` or ``model/`` of the run, each with the tokenizer and the template trained with.

    Args:
        step: of the committed checkpoint to take.

    Raises:
        PacktrainError: the checkpoint is damaged.
    """
    checkpoint = run.step_dir(step)
    # The newest one was hashed when it was written, or when the run was resumed from it.
    if step != run.steps()[-1] and (damage := find_damage(checkpoint)):
        raise PacktrainError(
            f"the best checkpoint is damaged: {damage}\n"
            f"  fix: put it back, or delete {run.best} to keep the last weights instead"
        )
    if config.adapter is None:
        _replace(run.model, lambda folder: _consolidate_into(checkpoint, folder))
        return

    def write_adapter(folder: Path) -> None:
        shutil.copytree(checkpoint / "adapter", folder, dirs_exist_ok=True)
        tokenizer_as_trained(tokenizer, config.data.template).save_pretrained(folder)

    _replace(run.adapter, write_adapter)


def full_checkpoint(source: Path) -> Path | None:
    """The checkpoint of a full fine-tune that `source` is or has: a run's best, else its newest; None of an adapter."""
    if (source / SERVING).is_dir():
        return source
    if not is_run(source) or load_recipe(RunDir(source).recipe).adapter is not None:
        return None
    run = RunDir(source)
    steps = run.steps()
    if not steps:
        return None
    best = run.best_step()
    return run.step_dir(best if best is not None else steps[-1])


def _consolidate_into(checkpoint: Path, folder: Path) -> None:
    folder.rmdir()
    consolidate(checkpoint, folder)


def _replace(final: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a new folder, which then takes the place of `final`."""
    with folder_appears_when_complete(final) as temporary:
        write(temporary)
        if final.exists():
            shutil.rmtree(final)
