"""Whether an error is the fault of the machine it happened on, so that the run may well succeed on another."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import torch

from trainer.errors import UserError

# What drives, their drivers and clients of network file systems report; a full or a missing disk is not among it.
_BROKEN_DISK = {
    errno.EIO,
    errno.ENXIO,
    errno.EREMOTEIO,
    errno.ESHUTDOWN,  # a server has evicted this client
    errno.ENOTCONN,
    errno.ESTALE,
    errno.EUCLEAN,
}
# Errors of CUDA and NCCL that are the program's or the environment's.
_NOT_THE_GPU = ("out of memory", "no kernel image", "invalid argument", "invalid usage", "invalid configuration")
# How the GPU's libraries fail, which torch raises as plain RuntimeErrors.
_GPU_LIBRARIES = ("cuda error:", "cublas_status_execution_failed", "cublas_status_internal_error", "nccl error")


def is_machines(error: BaseException) -> bool:
    """Whether the machine is at fault: a GPU or NCCL that failed, a drive or file system that broke."""
    chain = list(causes(error))
    if any(isinstance(link, OSError) and link.errno in _BROKEN_DISK for link in chain):
        return True
    if any(isinstance(link, UserError | torch.OutOfMemoryError) for link in chain):
        return False
    return any(map(_is_gpus, chain))


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what caused it, and so on."""
    current: BaseException | None = error
    seen: set[int] = set()
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def _is_gpus(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError):  # torch's own errors derive from it
        return False
    text = str(error).lower()
    fails = isinstance(error, torch.AcceleratorError) or any(words in text for words in _GPU_LIBRARIES)
    return fails and not any(words in text for words in _NOT_THE_GPU)
