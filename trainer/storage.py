"""Storage for parameters that were built on the meta device."""

from __future__ import annotations

import torch
from torch import nn


def allocate(module: nn.Module, device: torch.device) -> None:
    """Gives every parameter without storage uninitialised storage on `device`; dtype, `requires_grad`, tying stay.

    All of it before the first tensor is read: what stays must not lie between the temporaries of what comes, or the
    allocator keeps the holes.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for owner in module.modules():
        for leaf, parameter in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            if not parameter.is_meta:
                continue
            if parameter not in made:
                storage = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                made[parameter] = nn.Parameter(storage, requires_grad=parameter.requires_grad)
            owner.register_parameter(leaf, made[parameter])


@torch.no_grad()
def put(target: torch.Tensor, value: torch.Tensor) -> None:
    """Copies `value` into `target`, floats cast to its dtype; bytes stay bytes."""
    assert target.shape == value.shape, f"{tuple(value.shape)} into {tuple(target.shape)}"
    assert target.is_floating_point() == value.is_floating_point(), f"{value.dtype} into {target.dtype}"
    target.detach().copy_(value)
