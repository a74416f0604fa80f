"""Whole tensors cut by rows over all processes, as checkpoints lay them out (FSDP2's layout)."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from trainer.processes import Processes

CPU = torch.device("cpu")


class Rows:
    """Cuts along the first dimension: each process holds as many rows, the last ones fewer or none."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        devices = {"cpu", processes.device.type}
        self._meshes = {kind: init_device_mesh(kind, (processes.world_size,)) for kind in sorted(devices)}

    def own(self, whole: torch.Tensor) -> DTensor:
        """A copy of this process's rows of `whole`, in host memory."""
        return self._wrap(whole.detach()[self._range(whole.shape)].to(CPU, copy=True), whole.shape)

    def zeros(self, shape: torch.Size) -> DTensor:
        """Float32 rows on this process's device, to be filled."""
        own = self._range(shape)
        return self._wrap(torch.zeros(own.stop - own.start, *shape[1:], device=self.processes.device), shape)

    def _range(self, shape: torch.Size) -> slice:
        return own_range(shape[0], -(-shape[0] // self.processes.world_size), self.processes.rank)

    def _wrap(self, rows: torch.Tensor, shape: torch.Size) -> DTensor:
        stride = torch.empty(shape, device="meta").stride()
        mesh = self._meshes[rows.device.type]
        return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def own_range(total: int, each: int, rank: int) -> slice:
    """Which of `total` things cut into parts of `each` are this rank's; the last part may be short, others empty."""
    return slice(min(rank * each, total), min((rank + 1) * each, total))
