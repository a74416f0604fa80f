"""4-bit base weights as plain uint8 tensors, the same bytes on every device (QLoRA, arXiv:2305.14314).

bitsandbytes keeps half of a 4-bit weight in Python attributes of a tensor subclass, which FSDP2, ZeRO and DCP neither
shard nor save. Here a weight is two ordinary uint8 parameters, so every engine can shard, gather, save and restore it,
and no cast of floating tensors can touch its bytes. An engine that takes floats alone may hold them as another dtype's
bit view: everything that reads them views them as bytes again.

bitsandbytes' own kernels round differently on CUDA (approximate reciprocals), on the CPU and from one processor to
another, so a base quantised by them on a GPU is not the one that a CPU makes. Quantisation is therefore spelled out in
elementwise float32 arithmetic, which IEEE 754 fixes; dequantisation is bitsandbytes'. `quantize_weight` says how close
the two are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes)
import torch
import torch.distributed as dist
from bitsandbytes.functional import get_4bit_type
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from trainer.config import QuantizationConfig
from trainer.errors import UserError

BLOCK_SIZE = 64  # weights that share one scale
SCALES_PER_GROUP = 256  # scales that share one second-level scale
CHUNK = 2**22  # weights quantised at a time: some 20 bytes are held for each
BYTES_AT_A_TIME = 2**30  # counted for a fingerprint, which needs no memory
SMALLEST_ABSMAX = 2.0**-126  # that is divided by, float32's smallest normal number: zeros become codes of zero


@dataclass(frozen=True)
class Format:
    """How 4-bit weights are stored: data type, and whether the block scales are quantised too."""

    type: Literal["nf4", "fp4"]
    double_quant: bool

    @classmethod
    def of(cls, config: QuantizationConfig) -> Format:
        return cls(config.type, config.double_quant)

    def num_scale_bytes(self, num_weights: int) -> int:
        """Length of the `scales` tensor of a weight with this many elements."""
        num_blocks = -(-num_weights // BLOCK_SIZE)
        if not self.double_quant:
            return 4 * num_blocks
        return num_blocks + 4 * (-(-num_blocks // SCALES_PER_GROUP) + 1)


@lru_cache
def dynamic_map(device: torch.device) -> torch.Tensor:
    """The 256 values of the signed 8-bit dynamic type (arXiv:1511.04561), ascending; a constant, so never stored.

    From integers: the last bits of bitsandbytes' ``create_dynamic_map`` depend on the processor's vector instructions.
    """
    magnitudes = [  # 0.1 to 1, 0.01 to 0.1 and so on, each cut into half as many equal parts; of each its centre
        (2 * parts + 9 * odd) / (2 * parts * 10 ** (7 - exponent))
        for exponent, parts in enumerate([1, 2, 4, 8, 16, 32, 64])
        for odd in range(1, 2 * parts, 2)
    ]
    values = sorted([*magnitudes, *(-value for value in magnitudes), 0.0, 1.0])
    return torch.tensor(values, dtype=torch.float32, device=device)


@lru_cache
def _code_bounds(type: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Midpoints between neighbouring values of a 4-bit type ``[15]``, and the codes by ascending value ``[16]``."""
    values, codes = get_4bit_type(type, device="cpu").sort(stable=True)
    return _midpoints(values).to(device), codes.to(device, torch.uint8)


def _midpoints(ascending: torch.Tensor) -> torch.Tensor:
    return (ascending[:-1] + ascending[1:]) / 2


@torch.no_grad()
def quantize_weight(weight: torch.Tensor, format: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises a matrix in blocks of 64 consecutive elements; the same bytes on the CPU and on CUDA.

    Against ``bitsandbytes.functional.quantize_4bit`` 0.50:

    - Block scales: equal.
    - 4-bit codes: equal to its CPU implementation, but for ties in a last block of fewer than 64 weights. Its CUDA
      kernel multiplies by approximate reciprocals, so a weight at the edge of two codes may get the other one: none of
      NF4 from bfloat16, less than one in a million of NF4 from float32 and float16; of FP4, whose values are round
      numbers, six in ten thousand from bfloat16. Its FP4 zeros also carry the other sign.
    - 8-bit codes of the scales: the nearest, as on CUDA; there fewer than one in ten thousand differ, by one, as the
      mean is added up in float64. The CPU kernel looks them up in a table of 65536 entries, which is too coarse close
      to zero: two or three in a thousand differ.

    Args:
        weight: ``[out, in]``, float32, bfloat16 or float16; `in` even.

    Returns:
        packed: ``[out, in / 2]`` uint8, two 4-bit codes a byte.
        scales: 1-D uint8. Without double quantisation the float32 block scales ``[blocks]``, as bytes. With it, one
            after the other: the float32 second-level scales ``[ceil(blocks / 256)]``, the float32 mean that was
            subtracted before ``[1]``, and the 8-bit codes ``[blocks]``. Floats come first, so they stay aligned.

    Raises:
        UserError: `in` is odd.
    """
    out_features, in_features = weight.shape
    if in_features % 2:
        raise UserError("quantization", f"a weight of shape {[out_features, in_features]}", "an even number of columns")
    bounds, codes_by_value = _code_bounds(format.type, weight.device)
    packed = torch.empty(weight.numel() // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(-(-weight.numel() // BLOCK_SIZE), dtype=torch.float32, device=weight.device)
    chunks = zip(
        weight.reshape(-1).split(CHUNK), packed.split(CHUNK // 2), scales.split(CHUNK // BLOCK_SIZE), strict=True
    )
    for chunk, packed_chunk, scales_chunk in chunks:
        ranks, absmax = _nearest(chunk, BLOCK_SIZE, bounds)
        codes = ranks.to(torch.uint8) if format.type == "nf4" else codes_by_value[ranks]
        torch.add(codes[::2] * 16, codes[1::2], out=packed_chunk)
        scales_chunk.copy_(absmax)
    packed = packed.view(out_features, in_features // 2)
    if not format.double_quant:
        return packed, scales.view(torch.uint8)
    mean = _mean(scales)
    ranks, second = _nearest(scales - mean, SCALES_PER_GROUP, _midpoints(dynamic_map(scales.device)))
    return packed, torch.cat([second.view(torch.uint8), mean.view(torch.uint8), ranks.to(torch.uint8)])


def _nearest(values: torch.Tensor, block_size: int, bounds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank of the value nearest to each element over its block's largest magnitude; of two as near, the lower.

    Args:
        values: ``[n]`` floating; the last block may be short.
        bounds: midpoints of the ascending values, float32.

    Returns:
        Ranks ``[n]`` int32, and the largest magnitudes ``[ceil(n / block_size)]`` float32.
    """
    missing = -len(values) % block_size
    blocks = (F.pad(values, (0, missing)) if missing else values).view(-1, block_size).float()
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    ranks = torch.bucketize(blocks * (1 / absmax.clamp(min=SMALLEST_ABSMAX)), bounds, out_int32=True)
    return ranks.view(-1)[: len(values)], absmax.view(-1)


def _mean(values: torch.Tensor) -> torch.Tensor:
    """Mean ``[1]`` of a float32 vector, added up in float64 in an order that no device chooses for itself."""
    total = values.double()
    while len(total) > 1:
        half = -(-len(total) // 2)
        total = total[:half] + F.pad(total[half:], (0, len(total) % 2))
    return (total / len(values)).float()


@torch.no_grad()
def dequantize_weight(packed: torch.Tensor, scales: torch.Tensor, format: Format, dtype: torch.dtype) -> torch.Tensor:
    """The matrix ``[out, in]`` in `dtype` of what `quantize_weight` stored, given as bytes or bit views of them."""
    packed, scales = packed.view(torch.uint8), scales.view(torch.uint8)
    shape = [packed.shape[0], packed.shape[1] * 2]
    block_scales = _block_scales(scales, packed.numel() * 2, format)
    # Blocks run on from row to row, but bitsandbytes 0.50's CPU kernel starts a new one at each: give it a single row.
    rows = shape if shape[1] % BLOCK_SIZE == 0 else [packed.numel() * 2]
    weight = torch.ops.bitsandbytes.dequantize_4bit(packed, block_scales, BLOCK_SIZE, format.type, rows, dtype)
    return weight.view(shape)


def _block_scales(scales: torch.Tensor, num_weights: int, format: Format) -> torch.Tensor:
    if scales.storage_offset() % 4:  # gathered into a flat buffer by a sharding engine
        scales = scales.clone()
    if not format.double_quant:
        return scales.view(torch.float32)
    num_blocks = -(-num_weights // BLOCK_SIZE)
    floats = scales[:-num_blocks].view(torch.float32)
    first = torch.ops.bitsandbytes.dequantize_blockwise(
        scales[-num_blocks:], floats[:-1], dynamic_map(scales.device), SCALES_PER_GROUP, torch.float32
    )
    return first.add_(floats[-1])


class MatMul4bit(torch.autograd.Function):
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
        return F.linear(x, dequantize_weight(packed, scales, format, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_output,) = grad_outputs
        packed, scales = ctx.saved_tensors
        weight = dequantize_weight(packed, scales, ctx.format, grad_output.dtype)
        return grad_output @ weight, None, None, None, None


class NF4Linear(nn.Module):
    """A frozen linear layer with a 4-bit weight in two uint8 parameters; has no `.weight` on purpose.

    PEFT reads and writes `.weight` where it finds one (PiSSA, merging), which would be silently wrong here.

    Args:
        format: storage of the weight.
        compute_dtype: dtype the weight is dequantised to, and of the matmul.
        device: where the (empty) parameters are made.

    Attributes:
        packed, scales: see `quantize_weight`; an engine may put bit views in another dtype in their place.
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
        if in_features % 2:
            raise UserError("quantization", f"a linear layer of {in_features} inputs", "an even number of inputs")
        self.in_features, self.out_features = in_features, out_features
        self.format, self.compute_dtype = format, compute_dtype
        num_scale_bytes = format.num_scale_bytes(in_features * out_features)
        self.packed = _bytes_parameter(torch.empty(out_features, in_features // 2, dtype=torch.uint8, device=device))
        self.scales = _bytes_parameter(torch.empty(num_scale_bytes, dtype=torch.uint8, device=device))
        empty_bias = torch.empty(out_features, dtype=compute_dtype, device=device)
        self.bias = nn.Parameter(empty_bias, requires_grad=False) if bias else None

    def set_weight(self, weight: torch.Tensor) -> None:
        """Quantises ``[out, in]`` `weight` where it lies and copies it into this layer's parameters."""
        packed, scales = quantize_weight(weight, self.format)
        self.packed.data.view(torch.uint8).copy_(packed)
        self.scales.data.view(torch.uint8).copy_(scales)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight ``[out, in]`` in `dtype`."""
        return dequantize_weight(self.packed, self.scales, self.format, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in] -> [..., out]``; in the input's dtype, or in `compute_dtype` under autocast."""
        dtype, device_type = self.compute_dtype, x.device.type
        out_dtype = dtype if torch.is_autocast_enabled(device_type) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        # autocast inside an autograd function would cast the forward and not the backward
        with torch.autocast(device_type, enabled=False):
            return MatMul4bit.apply(x.to(dtype), self.packed, self.scales, bias, self.format).to(out_dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> NF4Linear:
        stored = (self.packed, self.scales)

        def keep_bytes(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)  # `.to` and `.half()` leave integers alone; `.type()` does not, nor do they bit views
            is_cast = moved.dtype != tensor.dtype and any(tensor is parameter for parameter in stored)
            return tensor.to(moved.device) if is_cast else moved

        return super()._apply(keep_bytes, recurse)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        error_msgs = args[-1]
        for name in ("packed", "scales"):
            given, own = state_dict.get(prefix + name), self.get_parameter(name).dtype
            if given is not None and given.dtype != own:
                error_msgs.append(f"{prefix}{name} is {given.dtype}; 4-bit bytes are {own} and a cast destroys them")
                return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            + str(self.format)
        )


class NF4LinearForDora(NF4Linear):
    """With the dequantised `.weight` that DoRA's magnitudes are computed from; for reading only."""

    @property
    def weight(self) -> torch.Tensor:
        return nn.Parameter(self.dequantize(self.compute_dtype), requires_grad=False)


def _bytes_parameter(data: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(data, requires_grad=False)


def fingerprint(model: nn.Module, group: dist.ProcessGroup | None = None) -> str:
    """Fingerprint of every 4-bit byte of `model`; the same wherever and however they lie.

    Loss does not notice corrupted scales (it stays equal to four digits), this does.

    Args:
        group: the processes among which the bytes are cut (DTensors), each holding its own; None where they are whole.
    """
    sums = Fingerprint()
    for module in model.modules():
        if isinstance(module, NF4Linear):
            sums.add(_local(module.packed), _local(module.scales))
    if group is not None:
        sums.all_reduce(group)
    return sums.text()


def _local(parameter: torch.Tensor) -> torch.Tensor:
    data = parameter.detach()
    return data.to_local() if isinstance(data, DTensor) else data


class Fingerprint:
    """Sum and sum of squares of bytes, added up tensor by tensor in any order and on any device."""

    def __init__(self) -> None:
        self.total = torch.zeros(2, dtype=torch.int64)
        self.count = 0

    def add(self, *tensors: torch.Tensor) -> None:
        """Takes contiguous tensors in, byte by byte."""
        for data in tensors:
            self.total += _byte_sums(data)
            self.count += data.numel() * data.element_size()

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
    data = data.view(-1).view(torch.uint8)
    counts = torch.zeros(256, dtype=torch.int64)
    for chunk in data.split(BYTES_AT_A_TIME):
        counts += torch.bincount(chunk, minlength=256).cpu()
    values = torch.arange(256)
    return torch.stack([counts @ values, counts @ values.square()])
