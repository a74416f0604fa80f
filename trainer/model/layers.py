"""Decoder layers with fewer passes over memory than transformers' own, and the same parameters under the same names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralMLP, MistralRMSNorm

from trainer.config import RecomputeLevel
from trainer.model.adapters import SharedAdapters, cast_adapters
from trainer.model.attention import PACKED_ATTENTION
from trainer.model.blocks import AddProjection, FeedForward, QueryKeyValue, SwiGLU
from trainer.model.linears import LinearSpec
from trainer.model.lora import PlainLinear, plain_linear, read_base
from trainer.model.offload import ActivationOffload

LAYERS_AT_ONCE = 8  # whose adapters are cast together: of all linears some hundred matrices, what a kernel takes


class FusedRMSNorm(nn.Module):
    """Root mean square norm (arXiv:1910.07467) in one kernel, computed in float32 and rounded once.

    transformers' own keeps two float32 copies of its input for backward: some 20 GiB of a 70B model at 4,096 tokens.
    """

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., hidden] -> [..., hidden]`` in the input's dtype."""
        # autocast would have the whole of it in float32
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class FusedMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))`` that keeps gate and up for backward, and not what lies between."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., hidden] -> [..., hidden]``."""
        return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


class FusedDecoderLayer(GradientCheckpointingLayer):
    """A decoder layer of the Llama family as the three nodes of `trainer.model.blocks`, for packed rows.

    Where a linear needs its own module (see `plain_linear`), or rows are padded or cached (generation), it computes by
    transformers' modules, one after the other.

    Attributes:
        recompute: what backward computes again; ``full`` is transformers' gradient checkpointing around the layer.
        float8: multiply frozen weights in float8.
        keep_in_float8: gate and up, where backward is given them.
        offload: where what waits for backward lies in host memory.
    """

    recompute: RecomputeLevel = "none"
    float8 = False
    keep_in_float8 = False
    offload: ActivationOffload | None = None

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm = layer.input_layernorm
        self.post_attention_layernorm = layer.post_attention_layernorm

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As modules do, and around a checkpoint too, whose input waits for backward."""
        if self.offload is None or not torch.is_grad_enabled():
            return super().__call__(*args, **kwargs)
        with self.offload.around(self, kwargs):
            return super().__call__(*args, **kwargs)

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, adapters: LayerAdapters | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """``[1, tokens, hidden] -> [1, tokens, hidden]``; arguments as of transformers' decoder layers.

        Args:
            adapters: this layer's of `adapters_of_layers`.
        """
        parts = None if args else self._parts(hidden_states, adapters, **kwargs)
        if parts is None:
            attended, _ = self.self_attn(self.input_layernorm(hidden_states), *args, **kwargs)
            hidden_states = hidden_states + attended
            normed = self.post_attention_layernorm(hidden_states)
            again = self.recompute == "mlp" and torch.is_grad_enabled()
            return hidden_states + (checkpoint(self.mlp, normed, use_reentrant=False) if again else self.mlp(normed))
        # autocast inside an autograd function would cast the forward and not the backward
        with torch.autocast(hidden_states.device.type, enabled=False):
            return self._fused(hidden_states.to(parts.dtype), parts, **kwargs)

    def is_plain(self) -> bool:
        """Whether all of its linears are of the kind that the nodes compute."""
        return self.plain_linears() is not None

    def plain_linears(self, dtype: torch.dtype | None = None) -> list[list[PlainLinear]] | None:
        """Its linears, those together that read one input; None where one of them computes by its module."""
        attention, mlp = self.self_attn, self.mlp
        if not isinstance(mlp, FusedMLP):
            return None
        groups = []
        for modules in (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        ):
            linears = [linear for module in modules if (linear := plain_linear(module, dtype)) is not None]
            if len(linears) < len(modules):
                return None
            groups.append(linears)
        return groups

    def _fused(
        self,
        hidden_states: torch.Tensor,
        parts: Parts,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        attention, rows = self.self_attn, hidden_states.squeeze(0)
        norm, next_norm = self.input_layernorm, self.post_attention_layernorm
        cos, sin = (table[0] for table in position_embeddings)
        # Computed again as a whole, a layer may keep all for the moment of its backward.
        again: RecomputeLevel = "none" if self.recompute == "full" else self.recompute
        *heads, rows = QueryKeyValue.apply(rows, norm.weight, norm.eps, cos, sin, again, *parts.qkv)
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in heads)
        attend: Any = PACKED_ATTENTION[attention.config._attn_implementation]
        attended = attend(attention, q, k, v, attention_mask, scaling=attention.scaling, **kwargs)[0]
        rows = AddProjection.apply(attended.reshape(len(rows), -1), rows, *parts.output)
        # Neither that nor a forward without a backward has a use for it.
        in_float8 = self.keep_in_float8 and self.recompute != "full" and torch.is_grad_enabled()
        rows = FeedForward.apply(rows, next_norm.weight, next_norm.eps, again, in_float8, *parts.mlp)
        return torch.ops.aten._unsafe_view(rows, hidden_states.shape)  # FSDP2 hooks the output, and warns of views

    def _parts(
        self, hidden_states: torch.Tensor, adapters: LayerAdapters | None, past_key_values: Any = None, **kwargs: Any
    ) -> Parts | None:
        """What the nodes take; None where the modules have to compute."""
        if len(hidden_states) != 1 or past_key_values is not None:
            return None
        if self.self_attn.config._attn_implementation not in PACKED_ATTENTION:
            return None
        dtype, device_type = hidden_states.dtype, hidden_states.device.type
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        if adapters is None:
            (adapters,) = adapters_of_layers([self], dtype)
        if adapters is None:
            return None
        qkv, output, inner, down = (self._flatten(*group) for group in zip(*adapters, strict=True))
        mlp = ((*inner[0], *down[0]), *inner[1:], *down[1:])
        return Parts(dtype, qkv, (output[0][0], *output[1:]), mlp)

    def _flatten(self, linears: list[PlainLinear], adapters: SharedAdapters) -> tuple[Any, ...]:
        """Specs and tensors, as of `trainer.model.linears.Linears`. A base is whole only while its layer computes."""
        specs: list[LinearSpec] = []
        tensors: list[torch.Tensor] = []
        lora_b = iter(adapters.b)
        for base, adapter in linears:
            format, own = read_base(base)
            in_float8 = self.float8 and not any(tensor.requires_grad for tensor in own)
            b = [next(lora_b)] if adapter else []
            specs.append(LinearSpec(format, b[0].shape[1] if b else 0, in_float8))
            tensors += [*own, *b]
        return tuple(specs), *tensors, *([] if adapters.a is None else [adapters.a])


class Parts(NamedTuple):
    """Specs and tensors of a layer's linears, as the nodes take them."""

    dtype: torch.dtype
    qkv: tuple[Any, ...]
    output: tuple[Any, ...]
    mlp: tuple[Any, ...]


class LayerAdapters(NamedTuple):
    """A layer's linears, those together that read one input, and of each such group the adapters as they multiply."""

    linears: list[list[PlainLinear]]
    cast: list[SharedAdapters]


def with_adapters(layers: Sequence[nn.Module], dtype: torch.dtype) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """Each layer and the arguments by which it is given its adapters in `dtype`.

    Some layers' are cast at a time, and only when their turn comes: the backward of that then runs as soon as theirs is
    over, and their adapters' gradients do not wait for those of the last layer.
    """
    for start in range(0, len(layers), LAYERS_AT_ONCE):
        some = layers[start : start + LAYERS_AT_ONCE]
        for layer, adapters in zip(some, adapters_of_layers(some, dtype), strict=True):
            yield layer, {} if adapters is None else {"adapters": adapters}


def adapters_of_layers(layers: Iterable[nn.Module], dtype: torch.dtype) -> list[LayerAdapters | None]:
    """Of each layer what the nodes multiply by in `dtype`, cast for all of them at once; None where modules compute."""
    linears = [layer.plain_linears(dtype) if isinstance(layer, FusedDecoderLayer) else None for layer in layers]
    groups = [group for own in linears if own is not None for group in own]
    cast = iter(cast_adapters([[one.adapter for one in group if one.adapter] for group in groups], dtype))
    return [None if own is None else LayerAdapters(own, [next(cast) for _ in own]) for own in linears]


def fuse_layers(model: PreTrainedModel) -> None:
    """Replaces norms and decoder layers of a Llama-family model; parameter names stay as they are."""
    for name, module in list(model.named_modules()):
        if isinstance(module, (LlamaRMSNorm, MistralRMSNorm)):
            model.set_submodule(name, FusedRMSNorm(module))
        elif isinstance(module, (LlamaMLP, MistralMLP)) and module.config.hidden_act == "silu":
            model.set_submodule(name, FusedMLP(module))
    for name, module in list(model.named_modules()):
        if isinstance(module, (LlamaDecoderLayer, MistralDecoderLayer)):
            model.set_submodule(name, FusedDecoderLayer(module))
