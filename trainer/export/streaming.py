"""Runs a model of any size layer by layer: weights are on the device only while the layer that owns them computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

Read = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Outputs:
    """What a forward gave, in float32 on the CPU.

    Attributes:
        hidden: after the embeddings and after each layer, ``[tokens, hidden_size]`` each, padding taken out.
        logits: ``[tokens, vocab_size]``.
    """

    hidden: list[torch.Tensor]
    logits: torch.Tensor

    def cut(self, num_tokens: int) -> tuple[Outputs, torch.Tensor]:
        """The first so many tokens, and the logits of the others."""
        first = Outputs([hidden[:num_tokens] for hidden in self.hidden], self.logits[:num_tokens])
        return first, self.logits[num_tokens:]


def build_empty(config: PretrainedConfig) -> Any:
    """The transformers model of `config` in float32 whose weights have no storage and whose buffers do."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval()


@contextmanager
def weights_of(module: nn.Module, prefix: str, read: Read) -> Iterator[None]:
    """Gives every parameter of `module` that has no storage its values, and takes them away again.

    Args:
        prefix: of the module's parameter names in the whole model, with its dot.
        read: full name -> values, in the dtype and on the device wanted.
    """
    empty = [(name, parameter) for name, parameter in module.named_parameters() if parameter.is_meta]
    for name, _ in empty:
        _put(module, name, nn.Parameter(read(prefix + name), requires_grad=False))
    try:
        yield
    finally:
        for name, parameter in empty:
            _put(module, name, parameter)


@torch.no_grad()
def run_streamed(model: Any, read: Read, prompts: list[list[int]], device: torch.device) -> Outputs:
    """One forward over all `prompts` (padded on the right) of a model that `build_empty` made, adapter or not."""
    with _streaming(model, read):
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer.to(device) if buffer is not None else None
        width = max(map(len, prompts))
        ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts], device=device)
        mask = torch.tensor([[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts], device=device)
        output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    real = mask.bool().cpu()
    return Outputs([hidden.float().cpu()[real] for hidden in output.hidden_states], output.logits.float().cpu()[real])


@contextmanager
def _streaming(model: Any, read: Read) -> Iterator[None]:
    loaded: dict[nn.Module, Any] = {}
    handles = []

    def load(module: nn.Module, prefix: str) -> None:
        loaded[module] = weights_of(module, prefix, read)
        loaded[module].__enter__()

    def unload(module: nn.Module) -> None:
        loaded.pop(module).__exit__(None, None, None)

    for name, module in _units(model):
        handles.append(module.register_forward_pre_hook(lambda m, _, prefix=f"{name}.": load(m, prefix)))
        handles.append(module.register_forward_hook(lambda m, *_: unload(m)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _units(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Decoder layers, and outside of them each module with parameters of its own."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = list(causal_lm.get_decoder().layers)
    inside = {id(child) for layer in layers for child in layer.modules()}
    for name, module in model.named_modules():
        is_layer = any(module is layer for layer in layers)
        if is_layer or (id(module) not in inside and next(module.parameters(recurse=False), None) is not None):
            yield name, module


def _put(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, parameter)
