"""A line of bytes of which each process holds a piece, and ways to bring it together where it is wanted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist

from trainer.errors import PacktrainError, first_line
from trainer.processes import Processes

logger = logging.getLogger(__name__)
# torch 2.11 knows it by its older name alone, of which 2.13 warns.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
PROBE_BYTES = 256


class Piece(Protocol):
    """This process's piece of a line.

    Attributes:
        own: its bytes, zeros at first; as many on every process.
    """

    own: torch.Tensor

    def fill(self, line: torch.Tensor) -> None:
        """Writes all pieces into `line`, one behind the other by rank, in the current stream."""
        ...


class GatheredPiece:
    """The line is brought together by a collective, of all processes of `group` at once.

    Args:
        home: where the piece rests, `device` or the CPU.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, home: torch.device, nbytes: int) -> None:
        pin = home.type == "cpu" and device.type == "cuda"
        self.own = torch.zeros(nbytes, dtype=torch.uint8, device=home, pin_memory=pin)
        self._group = group

    def fill(self, line: torch.Tensor) -> None:
        piece = self.own
        if piece.device != line.device:
            piece = line.view(self._group.size(), -1)[self._group.rank()].copy_(piece, non_blocking=True)
        all_gather_single(line, piece, group=self._group)


class PulledPiece:
    """Each process copies the others' pieces out of their GPUs' memory when it wants them.

    Copy engines do it, so that no multiprocessor is kept from the matmuls, and nobody waits for anybody. Pieces have to
    be in place on all processes before the first one fills a line, and to stay as they are.

    Args:
        group: processes whose GPUs reach each other's memory.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, nbytes: int) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        with torch.cuda.use_mem_pool(symmetric.get_mem_pool(device)):
            self.own = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.own.zero_()
        self._handle: Any = symmetric.rendezvous(self.own, group)  # holds the others' memory
        # Each begins with its own, so that none has to serve all at once.
        ranks = [*range(group.rank(), group.size()), *range(group.rank())]
        self._pieces = {rank: self._handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in ranks}

    def fill(self, line: torch.Tensor) -> None:
        places = line.view(len(self._pieces), -1)
        for rank, piece in self._pieces.items():
            places[rank].copy_(piece, non_blocking=True)


def choose_piece(
    processes: Processes, group: dist.ProcessGroup, device: torch.device, home: torch.device
) -> Callable[[int], Piece] | None:
    """What makes a piece of so many bytes: pulled where GPUs reach each other's memory, on all processes alike.

    Returns:
        None where every process holds whole lines.
    """
    if group.size() == 1 and home == device:
        return None
    if device.type == "cuda" and home == device:
        obstacle = find_obstacle(processes, group, device)
        if obstacle is None:
            return partial(PulledPiece, group, device)
        logger.info("frozen weights are gathered by NCCL: %s", obstacle)
    return partial(GatheredPiece, group, device, home)


def find_obstacle(processes: Processes, group: dist.ProcessGroup, device: torch.device) -> str | None:
    """Why GPUs cannot read each other's memory; None after all have. All processes ask, and all are told."""
    probe = _Probe(processes, group, device)
    for attempt in (probe.look_at_hosts, probe.make, probe.read):
        obstacle = _failure_of(attempt)
        # Nobody goes on where another cannot, nor lets go of what another still reads.
        if not processes.min(0.0 if obstacle else 1.0):
            return obstacle or "another process cannot reach its neighbours' memory"
    return None


class _Probe:
    """Steps to a neighbour's memory, each of which may fail on any process."""

    def __init__(self, processes: Processes, group: dist.ProcessGroup, device: torch.device) -> None:
        self._gpus_a_host, self._group, self._device = processes.local_world_size, group, device

    def look_at_hosts(self) -> None:
        hosts = {rank // self._gpus_a_host for rank in dist.get_process_group_ranks(self._group)}
        if len(hosts) > 1:
            raise PacktrainError(f"they are cut over {len(hosts)} hosts")

    def make(self) -> None:
        self._piece = PulledPiece(self._group, self._device, PROBE_BYTES)
        self._piece.own.fill_(self._group.rank())
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def read(self) -> None:
        size = self._group.size()
        found = torch.empty(size * PROBE_BYTES, dtype=torch.uint8, device=self._device)
        self._piece.fill(found)
        if not bool((found == torch.arange(size, device=self._device).repeat_interleave(PROBE_BYTES)).all()):
            raise PacktrainError("what was read from the others' memory is not what lies there")


def _failure_of(attempt: Callable[[], None]) -> str | None:
    try:
        attempt()
    except PacktrainError as error:
        return str(error)
    except Exception as error:  # whatever an interface that is still private may raise on another's GPUs
        return first_line(error)
    return None
