"""What `packtrain doctor` looks at on this host: GPUs, the libraries that drive them, memory and disks.

torch and the like are imported in processes of their own: a broken one may crash, or hang.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.checks import Check, Status, output_of, package_version

GIB = 2**30
LEAST_SHM, LEAST_DISK, NO_DISK = 1 * GIB, 20 * GIB, 1 * GIB
SECONDS_TO_IMPORT = 120.0  # torch from a cold network file system

SHOWN_NAMES = {"torch": "torch and CUDA", "bitsandbytes": "bitsandbytes kernels", "deepspeed": "deepspeed import"}
PROBES = {
    "torch": """
import torch
found = {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": []}
try:
    found["available"] = torch.cuda.is_available()
    found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if found["available"]:
        torch.ones(1, device="cuda").sum().item()
        found["bf16"] = torch.cuda.is_bf16_supported()
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
except Exception as error:
    found["available"], found["error"] = False, f"{type(error).__name__}: {error}"
""",
    "bitsandbytes": """
import torch, bitsandbytes
from bitsandbytes.cextension import lib
found = {"library": type(lib).__name__, "cuda": bool(getattr(lib, "compiled_with_cuda", False))}
device = "cuda" if torch.cuda.is_available() else "cpu"
weight = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64)
packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
found["error"] = float((bitsandbytes.functional.dequantize_4bit(packed, state) - weight).abs().max())
""",
    "deepspeed": """
import deepspeed
found = {"version": deepspeed.__version__}
""",
}


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver; empty where there is none.

    Attributes:
        cuda: newest CUDA that it runs, such as 12.8.
        gpus: name, MiB and MiB in use of each.
    """

    version: str = ""
    cuda: str = ""
    gpus: tuple[tuple[str, int, int], ...] = ()
    error: str = ""


def read_driver() -> Driver:
    """Asks nvidia-smi, which needs no CUDA of ours."""
    if shutil.which("nvidia-smi") is None:
        return Driver()
    columns = "driver_version,memory.total,memory.used,name"
    table = output_of(["nvidia-smi", f"--query-gpu={columns}", "--format=csv,noheader,nounits"], with_error=True)
    if table is None or "," not in table:
        return Driver(error=" ".join((table or "nvidia-smi does not answer").split())[:200])
    rows = [[cell.strip() for cell in line.split(",", 3)] for line in table.splitlines() if line.count(",") >= 3]
    heading = output_of(["nvidia-smi"]) or ""
    cuda = heading.partition("CUDA Version:")[2].split()[:1]
    gpus = tuple((row[3], _number(row[1]), _number(row[2])) for row in rows)
    return Driver(rows[0][0], cuda[0] if cuda else "", gpus)


def start_probes() -> dict[str, subprocess.Popen[str]]:
    """Imports the heavy libraries in processes of their own, meanwhile."""
    started = {}
    for name, code in PROBES.items():
        if package_version(name) is None:
            continue
        script = f"{code}\nimport json\nprint('FOUND' + json.dumps(found))"
        started[name] = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    return started


def check_libraries(probes: Mapping[str, subprocess.Popen[str]], driver: Driver) -> list[Check]:
    """What the heavy libraries said; one that crashed or hangs says so."""
    judges: dict[str, Callable[[dict[str, Any]], Check]] = {
        "torch": lambda found: _judge_torch(found, driver),
        "bitsandbytes": _judge_bitsandbytes,
        "deepspeed": lambda found: Check(SHOWN_NAMES["deepspeed"], "ok", f"version {found['version']}"),
    }
    checks = []
    for name, process in probes.items():
        name_shown = SHOWN_NAMES[name]
        found, error = _result(process)
        if found is None:
            fix = f"{sys.executable} -c 'import {name}' tells more; pip install --force-reinstall {name}"
            status: Status = "warning" if name == "deepspeed" else "failed"
            checks.append(Check(name_shown, status, f"cannot be imported: {error}", fix))
        else:
            checks.append(judges[name](found))
    return checks


def check_gpus(driver: Driver) -> list[Check]:
    """GPUs and their memory, by the driver."""
    if driver.error:
        fix = "have the administrator look at the driver; a reboot mends one that was updated under a running kernel"
        return [Check("GPUs", "failed", driver.error, fix)]
    if not driver.gpus:
        return [Check("GPUs", "not here", "no nvidia-smi: no NVIDIA GPU, or a login node without one")]
    kinds: dict[str, int] = {}
    for name, memory, _ in driver.gpus:
        kind = f"{name} ({memory / 1024:.0f} GiB)"
        kinds[kind] = kinds.get(kind, 0) + 1
    found = ", ".join(f"{number} x {kind}" for kind, number in kinds.items())
    used = [index for index, (_, _, in_use) in enumerate(driver.gpus) if in_use > 1024]
    busy = f"; in use: GPU {', '.join(map(str, used))}" if used else ""
    return [Check("GPUs", "ok", f"{found}, driver {driver.version} (CUDA {driver.cuda or '?'}){busy}")]


def check_shm() -> list[Check]:
    """/dev/shm, through which NCCL and data workers pass tensors."""
    if not os.path.isdir("/dev/shm"):
        return [Check("/dev/shm", "warning", "is not there", "mount a tmpfs on it")]
    size = shutil.disk_usage("/dev/shm")
    status: Status = "ok" if size.free >= LEAST_SHM else "warning"
    fix = "containers: docker run --shm-size=16g, or --ipc=host" if status == "warning" else ""
    return [Check("/dev/shm", status, f"{_gib(size.free)} free of {_gib(size.total)}", fix)]


def check_disks() -> list[Check]:
    """Room where runs, homes and caches lie."""
    from trainer.caches import cache_root

    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface", "hub")
    places = {"current folder": Path.cwd(), "home": Path.home(), "data cache": cache_root(), "model cache": Path(hub)}
    checks = []
    for name, path in places.items():
        folder = path.expanduser().absolute()
        existing = next(parent for parent in [folder, *folder.parents] if parent.exists())
        free = shutil.disk_usage(existing).free
        if not os.access(existing, os.W_OK):
            fix = {"data cache": "set PACKTRAIN_CACHE", "model cache": "set HF_HOME"}.get(name, "work elsewhere")
            status: Status = "warning" if name in ("current folder", "home") else "failed"
            checks.append(Check(name, status, f"{existing} cannot be written", fix))
            continue
        status = "failed" if free < NO_DISK else "warning" if free < LEAST_DISK else "ok"
        fix = (
            "a 7B model takes 13 GiB, a checkpoint of a full fine-tune of it 80 GiB: make room"
            if status != "ok"
            else ""
        )
        checks.append(Check(name, status, f"{_gib(free)} free in {folder}", fix))
    return checks


def check_hub() -> list[Check]:
    """How models and data sets are found."""
    offline = [
        name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name, "0") not in ("", "0")
    ]
    found = (
        f"offline by {', '.join(offline)}"
        if offline
        else "not set to offline; jobs on nodes run offline from the model cache"
    )
    home = os.environ.get("HF_HOME")
    return [Check("Hugging Face", "ok", f"{found}; HF_HOME {home or 'is not set: ~/.cache/huggingface'}")]


def _judge_torch(found: dict[str, Any], driver: Driver) -> Check:
    name, version, cuda = SHOWN_NAMES["torch"], found["version"], found["cuda"]
    if found.get("available"):
        bf16 = "" if found.get("bf16") else ", no bfloat16: set model.dtype: float16"
        text = f"{len(found['gpus'])} GPU{'s' * (len(found['gpus']) != 1)}, CUDA {cuda}, NCCL {found.get('nccl')}{bf16}"
        return Check(name, "ok" if found.get("bf16") else "warning", text)
    if not driver.gpus:
        return Check(name, "not here", f"torch {version} runs on the CPU: no GPU")
    if cuda is None:
        return Check(name, "failed", f"torch {version} is built without CUDA", "install a torch with CUDA: pytorch.org")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and not found["gpus"]:
        return Check(name, "warning", f"CUDA_VISIBLE_DEVICES={hidden!r} hides the GPUs", "unset it")
    fix = f"update the driver, or install a torch built for CUDA {driver.cuda} or older"
    why = found.get("error") or f"the driver runs CUDA {driver.cuda or '?'} at most"
    return Check(name, "failed", f"torch {version} (CUDA {cuda}) sees no GPU: {why}", fix)


def _judge_bitsandbytes(found: dict[str, Any]) -> Check:
    name = SHOWN_NAMES["bitsandbytes"]
    if "ErrorHandler" in found["library"]:
        fix = "python -m bitsandbytes tells why; it has libraries for CUDA 11.8 and newer alone"
        return Check(name, "failed", "its native library does not load", fix)
    if found["error"] > 0.2:  # NF4's steps are up to 0.15 of the largest value
        return Check(name, "failed", f"4-bit weights come back wrong by {found['error']:.2f}", "reinstall it")
    return Check(name, "ok", f"load for {'CUDA' if found['cuda'] else 'the CPU'}; 4-bit weights come back right")


def _result(process: subprocess.Popen[str]) -> tuple[dict[str, Any] | None, str]:
    """What a probe found; else None and why."""
    try:
        output, error = process.communicate(timeout=SECONDS_TO_IMPORT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return None, f"no answer within {SECONDS_TO_IMPORT:.0f} s"
    marked = [line for line in output.splitlines() if line.startswith("FOUND")]
    if process.returncode == 0 and marked:
        return json.loads(marked[-1].removeprefix("FOUND")), ""
    lines = [line for line in error.strip().splitlines() if line.strip()]
    how = f"killed by signal {-process.returncode}" if process.returncode < 0 else f"status {process.returncode}"
    return None, lines[-1].strip() if lines and process.returncode > 0 else how


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB" if size < 100 * GIB else f"{size / GIB:,.0f} GiB"


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0
