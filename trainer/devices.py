"""Which device a process computes on, and whether it is what it should have."""

from __future__ import annotations

import os
from typing import Literal

import torch

from trainer.errors import PreflightFailed, UserError
from trainer.launchers import count_gpus, granted_gpus, host_name

DeviceKind = Literal["auto", "cpu"]
CPU = torch.device("cpu")


def choose_device(local_rank: int = 0, kind: DeviceKind = "auto") -> torch.device:
    """This process's GPU where there are GPUs, else the CPU.

    Args:
        kind: ``train.device``.

    Raises:
        UserError: GPUs that this torch cannot use, or fewer than processes.
        PreflightFailed: GPUs that SLURM granted are not there.
    """
    if kind == "cpu":
        # Libraries look for GPUs by themselves (bitsandbytes, DeepSpeed), and so does the export.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return CPU
    granted = granted_gpus(os.environ)
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not visible:
        _check_meant(granted)
        return CPU
    if granted is not None and visible < granted:
        raise _lost_gpus(visible, granted)
    # Fixed blocks that stay behind when sizes change cost gigabytes; read by torch at its first allocation.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # srun may show each task its own GPU alone, which is then number 0.
    index = local_rank if visible > 1 else 0
    if index >= visible:
        raise UserError(
            "LOCAL_RANK",
            f"{local_rank}, and this host shows {visible} GPU{'s' * (visible != 1)}",
            f"0 to {visible - 1}",
            "start one process a GPU",
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _check_meant(granted: int | None) -> None:
    """Without a GPU the run is a rehearsal, unless there should be some."""
    there = granted if granted is not None else count_gpus(os.environ)
    if there and torch.version.cuda is not None and granted:
        raise _lost_gpus(0, granted)
    if there:
        raise UserError(
            "torch",
            f"{torch.__version__} cannot use this host's {there} GPU{'s' * (there != 1)}, and a CPU would take weeks",
            "a torch built for CUDA, and a driver that is new enough for it",
            "pip install torch from the CUDA index, or leave the GPUs alone: --train.device cpu",
        )


def _lost_gpus(visible: int, granted: int) -> PreflightFailed:
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    source = f"CUDA_VISIBLE_DEVICES={listed}" if listed is not None else "SLURM_GPUS_ON_NODE"
    return PreflightFailed(
        f"GPUs: CUDA sees {visible} here, SLURM granted {granted} ({source})\n"
        "  allowed: as many as were granted\n"
        "  fix: nvidia-smi on this host shows which is lost; leave the host out (slurm.exclude) until it is mended",
        blamed=host_name(os.environ),
    )
