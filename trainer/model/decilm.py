"""DeciLM, a Llama whose layers differ in their number of key and value heads (https://huggingface.co/Deci/DeciLM-6b).

Its own code on the hub is of transformers 4 and is never run: transformers' Llama is built here with each layer's
number of heads, under the parameter names of the checkpoint.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PretrainedConfig

from trainer.errors import UserError

PER_LAYER = "num_key_value_heads_per_layer"


class DeciLMConfig(LlamaConfig):
    """Llama's config with the KV heads of each layer; `num_key_value_heads` means nothing."""

    model_type = "deci"

    num_key_value_heads_per_layer: list[int] | None = None


class DeciLMForCausalLM(LlamaForCausalLM):
    """Llama's model in which each layer projects to its own number of KV heads."""

    config_class = DeciLMConfig

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        for layer, num_heads in zip(self.model.layers, config.num_key_value_heads_per_layer or [], strict=True):
            attention = layer.self_attn
            attention.num_key_value_groups = config.num_attention_heads // num_heads
            for name in ("k_proj", "v_proj"):
                rows = num_heads * attention.head_dim
                setattr(attention, name, nn.Linear(config.hidden_size, rows, bias=config.attention_bias))
        self.post_init()


AutoConfig.register(DeciLMConfig.model_type, DeciLMConfig, exist_ok=True)
AutoModelForCausalLM.register(DeciLMConfig, DeciLMForCausalLM, exist_ok=True)


def recognise_decilm(config: PretrainedConfig, source: Path | str) -> PretrainedConfig:
    """A checked `DeciLMConfig` where `config` describes a DeciLM, under whatever ``model_type``; else `config` itself.

    Args:
        source: where it was read, for the message.

    Raises:
        UserError: the numbers of heads do not fit the model.
    """
    if isinstance(config, LlamaConfig) and not isinstance(config, DeciLMConfig) and hasattr(config, PER_LAYER):
        config = DeciLMConfig.from_dict({**config.to_dict(), "model_type": DeciLMConfig.model_type})
    if isinstance(config, DeciLMConfig):
        _check_heads(config, source)
    return config


def _check_heads(config: DeciLMConfig, source: Path | str) -> None:
    found: Any = config.num_key_value_heads_per_layer  # transformers does not check what it reads
    where, fix, heads = f"{source}: {PER_LAYER}", "use the model's own config.json", config.num_attention_heads
    if not isinstance(found, list) or len(found) != config.num_hidden_layers:
        said = f"{len(found)} numbers" if isinstance(found, list) else repr(found)
        raise UserError(where, said, f"a list of {config.num_hidden_layers} numbers, one a layer", fix)
    for layer, number in enumerate(found):
        if type(number) is not int or number < 1 or heads % number:
            raise UserError(where, f"{number!r} in layer {layer}", f"a divisor of {heads} (num_attention_heads)", fix)


def num_copied_weights(config: PretrainedConfig) -> int:
    """Weights of an export beyond those that were trained: the copies of KV heads."""
    if not isinstance(config, DeciLMConfig) or config.num_key_value_heads_per_layer is None:
        return 0
    assert config.head_dim is not None
    per_layer = config.num_key_value_heads_per_layer
    num_heads = math.lcm(*per_layer) * len(per_layer) - sum(per_layer)
    return 2 * num_heads * config.head_dim * config.hidden_size


def as_llama(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the plain Llama that computes the same once KV heads are repeated; else `config` itself.

    Programs that serve models know no DeciLM any more: vLLM's class of that name has been for Nemotron-NAS alone since
    https://github.com/vllm-project/vllm/pull/15008, and before it repeated the heads as well.
    """
    if not isinstance(config, DeciLMConfig):
        return config
    fields = config.to_dict()
    per_layer = fields.pop(PER_LAYER)
    fields |= {"model_type": LlamaConfig.model_type, "architectures": ["LlamaForCausalLM"]}
    return LlamaConfig.from_dict({**fields, "num_key_value_heads": math.lcm(*per_layer)})
