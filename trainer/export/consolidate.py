"""The result of a run as files that other programs load: a PEFT adapter, or a whole model in safetensors."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.layout import folder_appears_when_complete

SHARD_BYTES = 4 * 2**30


def save_model(model: Any, weights: Mapping[str, torch.Tensor], dtype: torch.dtype, folder: Path) -> None:
    """Writes a transformers model's config and weights (safetensors with index), shard by shard.

    Args:
        model: transformers model whose config is written.
        weights: whole tensors by the model's names, tied ones once; cast to `dtype` a shard at a time.
    """
    import json

    from safetensors.torch import save_file

    shards = cut_into_shards(weights, dtype)
    for name, shard in shards.items():
        # A copy even where nothing changes: a view would drag its whole storage along.
        tensors = {key: weights[key].detach().to("cpu", dtype, copy=True).contiguous() for key in shard}
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {key: name for name, shard in shards.items() for key in shard}
        total = sum(weights[key].numel() * dtype.itemsize for key in weights)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    model.config.dtype = dtype
    model.config.save_pretrained(folder)


def replace_folder(final: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a new folder, which then takes the place of `final`."""
    with folder_appears_when_complete(final) as temporary:
        write(temporary)
        if final.exists():
            shutil.rmtree(final)


def cut_into_shards(weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, list[str]]:
    """File name -> tensor names, some 4 GiB a file, in the weights' order and under transformers' file names."""
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, tensor in weights.items():
        size = tensor.numel() * dtype.itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}
