"""Copies of a training state in host memory, made as fast as the bus allows: training waits for nothing else."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

Tensors = dict[str, torch.Tensor]

# Pinned memory is copied to at full speed, and lost to everything else on the host while the run lasts: a whole
# model's moments stay pageable, which a step of a full fine-tune can afford.
MOST_PINNED = 8 * 2**30


class Staging:
    """Host copies of one state after another, in buffers that are made once."""

    def __init__(self) -> None:
        self._buffers: Tensors = {}
        self._meshes: dict[DeviceMesh, DeviceMesh] = {}

    def copy(self, state: Tensors) -> Tensors:
        """`state` with every tensor, or this process's part of a DTensor, in host memory.

        The copies are good until the next call: what they are for must be done by then.
        """
        locals_ = {name: _local(tensor) for name, tensor in state.items()}
        pinned = sum(t.nbytes for t in locals_.values() if t.is_cuda) <= MOST_PINNED
        for name, tensor in locals_.items():
            if not _fits(self._buffers.get(name), tensor):
                pin = pinned and tensor.is_cuda and tensor.nbytes > 0
                self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin)
            self._buffers[name].copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return {name: self._like(tensor, self._buffers[name]) for name, tensor in state.items()}

    def _like(self, tensor: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
        """`copy` as the part of a DTensor that `tensor` is; on the host, so over a mesh of hosts."""
        if not isinstance(tensor, DTensor):
            return copy
        mesh = tensor.device_mesh
        if mesh not in self._meshes:
            names = mesh.mesh_dim_names
            self._meshes[mesh] = (
                mesh if mesh.device_type == "cpu" else DeviceMesh("cpu", mesh.mesh, mesh_dim_names=names)
            )
        shape, stride = tensor.shape, tensor.stride()
        on_host = self._meshes[mesh]
        return DTensor.from_local(copy, on_host, tensor.placements, run_check=False, shape=shape, stride=stride)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _fits(buffer: torch.Tensor | None, tensor: torch.Tensor) -> bool:
    return buffer is not None and buffer.shape == tensor.shape and buffer.dtype == tensor.dtype
