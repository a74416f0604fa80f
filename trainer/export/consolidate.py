"""A full fine-tune's checkpoint as a model folder that other programs load: from its files alone, tensor by tensor."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.appearing import folder_appears_when_complete
from trainer.checkpoint.layout import find_damage, write_manifest
from trainer.checkpoint.result import enclosing_run, hashes_in, training_in
from trainer.checkpoint.saved import TENSORS, SavedCheckpoint
from trainer.errors import PacktrainError, UserError
from trainer.export.card import write_card
from trainer.export.kv_heads import KVHeads
from trainer.export.pipeline import Buffer, InTurn, run_pipeline
from trainer.export.place import check_apart, check_place
from trainer.export.shards import Piece, ShardWriter, Spec, cut_into_shards, write_index
from trainer.recipe import load_recipe

SERVING = "serving"  # folder of a checkpoint with config and tokenizer, so that nothing else is needed


@dataclass(frozen=True)
class ConsolidateReport:
    """What `consolidate` wrote."""

    out: Path
    step: int
    tensors: int
    num_bytes: int
    seconds: float


class CheckpointModel:
    """The model in a full fine-tune's checkpoint: its tensors as other programs want them, read one by one.

    Attributes:
        checkpoint: a ``step_N`` folder, as any number of processes of any strategy wrote it.
        shapes: by tensor name, sorted: the files are the same whichever processes wrote the checkpoint.
        dtype: of the recipe.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint, self._saved = checkpoint, SavedCheckpoint(checkpoint)
        config = json.loads((checkpoint / SERVING / "config.json").read_text(encoding="utf-8"))
        self.dtype: torch.dtype = getattr(torch, config.get("dtype") or config["torch_dtype"])
        self._heads = KVHeads.of(config)
        names = sorted(name for name in self._saved.names if name.startswith("model."))
        self.shapes = {
            (own := name.removeprefix("model.")): self._heads.shape(own, self._saved.shape(name)) for name in names
        }

    @property
    def num_bytes(self) -> int:
        """Of its tensors."""
        return sum(shape.numel() for shape in self.shapes.values()) * self.dtype.itemsize

    def read(self, name: str) -> torch.Tensor:
        """A tensor, whole, on the CPU; no other is in memory."""
        return self._heads.repeat(name, self._saved.read(f"model.{name}")).to(self.dtype)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._saved.step

    def write(self, folder: Path, check: Callable[[], None] = lambda: None) -> None:
        """Fills `folder`: safetensors, index, config, tokenizer, hashes, card.

        Reads a tensor while the one before is written, and holds no third. Recipe and losses are on the card where the
        checkpoint lies in its run.

        Args:
            check: called before each tensor; what it raises ends the writing.
        """
        run = enclosing_run(self.checkpoint)
        files = write_model(folder, self.shapes, self.dtype, self.read, check)
        shutil.copytree(self.checkpoint / SERVING, folder, dirs_exist_ok=True)
        recipe, manifest = load_recipe(run.recipe).model_dump(mode="json") if run else None, self._saved.manifest
        made_from = {"path": str(self.checkpoint.resolve()), "files": hashes_in(manifest)}
        record = {"kind": "model", "recipe": recipe, "checkpoint": made_from, **training_in(manifest)}
        write_manifest(folder, record, files)
        write_card(folder, record, run)


def consolidate(checkpoint: Path, out: Path) -> ConsolidateReport:
    """Writes a model folder of a full fine-tune's checkpoint, without a GPU, the base or the run around it.

    Args:
        checkpoint: a ``step_N`` folder.
        out: appears only when complete.

    Raises:
        UserError: `out` may not lie there, or `checkpoint` is of an adapter or no checkpoint at all.
        PacktrainError: the checkpoint is damaged.
    """
    started = time.monotonic()
    check_place(out, checkpoint)
    if run := enclosing_run(checkpoint):
        check_apart(out, Path(load_recipe(run.recipe).model.path).expanduser())
    _check(checkpoint)
    model = CheckpointModel(checkpoint)
    with folder_appears_when_complete(out, num_bytes=model.num_bytes) as folder:
        model.write(folder)
        num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return ConsolidateReport(out, model.step, len(model.shapes), num_bytes, time.monotonic() - started)


def _check(checkpoint: Path) -> None:
    if not (checkpoint / TENSORS).is_dir():
        raise UserError(
            str(checkpoint), "no checkpoint", "a folder checkpoints/step_N of a run", "name the run dir, or one of them"
        )
    if damage := find_damage(checkpoint):
        raise PacktrainError(f"the checkpoint is damaged: {damage}\n  fix: take another of the run's checkpoints")
    if not (checkpoint / SERVING / "config.json").is_file():
        raise UserError(
            str(checkpoint), "the checkpoint of an adapter", "one of a full fine-tune", "merge the run dir instead"
        )


def write_model(
    folder: Path,
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
    read: Callable[[str], torch.Tensor],
    check: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """Writes tensors under transformers' file names, with an index where there is more than one file.

    Args:
        shapes: by tensor name, in the order to write.
        dtype: cast to.
        read: a tensor by name; called once for each, in order, one call at a time.
        check: called before each tensor; what it raises ends the writing.

    Returns:
        The manifest's entries of the files.
    """
    shards = {
        file: {name: Spec(shapes[name], dtype) for name in names}
        for file, names in cut_into_shards(shapes, dtype).items()
    }
    entries: dict[str, dict[str, Any]] = {}

    def read_piece(piece: Piece, _: Buffer) -> torch.Tensor:
        check()
        return read(piece.name).to(dtype)

    def write(piece: Piece, tensor: torch.Tensor) -> torch.Tensor:
        writer.put(piece, tensor)
        return tensor

    with ShardWriter(folder, shards, entries.__setitem__) as writer:
        run_pipeline(writer.pieces(), [InTurn(read_piece), write, InTurn(writer.finish)], num_workers=2)
    check()  # a signal that came with the last tensors: this thread was waiting
    write_index(folder, shards)
    return entries
