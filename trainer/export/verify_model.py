"""A full fine-tune's model beside what it was made from: its manifest's hashes, and its checkpoint where that is kept.

Nothing was merged into it, so there is nothing to compute: the bytes are the trained ones or they are not.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from trainer.checkpoint.layout import MANIFEST, RunDir, find_damage, read_manifest
from trainer.checkpoint.result import check_own, enclosing_run, hashes_in
from trainer.config import ModelConfig
from trainer.errors import PacktrainError
from trainer.export.base import HEAD, BaseTensors
from trainer.export.consolidate import SERVING, CheckpointModel
from trainer.export.shards import bytes_of
from trainer.export.streaming import build_empty
from trainer.export.verify_files import as_list, read_exported_config
from trainer.model.tokenizer import UNREADABLE

Check = Callable[[], None]


@dataclass(frozen=True)
class ModelReport:
    """What is proven of a full fine-tune's model.

    Attributes:
        step: its weights are of. files: with the hash that was written down with them.
        tensors: of the names and shapes that its config asks for.
        checkpoint: whose weights, config and tokenizer they are; None where that is not there any more.
    """

    folder: Path
    step: int | None
    files: int
    num_bytes: int
    tensors: int
    checkpoint: Path | None
    seconds: float


def find_model(folder: Path) -> Path | None:
    """`folder` where it is a full fine-tune's model, or the finished one inside a run dir; None where there is none."""
    places = (folder, RunDir(folder).model)
    return next((p for p in places if (p / MANIFEST).exists() and read_manifest(p).get("kind") == "model"), None)


def verify_model(folder: Path, check: Check = lambda: None) -> ModelReport:
    """Verifies a model that `find_model` gave.

    Args:
        check: called before each file and tensor; what it raises ends the verification.

    Raises:
        PacktrainError: it is not what was written, or not the checkpoint's; the text is the evidence.
        UserError: it lies in a run as its model, and another training made it.
    """
    started, manifest = time.monotonic(), read_manifest(folder)
    again = f"fix: delete {folder} and write it again: `packtrain train` what a run ends with, else `packtrain merge`"
    if damage := find_damage(folder, check):
        raise PacktrainError(f"{damage}\n  {again}")
    if (run := enclosing_run(folder)) and folder.resolve() == run.model.resolve():
        check_own(run, folder)
    model, checkpoint = BaseTensors(ModelConfig(path=str(folder))), _find_checkpoint(folder, manifest)
    problems = [*_compare_files(folder, manifest), *_compare_shapes(model, read_exported_config(folder))]
    if checkpoint and not problems:
        problems = list(_compare_with(checkpoint, model, folder, check))
        if problems and (damage := find_damage(checkpoint, check)):
            raise PacktrainError(f"{folder} cannot be compared with its checkpoint, which is damaged: {damage}")
    if problems:
        raise PacktrainError(f"{folder} is not the model that was trained:\n{as_list(problems)}\n  {again}")
    sizes = [entry["bytes"] for entry in manifest["files"].values()]
    seconds = round(time.monotonic() - started, 3)
    return ModelReport(folder, manifest.get("step"), len(sizes), sum(sizes), len(model.shapes), checkpoint, seconds)


def _find_checkpoint(folder: Path, manifest: dict[str, Any]) -> Path | None:
    """The very checkpoint that the model was made from: in the run around it, or where it was then."""
    made_from, run = manifest.get("checkpoint", {}), enclosing_run(folder)
    places = [run.step_dir(manifest["step"])] if run and isinstance(manifest.get("step"), int) else []
    places += [Path(made_from["path"])] if made_from else []
    for place in places:
        with contextlib.suppress(PacktrainError):  # none there
            found = hashes_in(read_manifest(place))
            if found == made_from.get("files", found):
                return place
    return None


def _compare_files(folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
    for file in sorted(folder.glob("*.safetensors")):
        if file.name not in manifest["files"]:
            yield f"{file.name} is not of this model, and a server may load it"
    try:
        AutoTokenizer.from_pretrained(folder)
    except UNREADABLE as error:
        yield f"tokenizer: cannot be loaded: {' '.join(str(error).split())[:200]}"


def _compare_shapes(model: BaseTensors, config: Any) -> Iterator[str]:
    expected = {name: tuple(parameter.shape) for name, parameter in build_empty(config).named_parameters()}
    if config.tie_word_embeddings:
        expected.pop(HEAD, None)
    for name in sorted(expected.keys() | model.shapes.keys()):
        if expected.get(name) != model.shapes.get(name):
            found, wanted = (list(shapes[name]) if name in shapes else "none" for shapes in (model.shapes, expected))
            yield f"{name}: shape {found}, and its config asks for {wanted}"


def _compare_with(checkpoint: Path, model: BaseTensors, folder: Path, check: Check) -> Iterator[str]:
    """Config, tokenizer and stop tokens byte by byte; tensors bit by bit, rounded as the checkpoint's config says."""
    for kept in sorted((checkpoint / SERVING).rglob("*")):
        file = folder / kept.relative_to(checkpoint / SERVING)
        if kept.is_file() and (not file.is_file() or file.read_bytes() != kept.read_bytes()):
            yield f"{file.name} is not the one that the checkpoint holds"
    trained = CheckpointModel(checkpoint)
    for name in sorted(model.shapes.keys() | trained.shapes.keys()):
        check()
        if name not in model.shapes or name not in trained.shapes:
            yield f"{name} is only in the {'checkpoint' if name in trained.shapes else 'model'}"
        elif not np.array_equal(bytes_of(model.read(name, torch.device("cpu"))), bytes_of(trained.read(name))):
            yield f"{name} is not the tensor that the checkpoint holds"
