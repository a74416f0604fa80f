"""A model without storage: every parameter's shape, dtype and `requires_grad` final, and where its value comes from."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.model.attention import choose_attention, register_attention
from trainer.model.layers import fuse_layers
from trainer.model.lora import ADAPTER, FusedLora, attach_adapter, decoder_linears, dora_magnitudes
from trainer.model.quantized import QuantizedLinear, QuantizedLinearForDora, format_of
from trainer.model.weights import build_on_meta, load_base_config

logger = logging.getLogger(__name__)
Home = tuple[nn.Module, str]  # a parameter: the module that owns it, and its name there


@dataclass(frozen=True)
class Value:
    """A whole tensor that is the value of one parameter or several."""

    shape: torch.Size
    dtype: torch.dtype
    homes: tuple[Home, ...]


@dataclass(frozen=True)
class Destination:
    """Where a tensor of the base goes, and what is made of it there.

    Attributes:
        shape: of the tensor in the base's files.
        dtype: it is cast to this first, as transformers does before it hands weights to bitsandbytes.
        quantized: the layer, where its weight is quantised.
        dora: the adapter's layer, where magnitudes follow from it.
        values: what comes of it, in the order of `convert`; a tied head that only has to be compared has none.
    """

    shape: torch.Size
    dtype: torch.dtype
    quantized: QuantizedLinear | None
    dora: FusedLora | None
    values: tuple[Value, ...]

    @torch.no_grad()
    def convert(self, weight: torch.Tensor) -> list[torch.Tensor]:
        """The `values` of a tensor that has been cast to `dtype`."""
        tensors = [weight]
        if self.quantized:
            format, dtype = self.quantized.format, self.quantized.compute_dtype
            packed, scales = format.quantize(weight)
            tensors = [packed, scales]
            weight = format.dequantize(packed, scales, dtype) if self.dora else weight
        if self.dora:
            tensors.append(dora_magnitudes(self.dora, weight))
        return tensors


@dataclass(frozen=True)
class BuiltModel:
    """A model whose parameters are all on the meta device.

    Attributes:
        model: the causal LM, or the PeftModel around it.
        adapter_init: first values of the adapter's matrices by `model`'s names, whole, on the CPU.
        destinations: by the names of the base's tensors.
    """

    model: nn.Module
    adapter_init: dict[str, torch.Tensor]
    destinations: dict[str, Destination]


def build_model(config: RunConfig, device: torch.device) -> BuiltModel:
    """The base of `config` with its adapter where the recipe has one, for `device` but without storage.

    Frozen weights are in ``model.dtype``, trained ones in ``train.param_dtype``; only the latter require a gradient.

    Raises:
        UserError: a model outside the Llama family; an adapter that does not fit.
    """
    register_attention()
    base_config = load_base_config(config.model)
    _check_window(base_config, config)
    attention = choose_attention(config.model.attention, base_config, config.compute_dtype, device)
    model: Any = build_on_meta(base_config, getattr(torch, config.model.dtype), attention)
    fuse_layers(model)
    tensors = {name: (_home(model, name), parameter.shape) for name, parameter in model.named_parameters()}
    if config.quantization:
        _replace_linears(model, config)
        tensors = {name: (_home(model, name), shape) for name, (_, shape) in tensors.items()}
    _settle_base(model, config)
    model.name_or_path = config.model.path
    adapter_init: dict[str, torch.Tensor] = {}
    causal_lm = model
    if config.adapter:
        model, adapter_init = attach_adapter(causal_lm, config.adapter, config.train.seed)
        model.peft_config[ADAPTER].base_model_name_or_path = config.model.path
        model.peft_config[ADAPTER].revision = config.model.revision
        _settle_trained(model, getattr(torch, config.train.param_dtype))
    destinations = _find_destinations(model, tensors, getattr(torch, config.model.dtype))
    if causal_lm.config.tie_word_embeddings:
        embeddings = destinations["model.embed_tokens.weight"]
        destinations["lm_head.weight"] = Destination(embeddings.shape, embeddings.dtype, None, None, values=())
    return BuiltModel(model, adapter_init, destinations)


def _check_window(base: PretrainedConfig, config: RunConfig) -> None:
    window = getattr(base, "sliding_window", None)
    if window is not None and window < config.data.pack_length:
        raise UserError(
            "data.pack_length",
            f"{config.data.pack_length} tokens on a model whose attention looks {window} back",
            f"at most {window}",
            "shorten pack_length, or choose a model without a sliding window",
        )
    reach = getattr(base, "max_position_embeddings", None)
    if reach is not None and reach < config.data.pack_length:
        text = "data.pack_length is %d, and the model knows %d positions: rows longer than that are new to it"
        logger.warning(text, config.data.pack_length, reach)


def _home(model: nn.Module, name: str) -> Home:
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner), leaf


def _replace_linears(model: PreTrainedModel, config: RunConfig) -> None:
    """Puts empty quantised layers in the place of the decoder layers' linears."""
    assert config.quantization is not None
    kind = QuantizedLinearForDora if config.adapter and config.adapter.dora else QuantizedLinear
    format, compute_dtype = format_of(config.quantization), getattr(torch, config.compute_dtype)
    for name, linear in decoder_linears(model).items():
        assert isinstance(linear, nn.Linear)
        layer = kind(
            linear.in_features, linear.out_features, linear.bias is not None, format, compute_dtype, device="meta"
        )
        model.set_submodule(name, layer)


def _settle_base(model: PreTrainedModel, config: RunConfig) -> None:
    trained = config.adapter is None
    dtype = getattr(torch, config.train.param_dtype if trained else config.model.dtype)
    for name, parameter in list(model.named_parameters()):
        owner, leaf = _home(model, name)
        own_dtype = dtype if parameter.is_floating_point() else parameter.dtype
        _replace_parameter(owner, leaf, own_dtype, requires_grad=trained)
    if model.config.tie_word_embeddings:
        model.tie_weights()


def _settle_trained(model: nn.Module, dtype: torch.dtype) -> None:
    for name, parameter in list(model.named_parameters()):
        if parameter.requires_grad:
            _replace_parameter(*_home(model, name), dtype, requires_grad=True)


def _replace_parameter(owner: nn.Module, leaf: str, dtype: torch.dtype, requires_grad: bool) -> None:
    empty = torch.empty(owner.get_parameter(leaf).shape, dtype=dtype, device="meta")
    owner.register_parameter(leaf, nn.Parameter(empty, requires_grad))


def _find_destinations(
    model: nn.Module, tensors: dict[str, tuple[Home, torch.Size]], model_dtype: torch.dtype
) -> dict[str, Destination]:
    """Destinations of the base's tensors, each given with its home and shape before anything was quantised."""
    modules = list(model.modules())
    copies = {m.original_module: m.modules_to_save[ADAPTER] for m in modules if isinstance(m, ModulesToSaveWrapper)}
    doras = {m.get_base_layer(): m for m in modules if isinstance(m, FusedLora) and ADAPTER in m.lora_magnitude_vector}
    found = {}
    for name, ((owner, leaf), shape) in tensors.items():
        quantized = owner if isinstance(owner, QuantizedLinear) and leaf == "weight" else None
        dora = doras.get(owner) if leaf == "weight" else None
        if quantized:
            dtype, homes = model_dtype, [[(owner, "packed")], [(owner, "scales")]]
        else:
            dtype, homes = owner.get_parameter(leaf).dtype, [[(owner, leaf)]]
            if owner in copies:
                homes[0].append((copies[owner], leaf))
        values = [_value(*homes_of_one) for homes_of_one in homes]
        if dora:
            base_dtype = quantized.compute_dtype if quantized else dtype
            magnitudes: Any = dora.lora_magnitude_vector[ADAPTER]
            values.append(Value(magnitudes.weight.shape, base_dtype, ((magnitudes, "weight"),)))
        found[name] = Destination(shape, dtype, quantized, dora, tuple(values))
    return found


def _value(*homes: Home) -> Value:
    owner, leaf = homes[0]
    parameter = owner.get_parameter(leaf)
    return Value(parameter.shape, parameter.dtype, homes)
