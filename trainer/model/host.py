"""What one process of a host has, given to the host's others; a failure likewise, so that nobody waits in vain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trainer.errors import PacktrainError, UserError
from trainer.processes import Processes

T = TypeVar("T")
CPU = torch.device("cpu")


class Host:
    """The processes of this host, among which local rank `source` makes what all need.

    All of them call the same methods in the same order. Where `make` fails, all of them raise: `source` the error
    itself, the others the same `UserError`, or a `PacktrainError` that names it.
    """

    def __init__(self, processes: Processes) -> None:
        self._local_rank, self._size = processes.local_rank, processes.local_world_size
        self._group, self._first = processes.host, processes.rank - processes.local_rank

    def share(self, source: int, make: Callable[[], T]) -> T:
        """What `make` returns on local rank `source` (anything that pickles), on all."""
        if self._size == 1:
            return make()
        box = [self._make(source, make)]
        self._broadcast_objects(box, source)
        return box[0]  # type: ignore[return-value]

    def share_tensors(
        self,
        source: int,
        make: Callable[[], list[torch.Tensor]],
        layout: Sequence[tuple[torch.Size, torch.dtype]],
        device: torch.device,
    ) -> list[torch.Tensor]:
        """The tensors that `make` returns on local rank `source`, on all.

        Args:
            layout: their shapes and dtypes, which all know.
            device: where they lie.
        """
        if self._size == 1:
            return make()
        tensors = self._make(source, make)
        if tensors is None:
            tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in layout]
        for tensor in tensors:
            dist.broadcast(tensor, self._first + source, group=self._group)
        return tensors

    def _make(self, source: int, make: Callable[[], T]) -> T | None:
        """`make()` on `source` and None on the others, once all know that it has not failed."""
        made, error = None, None
        if source == self._local_rank:
            try:
                made = make()
            except Exception as failure:
                error = failure
        failed = torch.tensor(int(error is not None))
        dist.broadcast(failed, self._first + source, group=self._group)
        if failed:
            box = [_describe(error)]
            self._broadcast_objects(box, source)
            raise error or _rebuild(box[0], self._first + source)
        return made

    def _broadcast_objects(self, box: list[Any], source: int) -> None:
        dist.broadcast_object_list(box, self._first + source, group=self._group, device=CPU)


def _describe(error: Exception | None) -> dict[str, str] | str:
    if isinstance(error, UserError):
        return {"where": error.where, "found": error.found, "allowed": error.allowed, "fix": error.fix}
    return str(error) if isinstance(error, PacktrainError) else f"{type(error).__name__}: {error}"


def _rebuild(description: dict[str, str] | str, rank: int) -> PacktrainError:
    if isinstance(description, dict):
        return UserError(**description)
    return PacktrainError(f"rank {rank}: {description}")
