"""Norm and MLP of a decoder layer with fewer passes over memory than transformers' own, and the same parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralMLP, MistralRMSNorm

from trainer.model.swiglu import swiglu


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
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def fuse_layers(model: PreTrainedModel) -> None:
    """Replaces norms and MLPs of a Llama-family model; parameter names stay as they are."""
    for name, module in list(model.named_modules()):
        if isinstance(module, (LlamaRMSNorm, MistralRMSNorm)):
            model.set_submodule(name, FusedRMSNorm(module))
        elif isinstance(module, (LlamaMLP, MistralMLP)) and module.config.hidden_act == "silu":
            model.set_submodule(name, FusedMLP(module))
