"""GPUs: how much they hold, how fast they compute, read and talk. No torch."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, replace

from trainer.errors import UserError
from trainer.launchers import visible_gpus

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One GPU, by its maker's peak figures; what of them is reached is in `calibration`.

    Attributes:
        size: what it is sold as, in GB.
        memory: bytes that a program sees.
        flops: dense 16-bit matmuls with float32 sums, FLOP/s.
        bandwidth: of its memory, bytes/s.
        fabric: to the other GPUs of its host, bytes/s each way.
        max_tokens: beyond so many a micro-batch gets no faster.
    """

    name: str
    size: int
    memory: float
    flops: float
    bandwidth: float
    fabric: float
    max_tokens: int = 16384

    def __str__(self) -> str:
        return f"{self.name} ({self.memory / GIB:.1f} GiB)"


# NVIDIA's data sheets of H200, H100 SXM, A100 SXM (80 and 40 GB) and L40S, and its white papers on Ada (RTX 4090) and
# GA102 (RTX 3090), FP16 with FP32 accumulate. NVLink counts one way; where there is none PCIe 4.0 x16 has 32 GB/s, of
# which 24 arrive. `memory` is what torch sees on such cards.
GPUS = (
    Gpu("RTX 3090", 24, 23.6 * GIB, 71.2e12, 936e9, 24e9),
    Gpu("RTX 4090", 24, 23.6 * GIB, 165.2e12, 1008e9, 24e9),
    Gpu("A100 40", 40, 39.4 * GIB, 312e12, 1555e9, 300e9),
    Gpu("L40S", 48, 44.4 * GIB, 362e12, 864e9, 24e9),
    Gpu("A100", 80, 79.2 * GIB, 312e12, 2039e9, 300e9),
    Gpu("H100", 80, 79.1 * GIB, 989e12, 3350e9, 450e9),
    Gpu("H200", 141, 139.8 * GIB, 989e12, 4800e9, 450e9),
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
    if name is None:
        if memory is None:
            return _by_name(DEFAULT)
        known = NEW_ENOUGH.get(round(memory))
        return _by_name(known) if known and memory == round(memory) else _of_size(memory)
    words = set(name.replace("-", " ").replace("_", " ").upper().split())
    found = [
        gpu for gpu in GPUS if words.issuperset(gpu.name.upper().split()) or "".join(words) == gpu.name.replace(" ", "")
    ]
    if not found:
        raise UserError("--gpu", name, ", ".join(gpu.name for gpu in GPUS), "name the nearest, and its --gpu-memory")
    gpu = max(found, key=lambda gpu: len(gpu.name))
    return gpu if memory is None else replace(gpu, memory=memory * GIB)


def gpu_at_hand(name: str, memory: float) -> Gpu:
    """The GPU of that name, of which `memory` bytes are seen; of an unknown one, the rates of one of its size."""
    try:
        return replace(find_gpu(name), memory=memory)
    except UserError:
        return replace(_of_size(memory / GIB), name=name, memory=memory)


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
