"""Runs made without training: a base, a recipe, an adapter with random weights, and the record of its base."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.layout import RunDir, write_atomically, write_manifest
from trainer.config import QuantizationConfig, RunConfig
from trainer.export.serving import write_serving_files
from trainer.model.adapter_files import save_adapter
from trainer.model.folder import base_folder
from trainer.model.load import load_model
from trainer.model.tokenizer import load_tokenizer
from trainer.model.weights import load_base_config
from trainer.recipe import dump_recipe


def make_run(
    path: Path, config: RunConfig, size: float = 0.05, train: Callable[[torch.nn.Module], None] | None = None
) -> Path:
    """A run dir as a finished training leaves it, but for the hashes of its adapter, which tests edit.

    Args:
        size: of the random numbers that every trained tensor is moved by.
        train: trains the model instead.
    """
    run = RunDir(path)
    loaded = load_model(config, torch.device("cpu"))
    if train is not None:
        train(loaded.model)
    else:
        shake(loaded.model, size)
    write_atomically(run.recipe, dump_recipe(config))
    save_adapter(loaded.model, run.adapter)
    tokenizer, shape = load_tokenizer(config.model), load_base_config(config.model)
    write_serving_files(run.adapter, base_folder(config.model), shape, tokenizer, config.data.template)
    shutil.copytree(run.adapter, run.step_dir(1) / "adapter")
    write_manifest(run.step_dir(1), {"step": 1, "base": asdict(loaded.base), "data": "0" * 8})
    return path


def shake(model: torch.nn.Module, size: float) -> None:
    """Moves every trained tensor by random numbers."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)


def teach(model: torch.nn.Module, tokenizer: Any, rows: list[dict[str, Any]], steps: int, lr: float) -> None:
    """Trains the trainable parameters on chats of the toy template: the answers and their end token."""
    encoded = []
    for row in rows:
        prompt, answer = (message["content"] for message in row["messages"])
        head = tokenizer(f"<|user|>{prompt}<|end|><|assistant|>").input_ids
        encoded.append((head, tokenizer(f"{answer}<|end|>", add_special_tokens=False).input_ids))
    width = max(len(head) + len(tail) for head, tail in encoded)
    ids = torch.tensor([head + tail + [0] * (width - len(head + tail)) for head, tail in encoded])
    labels = torch.tensor([[-100] * len(head) + tail + [-100] * (width - len(head + tail)) for head, tail in encoded])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=next(model.parameters()).dtype == torch.bfloat16):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def dequantized(weight: torch.Tensor, quantization: QuantizationConfig, compute_dtype: torch.dtype) -> torch.Tensor:
    """A weight after NF4 or int8 and back, by bitsandbytes' own functions."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant, int8_vectorwise_quant, quantize_4bit

    if quantization.type == "int8":
        int8, absmax, _ = int8_vectorwise_quant(weight.detach().clone())
        return int8_vectorwise_dequant(int8, absmax).to(compute_dtype)
    # As one row: bitsandbytes 0.50 on the CPU misplaces scales where a row is no multiple of 64 (the toy's down_proj)
    flat = weight.detach().reshape(1, -1)
    codes, state = quantize_4bit(flat, blocksize=64, compress_statistics=quantization.double_quant, quant_type="nf4")
    state.dtype = compute_dtype
    return dequantize_4bit(codes, state).view_as(weight)


def peft_merge(config: RunConfig, adapter: Path, onto: str = "dequantized") -> dict[str, torch.Tensor]:
    """Tensors of `merge_and_unload` in float32 on a base prepared by plain transformers and bitsandbytes."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    frozen = getattr(torch, config.model.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = parameter.to(frozen)
            if config.quantization and onto == "dequantized" and ".layers." in name and name.endswith("proj.weight"):
                value = dequantized(value, config.quantization, getattr(torch, config.compute_dtype))
            parameter.copy_(value)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return {name: tensor.detach() for name, tensor in merged.named_parameters()}


def two_step_recipe(model: Path | str, rows: Path, merge: bool) -> dict[str, Any]:
    """Two QLoRA steps with an evaluation and a checkpoint at each."""
    return {
        "model": {"path": str(model), "dtype": "float32"},
        "quantization": {},
        "adapter": {"r": 4, "alpha": 8},
        "data": {
            "train": [{"path": str(rows), "format": "messages"}],
            "split": {"validation": 0.25},
            "pack_length": 128,
        },
        "optim": {"lr": 0.01},
        "train": {"max_steps": 2, "global_batch": {"rows": 2}, "micro_batch": 1, "recompute": "none"},
        "eval": {"every_steps": 1},
        "checkpoint": {"every_steps": 1},
        "tracking": {"to": []},
        "export": {"merge": merge},
    }
