"""Sets the dial ``train.recompute`` on a model: what each decoder layer computes again in backward."""

from __future__ import annotations

from functools import partial
from typing import Any

from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainer.model.layers import FusedDecoderLayer
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
