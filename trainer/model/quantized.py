"""Base weights as plain uint8 tensors, dequantised for each matmul.

bitsandbytes keeps half of a 4-bit weight in Python attributes of a tensor subclass, which FSDP2, ZeRO and DCP neither
shard nor save. Here a weight is two ordinary uint8 parameters, so every engine can shard, gather, save and restore it,
and no cast of floating tensors can touch its bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from trainer.config import QuantizationConfig
from trainer.model.format import Format
from trainer.model.int8 import Int8
from trainer.model.nf4 import FourBit

BYTES_AT_A_TIME = 2**30  # counted for a fingerprint, which needs no memory


def format_of(config: QuantizationConfig) -> Format:
    """How a recipe's weights are stored."""
    return Int8() if config.type == "int8" else FourBit(config.type, config.double_quant)


class QuantizedMatMul(torch.autograd.Function):
    """``x @ W.T + bias`` with W dequantised for the call; backward dequantises it again instead of keeping it.

    Saves the parameters themselves: a view of one would pin the whole gathered base under ZeRO-3.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        packed: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        format: Format,
    ) -> torch.Tensor:
        ctx.save_for_backward(packed, scales)
        ctx.format = format
        return F.linear(x, format.dequantize(packed, scales, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_output,) = grad_outputs
        packed, scales = ctx.saved_tensors
        weight = ctx.format.dequantize(packed, scales, grad_output.dtype)
        return grad_output @ weight, None, None, None, None


class QuantizedLinear(nn.Module):
    """A frozen linear layer with its weight in two uint8 parameters; has no `.weight` on purpose.

    PEFT reads and writes `.weight` where it finds one (PiSSA, merging), which would be silently wrong here.

    Args:
        format: storage of the weight.
        compute_dtype: dtype the weight is dequantised to, and of the matmul.
        device: where the (empty) parameters are made.

    Attributes:
        packed, scales: see `Format`; frozen.
        bias: ``[out]`` or None, frozen.
    """

    packed: nn.Parameter
    scales: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        format: Format,
        compute_dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.format, self.compute_dtype = format, compute_dtype
        self.packed = _bytes_parameter(device, out_features, format.packed_columns(in_features))
        self.scales = _bytes_parameter(device, format.num_scale_bytes(out_features, in_features))
        empty_bias = torch.empty(out_features, dtype=compute_dtype, device=device)
        self.bias = nn.Parameter(empty_bias, requires_grad=False) if bias else None

    def set_weight(self, weight: torch.Tensor) -> None:
        """Quantises ``[out, in]`` `weight` where it lies and copies it into this layer's parameters."""
        packed, scales = self.format.quantize(weight)
        self.packed.data.copy_(packed)
        self.scales.data.copy_(scales)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight ``[out, in]`` in `dtype`."""
        return self.format.dequantize(self.packed, self.scales, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in] -> [..., out]``; in the input's dtype, or in `compute_dtype` under autocast."""
        dtype, device_type = self.compute_dtype, x.device.type
        out_dtype = dtype if torch.is_autocast_enabled(device_type) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        # autocast inside an autograd function would cast the forward and not the backward
        with torch.autocast(device_type, enabled=False):
            return QuantizedMatMul.apply(x.to(dtype), self.packed, self.scales, bias, self.format).to(out_dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedLinear:
        def keep_bytes(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)  # `.to` and `.half()` leave integers alone, `.type()` does not
            is_cast = tensor.dtype == torch.uint8 and moved.dtype != torch.uint8
            return tensor.to(moved.device) if is_cast else moved

        return super()._apply(keep_bytes, recurse)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        error_msgs = args[-1]
        for name in ("packed", "scales"):
            given = state_dict.get(prefix + name)
            if given is not None and given.dtype != torch.uint8:
                error_msgs.append(f"{prefix}{name} is {given.dtype}; these are bytes, which a cast destroys")
                return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            + str(self.format)
        )


class QuantizedLinearForDora(QuantizedLinear):
    """With the dequantised `.weight` that DoRA's magnitudes are computed from; for reading only."""

    @property
    def weight(self) -> torch.Tensor:
        return nn.Parameter(self.dequantize(self.compute_dtype), requires_grad=False)


def _bytes_parameter(device: torch.device | str | None, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.uint8, device=device), requires_grad=False)


def fingerprint(
    model: nn.Module,
    group: dist.ProcessGroup | None = None,
    own: Callable[[nn.Parameter], torch.Tensor] = nn.Parameter.detach,
) -> str:
    """Fingerprint of every byte of the quantised weights of `model`; the same wherever and however they lie.

    Loss does not notice corrupted scales (it stays equal to four digits), this does.

    Args:
        group: the processes among which the bytes are cut, each holding its own; None where they are whole.
        own: this process's part of a parameter where it is cut.
    """
    sums = Fingerprint()
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            sums.add(own(module.packed), own(module.scales))
    if group is not None:
        sums.all_reduce(group)
    return sums.text()


class Fingerprint:
    """Sum and sum of squares of bytes, added up tensor by tensor in any order and on any device."""

    def __init__(self) -> None:
        self.total = torch.zeros(2, dtype=torch.int64)
        self.count = 0

    def add(self, *tensors: torch.Tensor) -> None:
        """Takes contiguous uint8 tensors in."""
        for data in tensors:
            self.total += _byte_sums(data)
            self.count += data.numel()

    def include(self, other: Fingerprint) -> None:
        """Takes in what another one was given."""
        self.total, self.count = self.total + other.total, self.count + other.count

    def all_reduce(self, group: dist.ProcessGroup) -> None:
        """Adds up with what the other processes of `group` took in; on the CPU."""
        sums = torch.tensor([*self.total.tolist(), self.count], dtype=torch.int64)
        dist.all_reduce(sums, group=group)
        self.total, self.count = sums[:2], int(sums[2])

    def state(self) -> list[int]:
        """What `restore` takes, to go on from here."""
        return [*self.total.tolist(), self.count]

    def restore(self, state: list[int]) -> None:
        """Takes up what another one had added up to."""
        self.total, self.count = torch.tensor(state[:2]), state[2]

    def text(self) -> str:
        return hashlib.blake2b(f"{self.count} {self.total.tolist()}".encode(), digest_size=16).hexdigest()


def _byte_sums(data: torch.Tensor) -> torch.Tensor:
    """By how often each byte occurs: one pass, and no wider copy of the data."""
    counts = torch.zeros(256, dtype=torch.int64)
    for chunk in data.view(-1).split(BYTES_AT_A_TIME):
        counts += torch.bincount(chunk, minlength=256).cpu()
    values = torch.arange(256)
    return torch.stack([counts @ values, counts @ values.square()])
