"""Optimizers by name, and the 8-bit form of their moments.

bitsandbytes' 8-bit and paged AdamW run on CUDA and on the CPU (there without paging).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch

from trainer.config import OptimConfig

# Constants of bitsandbytes' 8-bit data type, the same for every parameter: not state.
CONSTANT_STATE = frozenset({"qmap1", "qmap2"})
BLOCK_8BIT = 256  # elements that share a scale in bitsandbytes' 8-bit optimizers
MIN_8BIT_SIZE = 4096  # elements; below, 8 bit would save nothing


def build_optimizer(
    config: OptimConfig, named: Iterable[tuple[str, torch.Tensor]], min_8bit_size: int = MIN_8BIT_SIZE
) -> torch.optim.Optimizer:
    """The recipe's optimizer over trained tensors, or a process's rows of them; vectors (norms, biases) do not decay.

    Args:
        min_8bit_size: tensors of fewer elements keep 32-bit moments under the 8-bit optimizers.
    """
    trained = [tensor for _, tensor in named]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.name == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    assert all(p.is_contiguous() for p in trained), "bitsandbytes would make contiguous copies, and step on those"
    return _bitsandbytes_class(config.name)(groups, min_8bit_size=min_8bit_size, **options)


def _bitsandbytes_class(name: str) -> Callable[..., torch.optim.Optimizer]:
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


def paged_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of moments that the driver moves between GPU and host memory as there is room."""
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return sum(moment.nbytes for moment in moments if getattr(moment, "is_paged", False))


def quantize_moment(values: torch.Tensor, key: str) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit codes and block scales of a float32 moment, as bitsandbytes' 8-bit optimizers hold it.

    Args:
        key: ``state1`` (signed) or ``state2``.

    Returns:
        Codes, uint8 in the shape of `values`; scales ``[ceil(elements / 256)]`` float32.
    """
    from bitsandbytes.functional import quantize_blockwise

    codes, state = quantize_blockwise(values, _dynamic_map(key, values.device), blocksize=BLOCK_8BIT)
    return codes, state.absmax


def dequantize_moment(codes: torch.Tensor, absmax: torch.Tensor, key: str, start: int = 0) -> torch.Tensor:
    """The float32 moment of `quantize_moment`'s result, or a part of it.

    Args:
        codes: consecutive elements, in any shape.
        absmax: scales of all blocks.
        start: elements of the whole before those of `codes`.
    """
    first, stop = start // BLOCK_8BIT, start + codes.numel()
    scales = absmax[first : -(-stop // BLOCK_8BIT)].repeat_interleave(BLOCK_8BIT)
    own = scales[start - first * BLOCK_8BIT :][: codes.numel()]
    return _dynamic_map(key, codes.device)[codes.int()].mul_(own.view(codes.shape))


@lru_cache
def _dynamic_map(key: str, device: torch.device) -> torch.Tensor:
    """The 256 values of the 8-bit type a moment is in (arXiv:2110.02861)."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=key == "state1").to(device)
