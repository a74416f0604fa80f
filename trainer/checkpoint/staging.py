"""Copies of a training state in host memory, made as fast as the bus allows: training waits for nothing else."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

Tensors = dict[str, torch.Tensor]

# Pinned memory is copied to several times faster, and lost to everything else on the host while the run lasts: a whole
# model's moments stay pageable, which a step of a full fine-tune can afford.
MOST_PINNED = 8 * 2**30


class Staging:
    """Host copies of one state after another, in buffers that are made once.

    torch's own stagers (``torch.distributed.checkpoint.staging``) pin everything or nothing, copy whole storages, and
    key their buffers by the identity of a storage, which a state made anew for each save does not have.
    """

    def __init__(self) -> None:
        self._copies: Tensors = {}
        self._meshes: dict[DeviceMesh, DeviceMesh] = {}

    @torch.no_grad()
    def copy(self, state: Tensors) -> Tensors:
        """`state` with every tensor, or this process's part of a DTensor, in host memory.

        The copies are good until the next call: what they are for must be done by then.
        """
        if state.keys() != self._copies.keys() or not all(_fits(self._copies[name], state[name]) for name in state):
            self._copies = self._allocate(state)
        for name, tensor in state.items():
            _local(self._copies[name]).copy_(_local(tensor), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self._copies

    def _allocate(self, state: Tensors) -> Tensors:
        self._copies = {}  # what does not fit any more makes room
        pinned = sum(_local(tensor).nbytes for tensor in state.values() if tensor.is_cuda) <= MOST_PINNED
        return {name: self._empty_like(tensor, pinned and tensor.is_cuda) for name, tensor in state.items()}

    def _empty_like(self, tensor: torch.Tensor, pinned: bool) -> torch.Tensor:
        """Room for the same part of a DTensor that `tensor` is; on the host, so over a mesh of hosts."""
        local = _local(tensor)
        room = torch.empty(local.shape, dtype=local.dtype, pin_memory=pinned and local.nbytes > 0)
        if not isinstance(tensor, DTensor):
            return room
        mesh, shape, stride = self._host_mesh(tensor.device_mesh), tensor.shape, tensor.stride()
        return DTensor.from_local(room, mesh, tensor.placements, run_check=False, shape=shape, stride=stride)

    def _host_mesh(self, mesh: DeviceMesh) -> DeviceMesh:
        if mesh.device_type == "cpu":
            return mesh
        if mesh not in self._meshes:
            self._meshes[mesh] = DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)
        return self._meshes[mesh]


def _fits(copy: torch.Tensor, tensor: torch.Tensor) -> bool:
    if isinstance(copy, DTensor) != isinstance(tensor, DTensor) or copy.shape != tensor.shape:
        return False
    if isinstance(copy, DTensor) and isinstance(tensor, DTensor) and copy.placements != tensor.placements:
        return False
    return copy.dtype == tensor.dtype and _local(copy).shape == _local(tensor).shape


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part, not a copy; cheap where no gradients are recorded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
