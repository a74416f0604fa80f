"""GPUs: how much they hold, how fast they compute, read and talk. No torch."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from trainer.errors import UserError
from trainer.launchers import visible_gpus

GIB = 2**30
Capability = tuple[int, int]
AMPERE, ADA, HOPPER = (8, 0), (8, 9), (9, 0)

# Dense bf16 FLOP/s with float32 accumulation, from NVIDIA's data sheets (half of the figures "with sparsity").
# The first entry whose words are all in the device's name counts, so variants stand before their family.
PEAK_BF16_FLOPS: list[tuple[str, float]] = [
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("H200 NVL", 835e12),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("H800 PCIe", 756e12),
    ("H800", 989e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("A40", 149.7e12),
    ("A10", 125e12),
    ("RTX 6000 Ada", 364.2e12),
    ("RTX A6000", 154.8e12),
    ("RTX 5090", 209.5e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71.2e12),
]


def peak_bf16_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its name, such as ``NVIDIA H100 80GB HBM3``; None when it is not known."""
    words = set(device_name.replace("-", " ").split())
    return next((flops for key, flops in PEAK_BF16_FLOPS if words.issuperset(key.split())), None)


@dataclass(frozen=True)
class Gpu:
    """One GPU, by its maker's peak figures; what of them is reached is in `calibration`.

    Attributes:
        size: what it is sold as, in GB.
        memory: bytes that a program sees.
        flops: dense 16-bit matmuls with float32 sums, FLOP/s.
        bandwidth: of its memory, bytes/s.
        fabric: to the other GPUs of its host, bytes/s each way.
        capability: CUDA's: from Ada on tensor cores multiply in float8, twice as fast as in 16 bit; flash-attn-4 is for
            Hopper and later.
        max_tokens: beyond so many a micro-batch gets no faster.
    """

    name: str
    size: int
    memory: float
    flops: float
    bandwidth: float
    fabric: float
    capability: Capability = HOPPER
    max_tokens: int = 16384

    def __str__(self) -> str:
        return f"{self.name} ({self.memory / GIB:.1f} GiB)"


def _known(name: str, size: int, seen: float, bandwidth: float, fabric: float, capability: Capability = HOPPER) -> Gpu:
    flops = peak_bf16_flops(name)
    assert flops, name
    return Gpu(name, size, seen * GIB, flops, bandwidth, fabric, capability)


# By NVIDIA's data sheets of H200, H100 SXM, A100 SXM and L40S, and its white papers on Ada and GA102. NVLink counts one
# way; where there is none PCIe 4.0 x16 has 32 GB/s, of which 24 arrive. GiB are what torch sees on such cards.
GPUS = (
    _known("RTX 3090", 24, 23.6, 936e9, 24e9, (8, 6)),
    _known("RTX 4090", 24, 23.6, 1008e9, 24e9, ADA),
    _known("A100 40", 40, 39.4, 1555e9, 300e9, AMPERE),
    _known("L40S", 48, 44.4, 864e9, 24e9, ADA),
    _known("A100", 80, 79.2, 2039e9, 300e9, AMPERE),
    _known("H100", 80, 79.1, 3350e9, 450e9),
    _known("H200", 141, 139.8, 4800e9, 450e9),
)
CPU = Gpu("CPU", 0, float("inf"), 1e11, 1e10, 1e9, max_tokens=4096)  # for rehearsals, whose memory nobody plans
DEFAULT = "H100"
NEW_ENOUGH = {24: "RTX 4090", 40: "A100 40", 48: "L40S", 80: "H100", 141: "H200"}  # where a size alone is named


def find_gpu(name: str | None = None, memory: float | None = None) -> Gpu:
    """A GPU by name, such as ``H100`` or ``NVIDIA H100 80GB HBM3``, or by size in GB or GiB; by both, or the default.

    One of another size computes like the next smaller one that is known.

    Raises:
        UserError: no such name.
    """
    if memory is not None and not math.isfinite(memory * GIB):
        raise UserError("--gpu-memory", f"{memory}", "GiB of a GPU, such as 80")
    if name is None:
        if memory is None:
            return _by_name(DEFAULT)
        known = NEW_ENOUGH.get(round(memory))
        return _by_name(known) if known and memory == round(memory) else _of_size(memory)
    words = {word.removesuffix("GB") for word in name.replace("-", " ").replace("_", " ").upper().split()}
    if memory is not None:
        words.add(f"{memory:g}")  # tells an A100 of 40 GB from its family
    found = [
        gpu for gpu in GPUS if words.issuperset(gpu.name.upper().split()) or "".join(words) == gpu.name.replace(" ", "")
    ]
    if not found:
        raise UserError("--gpu", name, ", ".join(gpu.name for gpu in GPUS), "name the nearest, and its --gpu-memory")
    gpu = max(found, key=lambda gpu: len(gpu.name))
    gpu = replace(gpu, flops=peak_bf16_flops(name) or gpu.flops)  # of a variant such as PCIe
    return gpu if memory in (None, gpu.size) else replace(gpu, memory=memory * GIB)


def gpu_at_hand(name: str, memory: float) -> Gpu:
    """The GPU of that name, of which `memory` bytes are seen; what of it is not known is of one of its size."""
    try:
        return replace(find_gpu(name), memory=memory)
    except UserError:
        like = _of_size(memory / GIB)
        return replace(like, name=name, memory=memory, flops=peak_bf16_flops(name) or like.flops)


def read_gpu(environ: Mapping[str, str]) -> tuple[Gpu, int] | None:
    """The first GPU of this host, and how many of them are visible; None where there is none. Asks NVML."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    installed, device = ctypes.c_uint(0), ctypes.c_void_p()
    if nvml.nvmlInit_v2() != 0:
        return None
    try:
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(installed))
        number = visible_gpus(installed.value, environ.get("CUDA_VISIBLE_DEVICES"))
        if not number or nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)) != 0:
            return None
        name, memory = ctypes.create_string_buffer(96), (ctypes.c_ulonglong * 3)()  # total, free, used
        nvml.nvmlDeviceGetName(device, name, len(name))
        nvml.nvmlDeviceGetMemoryInfo(device, memory)
        return gpu_at_hand(name.value.decode(), float(memory[0])), number
    finally:
        nvml.nvmlShutdown()


def _by_name(name: str) -> Gpu:
    return next(gpu for gpu in GPUS if gpu.name == name)


def _of_size(memory: float) -> Gpu:
    """A GPU of `memory` GiB that is in no table: as fast as the largest known one that is no larger."""
    smaller = [gpu for gpu in GPUS if gpu.memory <= memory * GIB] or [GPUS[0]]
    like = max(smaller, key=lambda gpu: (gpu.memory, gpu.flops))
    return replace(
        like, name=f"GPU of {memory:.0f} GiB, as fast as {like.name}", size=round(memory), memory=memory * GIB
    )
