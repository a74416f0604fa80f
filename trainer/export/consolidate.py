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

from trainer.checkpoint.layout import find_damage, folder_appears_when_complete, read_manifest, write_manifest
from trainer.checkpoint.result import enclosing_run, training_in
from trainer.checkpoint.saved import TENSORS, SavedCheckpoint
from trainer.errors import PacktrainError, UserError
from trainer.export.card import write_card
from trainer.export.kv_heads import KVHeads
from trainer.export.pipeline import Buffer, InTurn, run_pipeline
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


def consolidate(
    checkpoint: Path, out: Path, is_intact: bool = False, check: Callable[[], None] = lambda: None
) -> ConsolidateReport:
    """Writes a model folder (safetensors, index, config, tokenizer, hashes, card) of a full fine-tune's checkpoint.

    Needs neither a GPU nor the base nor the run around the checkpoint. Reads a tensor while the one before is written,
    and holds no third. Recipe and losses are on the card where the checkpoint lies in its run.

    Args:
        checkpoint: a ``step_N`` folder, as any number of processes of any strategy wrote it.
        out: appears only when complete.
        is_intact: its bytes have been checked; else they are now.
        check: called before each tensor; what it raises ends the writing and leaves nothing.

    Raises:
        UserError: `out` exists, or `checkpoint` is of an adapter or no checkpoint at all.
        PacktrainError: the checkpoint is damaged.
    """
    started = time.monotonic()
    if out.exists():
        raise UserError("--out", f"{out} exists", "a folder that does not exist yet", "remove it or name another")
    _check(checkpoint, is_intact)
    saved, run = SavedCheckpoint(checkpoint), enclosing_run(checkpoint)
    config = json.loads((checkpoint / SERVING / "config.json").read_text(encoding="utf-8"))
    dtype = getattr(torch, config.get("dtype") or config["torch_dtype"])
    # Sorted, so that the files are the same whichever processes wrote the checkpoint.
    names = sorted(name for name in saved.names if name.startswith("model."))
    heads = KVHeads.of(config)
    shapes = {name.removeprefix("model."): heads.shape(name, saved.shape(name)) for name in names}
    out.parent.mkdir(parents=True, exist_ok=True)

    def read(name: str) -> torch.Tensor:
        return heads.repeat(name, saved.read(f"model.{name}"))

    with folder_appears_when_complete(out) as folder:
        files = write_model(folder, shapes, dtype, read, check)
        shutil.copytree(checkpoint / SERVING, folder, dirs_exist_ok=True)
        recipe = load_recipe(run.recipe).model_dump(mode="json") if run else None
        record = {"kind": "model", "recipe": recipe, **training_in(read_manifest(checkpoint))}
        write_manifest(folder, record, files)
        write_card(folder, record, run)
        num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return ConsolidateReport(out, saved.step, len(shapes), num_bytes, time.monotonic() - started)


def _check(checkpoint: Path, is_intact: bool) -> None:
    if not (checkpoint / TENSORS).is_dir():
        raise UserError(
            str(checkpoint), "no checkpoint", "a folder checkpoints/step_N of a run", "name the run dir, or one of them"
        )
    if not is_intact and (damage := find_damage(checkpoint)):
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
