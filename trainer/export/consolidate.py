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
from safetensors.torch import save as serialise

from trainer.checkpoint.layout import find_damage, folder_appears_when_complete, read_manifest, write_manifest
from trainer.checkpoint.result import enclosing_run, training_in
from trainer.checkpoint.saved import TENSORS, SavedCheckpoint
from trainer.errors import PacktrainError, UserError
from trainer.export.card import write_card
from trainer.export.kv_heads import KVHeads
from trainer.recipe import load_recipe

SHARD_BYTES = 4 * 2**30
SERVING = "serving"  # folder of a checkpoint with config and tokenizer, so that nothing else is needed
INDEX = "model.safetensors.index.json"


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

    Needs neither a GPU nor the base nor the run around the checkpoint, and holds one tensor at a time. Recipe and
    losses are on the card where the checkpoint lies in its run.

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
        check()
        return heads.repeat(name, saved.read(f"model.{name}"))

    with folder_appears_when_complete(out) as folder:
        write_model(folder, shapes, dtype, read)
        shutil.copytree(checkpoint / SERVING, folder, dirs_exist_ok=True)
        recipe = load_recipe(run.recipe).model_dump(mode="json") if run else None
        record = {"kind": "model", "recipe": recipe, **training_in(read_manifest(checkpoint))}
        write_manifest(folder, record)
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
    folder: Path, shapes: Mapping[str, torch.Size], dtype: torch.dtype, read: Callable[[str], torch.Tensor]
) -> None:
    """Writes tensors under transformers' file names, with an index where there is more than one file.

    Args:
        shapes: by tensor name, in the order to write.
        dtype: cast to.
        read: a tensor by name; called once for each, in order.
    """
    shards = cut_into_shards(shapes, dtype)
    for file, names in shards.items():
        _write_safetensors(folder / file, {name: shapes[name] for name in names}, dtype, read)
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        total = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1))


def _write_safetensors(
    path: Path, shapes: Mapping[str, torch.Size], dtype: torch.dtype, read: Callable[[str], torch.Tensor]
) -> None:
    """One safetensors file, appended to tensor by tensor (https://huggingface.co/docs/safetensors, "Format")."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": _dtype_name(dtype), "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            file.write(_bytes_of(read(name).to(dtype)))  # no name holds the tensor while the next one is read


def _bytes_of(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def _dtype_name(dtype: torch.dtype) -> str:
    """safetensors' own name of a dtype, as the library writes it."""
    encoded = serialise({"x": torch.empty(0, dtype=dtype)})
    length = int.from_bytes(encoded[:8], "little")
    return json.loads(encoded[8 : 8 + length])["x"]["dtype"]


def cut_into_shards(tensors: Mapping[str, Any], dtype: torch.dtype) -> dict[str, list[str]]:
    """File name -> tensor names, some 4 GiB a file, in the given order and under transformers' file names.

    Args:
        tensors: tensors or their shapes; what counts is their ``numel()``.
    """
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, tensor in tensors.items():
        size = tensor.numel() * dtype.itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}
