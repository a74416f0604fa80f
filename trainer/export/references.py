"""What transformers, and PEFT around it, says of rows: in a model's own dtype, streamed layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from trainer.export.as_trained import AsTrained, base_name, build_peft
from trainer.export.base import EMBEDDING, HEAD, BaseTensors
from trainer.export.streaming import build_empty, score_streamed
from trainer.generate import default_device
from trainer.model.adapter_files import ADAPTER_WEIGHTS
from trainer.vllm_job import Scores

Score = Callable[[list[tuple[list[int], int]]], list[Scores]]


def score_plain(tensors: BaseTensors, dtype: torch.dtype) -> Score:
    """By a whole model."""
    device = default_device()

    def read(name: str) -> torch.Tensor:
        source = EMBEDDING if name == HEAD and HEAD not in tensors.shapes else name
        return tensors.read(source, device).to(dtype)

    return lambda rows: score_streamed(build_empty(tensors.config), read, rows, device)


def score_adapted(base: BaseTensors, adapter: Path, dtype: torch.dtype) -> Score:
    """By a 16-bit base with a LoRA beside it, by PEFT's forward; its matrices in `dtype`, as training computed them."""
    device, model = default_device(), build_peft(base.config, adapter)
    own = load_file(adapter / ADAPTER_WEIGHTS)

    def read(name: str) -> torch.Tensor:
        key = name.replace(".default", "")
        if key in own:
            return own[key].to(device, dtype)
        tensor = base_name(key)
        source = EMBEDDING if tensor == HEAD and HEAD not in base.shapes else tensor
        return base.read(source, device).to(dtype)

    return lambda rows: score_streamed(model, read, rows, device)


def score_base_of_merge(folder: Path, dtype: torch.dtype) -> Score:
    """By the base that an adapter was merged onto, dequantised where it was."""
    trained = AsTrained(folder)

    def read(name: str) -> torch.Tensor:
        return trained.read(name).to(dtype)

    def score(rows: list[tuple[list[int], int]]) -> list[Scores]:
        with trained.peft_model.disable_adapter():
            return score_streamed(trained.peft_model, read, rows, trained.device)

    return score
