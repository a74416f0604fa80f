"""Decoder layers with fewer passes over memory than transformers' own, and the same parameters under the same names."""

from __future__ import annotations

from dataclasses import replace
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
from trainer.model.attention import PACKED_ATTENTION
from trainer.model.blocks import AddProjection, FeedForward, QueryKeyValue, SwiGLU
from trainer.model.linears import LinearSpec
from trainer.model.lora import flat_linear
from trainer.model.offload import ActivationOffload


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

    Where a linear needs its own module (see `flat_linear`), or rows are padded or cached (generation), it computes by
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

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``[1, tokens, hidden] -> [1, tokens, hidden]``; arguments as of transformers' decoder layers."""
        parts = None if args else self._parts(hidden_states, **kwargs)
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
        if not isinstance(self.mlp, FusedMLP):
            return False
        attention, mlp = self.self_attn, self.mlp
        names = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, *mlp.children())
        return all(flat_linear(linear) is not None for linear in names)

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

    def _parts(self, hidden_states: torch.Tensor, **kwargs: Any) -> Parts | None:
        """What the nodes take; None where the modules have to compute."""
        attention, device_type = self.self_attn, hidden_states.device.type
        if len(hidden_states) != 1 or kwargs.get("past_key_values") is not None:
            return None
        if attention.config._attn_implementation not in PACKED_ATTENTION or not isinstance(self.mlp, FusedMLP):
            return None
        dtype = hidden_states.dtype
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        qkv = self._flatten(dtype, attention.q_proj, attention.k_proj, attention.v_proj)
        output = self._flatten(dtype, attention.o_proj)
        mlp = self._flatten(dtype, self.mlp.gate_proj, self.mlp.up_proj, self.mlp.down_proj)
        if qkv is None or output is None or mlp is None:
            return None
        return Parts(dtype, qkv, (output[0][0], *output[1:]), mlp)

    def _flatten(self, dtype: torch.dtype, *linears: nn.Module) -> tuple[Any, ...] | None:
        specs: list[LinearSpec] = []
        tensors: list[torch.Tensor] = []
        for linear in linears:
            flat = flat_linear(linear, dtype)
            if flat is None:
                return None
            frozen = not any(tensor.requires_grad for tensor in flat[1][: flat[0].num_base])
            specs.append(replace(flat[0], float8=self.float8 and frozen))
            tensors += flat[1]
        return tuple(specs), *tensors


class Parts(NamedTuple):
    """Specs and tensors of a layer's linears, as the nodes take them."""

    dtype: torch.dtype
    qkv: tuple[Any, ...]
    output: tuple[Any, ...]
    mlp: tuple[Any, ...]


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
