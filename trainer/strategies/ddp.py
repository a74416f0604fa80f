"""Data parallel: every process holds the whole model, gradients are added up (torch's DistributedDataParallel)."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from trainer.data.types import PackedBatch
from trainer.strategies.base import BuildOptimizer
from trainer.strategies.single import SingleProcess


class DataParallel(SingleProcess):
    """Weights, moments and frozen base replicated; needs a process group."""

    name = "ddp"
    can_begin_anew = False

    def prepare(self, build_optimizer: BuildOptimizer) -> None:
        super().prepare(build_optimizer)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".broadcast_buffers. is deprecated")  # torch 2.11 has no other
            # Every process placed the same tensors, so there is nothing to broadcast, neither now nor later.
            self._parallel = DistributedDataParallel(
                self.module, broadcast_buffers=False, init_sync=False, gradient_as_bucket_view=True
            )

    def _forward(self, batch: PackedBatch) -> torch.Tensor:
        return self._parallel(batch)

    def _micro_batch(self, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext() if is_last else self._parallel.no_sync()

    def _sum(self, loss_sum: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(loss_sum)
        return loss_sum
