"""Runs made without training: a base, a recipe, an adapter with random weights, and the record of its base."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.layout import RunDir, write_atomically, write_manifest
from trainer.config import QuantizationConfig, RunConfig
from trainer.model.adapter_files import save_adapter
from trainer.model.load import load_model
from trainer.recipe import dump_recipe


def make_run(path: Path, config: RunConfig, size: float = 0.05) -> Path:
    """A run dir as a finished training leaves it; every trained tensor is moved by random numbers of `size`."""
    run = RunDir(path)
    loaded = load_model(config, torch.device("cpu"))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)
    write_atomically(run.recipe, dump_recipe(config))
    save_adapter(loaded.model, run.adapter)
    run.step_dir(1).mkdir(parents=True)
    save_adapter(loaded.model, run.step_dir(1) / "adapter")
    write_manifest(run.step_dir(1), {"step": 1, "base": asdict(loaded.base), "data": "0" * 8})
    return path


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
