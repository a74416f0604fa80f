"""Optimizers by name, and their state as a flat dict that a checkpoint can hold.

bitsandbytes' 8-bit and paged AdamW run on CUDA and on the CPU (there without paging).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from trainer.config import OptimConfig

# Constants of bitsandbytes' 8-bit data type, the same for every parameter: not state.
CONSTANT_STATE = frozenset({"qmap1", "qmap2"})


def build_optimizer(config: OptimConfig, module: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer over the module's trained parameters; vectors (norms, biases) are not decayed."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return _optimizer_class(config.name)(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def _optimizer_class(name: str) -> Callable[..., torch.optim.Optimizer]:
    if name == "adamw":
        return lambda groups, **options: torch.optim.AdamW(groups, fused=True, **options)
    import bitsandbytes.optim as bnb_optim

    return {
        "adamw_8bit": bnb_optim.AdamW8bit,
        "paged_adamw_8bit": bnb_optim.PagedAdamW8bit,
        "paged_adamw_32bit": bnb_optim.PagedAdamW32bit,
    }[name]


def init_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Allocates the moments that are missing, as they are before the first step.

    By a step that changes nothing, zero gradients at a learning rate of zero, whose count is then taken back. Moments
    that exist stay: bitsandbytes never frees paged ones, so whoever allocates them twice pays twice.
    """
    missing = [p for group in optimizer.param_groups for p in group["params"] if not optimizer.state.get(p)]
    if not missing:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        for parameter in missing:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for parameter in missing:
            state = optimizer.state.get(parameter, {})
            if "step" in state:
                state["step"] *= 0  # a tensor in place, a number by assignment
    except torch.OutOfMemoryError:
        for parameter in missing:
            optimizer.state.pop(parameter, None)  # half of them would pass for all
        raise
    finally:
        optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def optimizer_state(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> dict[str, torch.Tensor]:
    """The moments as ``optim.<parameter>.<name>``; live tensors, and step counts as scalars."""
    return {
        f"optim.{name}.{key}": value if isinstance(value, torch.Tensor) else torch.tensor(value)
        for name, parameter in named_parameters
        for key, value in optimizer.state.get(parameter, {}).items()
        if key not in CONSTANT_STATE
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    state: dict[str, Any],
) -> None:
    """Copies `optimizer_state`'s result back into an optimizer whose moments exist (`init_optimizer_state`)."""
    for name, parameter in named_parameters:
        for key, value in optimizer.state[parameter].items():
            if key in CONSTANT_STATE:
                continue
            saved = state[f"optim.{name}.{key}"]
            if isinstance(value, torch.Tensor):
                value.copy_(saved)
            else:
                optimizer.state[parameter][key] = saved.item()
