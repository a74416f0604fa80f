"""Sets on a model how its decoder layers compute: the dial ``train.recompute`` and the fields beside it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.model.kernels.float8 import can_multiply
from trainer.model.layers import FusedDecoderLayer
from trainer.model.offload import ActivationOffload
from trainer.planning.levels import LayerLevels


def decoder_layers(model: nn.Module) -> list[Any]:
    """The decoder layers of a causal LM, inside a PeftModel or not, from the bottom."""
    causal_lm: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return list(causal_lm.get_decoder().layers)


def has_fused_layers(model: nn.Module) -> bool:
    """Whether its layers compute as three nodes (see `FusedDecoderLayer`) as long as no engine hooks into them."""
    return all(isinstance(layer, FusedDecoderLayer) and layer.is_plain() for layer in decoder_layers(model))


def set_recompute(model: nn.Module, levels: LayerLevels) -> None:
    """Sets every layer's level; it acts in train mode alone.

    `full` is transformers' own checkpoint of a layer. Non-reentrant ones need no gradient at the embeddings, so the
    hook that transformers' model-wide switch would put there, at the price of one more backward matmul, is left out.
    A layer that computes by its modules has its MLP alone computed again under `mlp`; its norms and activation keep
    what they keep, so that `norms` is `none`.
    """
    layers = decoder_layers(model)
    assert len(layers) == len(levels.of_layers), f"{len(levels.of_layers)} levels for {len(layers)} layers"
    for layer, level in zip(layers, levels.of_layers, strict=True):
        layer.gradient_checkpointing = level == "full"
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        layer.recompute = level


def set_computation(model: nn.Module, config: RunConfig, device: torch.device) -> None:
    """Sets what the recipe says of how layers compute and what they keep, whatever their level.

    Raises:
        UserError: this GPU, dtype or kind of layers does not do it.
    """
    if config.train.float8:
        use_float8(model, device, config.compute_dtype)
    if config.train.keep_in_float8:
        keep_in_float8(model)
    if config.train.offload_activations:
        offload_activations(model, device)


def check_float8(device: torch.device, compute_dtype: str) -> None:
    """What `use_float8` would refuse on any model.

    Raises:
        UserError: the GPU cannot, or not in `compute_dtype`.
    """
    if device.type != "cuda":
        return
    if not can_multiply(device):
        name = torch.cuda.get_device_name(device)
        allowed = "GPUs of CUDA capability 8.9 or newer: Ada, Hopper and later"
        raise UserError("train.float8", f"true on {name}", allowed, "set it to false")
    if compute_dtype != "bfloat16":
        fix = "set model.dtype (or quantization.compute_dtype) to bfloat16, or train.float8 to false"
        raise UserError("train.float8", f"true in {compute_dtype}", "bfloat16", fix)


def use_float8(model: nn.Module, device: torch.device, compute_dtype: str) -> None:
    """Lets every layer multiply its frozen weights in float8; on the CPU the same is emulated, as a rehearsal.

    Raises:
        UserError: the GPU cannot, not in `compute_dtype`, or layers compute by their modules.
    """
    check_float8(device, compute_dtype)
    _check_fused(model, "train.float8")
    for layer in decoder_layers(model):
        layer.float8 = True


def keep_in_float8(model: nn.Module) -> None:
    """Lets every layer that keeps gate and up for backward keep them in float8.

    Raises:
        UserError: layers compute by their modules.
    """
    _check_fused(model, "train.keep_in_float8")
    for layer in decoder_layers(model):
        layer.keep_in_float8 = True


def offload_activations(model: nn.Module, device: torch.device) -> None:
    """Lets what waits for backward lie in host memory, whatever the layers' levels."""
    layers = decoder_layers(model)
    offload = ActivationOffload(layers, device)
    for layer in layers:
        layer.offload = offload


def _check_fused(model: nn.Module, field: str) -> None:
    if not has_fused_layers(model):
        raise UserError(
            field,
            "true on layers that compute by their modules, one after the other",
            "models without biases, adapters without dropout and DoRA, strategies other than zero3",
            "set it to false, or adapter.dropout to 0 and adapter.dora to false",
        )
