"""What waits for backward, in host memory: for sequences whose activations no GPU holds.

Each storage that a decoder layer keeps is copied to pinned pages beside the computation, and brought back while the
layer above it is in its backward. ``torch.autograd.graph.save_on_cpu`` would copy weights too, make a copy for every
view of a storage, wait for each, and have each size rounded up to a power of two.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from trainer.errors import UserError
from trainer.streams import Mark, SideStream

PAGE_BYTES = 4 * 2**20  # of host memory; tensors of less than a quarter stay where they are
PAGES_A_BLOCK = 64  # pinned at a time, which is slow; a power of two, as torch would round up to one


class ActivationOffload:
    """Of the layers of one model, on one device. On the CPU the same copies are made, one after the other.

    At most two layers' activations are on the GPU at a time: of the layer that computes, and of its neighbour, on their
    way. Nothing is handed to the allocator before the stream that computes has waited for its copies.

    Args:
        layers: the decoder layers, from the bottom.
        device: where they compute.
    """

    def __init__(self, layers: list[nn.Module], device: torch.device, page_bytes: int = PAGE_BYTES) -> None:
        self._first, self._last = layers[0], layers[-1]
        self._owners = {layer: [part for part in layer.modules() if part._parameters] for layer in layers}
        self._device, self._pages = device, Pages(page_bytes, device.type == "cuda")
        self._stream = SideStream(device)
        self._below: _Kept | None = None  # of the layer that has computed last
        self._coming: _Kept | None = None  # held here, as a backward that fails lets go of it

    @contextlib.contextmanager
    def around(self, layer: nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Around a layer's call in training.

        Args:
            inputs: its arguments that all layers share; they stay.
        """
        if layer is self._first:
            self._begin()
        # The topmost layer's are needed at once. A layer that is computed again keeps its input and no parameter.
        kept = _Kept(self._below, stays=layer is self._last)
        again = layer.training and getattr(layer, "gradient_checkpointing", False)
        adapters = inputs.get("adapters")
        tables = list(inputs.get("position_embeddings", ()))
        tables += [one.a for one in adapters.cast if one.a is not None] if adapters else []
        shared = {_pointer(table) for table in tables}
        pack = partial(self._pack, kept, [] if again else self._owners[layer], shared)
        with torch.autograd.graph.saved_tensors_hooks(pack, self._unpack):
            yield
        kept.gone = self._stream.mark()
        if self._below is not None:
            self._let_go(self._below)
        self._below = None if layer is self._last else kept

    @property
    def host_bytes(self) -> int:
        """Host memory that is pinned so far."""
        return self._pages.num_pages * self._pages.page_bytes

    def _begin(self) -> None:
        """The forward before may have failed, and its backward may have been left out."""
        self._stream.wait_for_all()
        self._below = self._coming = None

    def _pack(self, kept: _Kept, owners: list[nn.Module], shared: set[int], tensor: torch.Tensor) -> Any:
        if (parameter := _parameter_of(tensor, owners)) is not None:
            return parameter
        storage = tensor.untyped_storage()
        pointer, is_small = storage.data_ptr(), storage.nbytes() < self._pages.page_bytes // 4
        if is_small or tensor.device.type != self._device.type or pointer in shared:
            return tensor.detach()  # autograd's own tensor would hold its node, and the node this
        if kept.stays:
            return _Left(kept, tensor.detach())
        if pointer not in kept.stored:
            known = self._below.stored.get(pointer) if self._below else None
            kept.stored[pointer] = known or self._send(storage)
        return _View(kept, kept.stored[pointer], _layout(tensor))

    def _unpack(self, saved: Any) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        self._reach(saved.kept)
        return saved.restore()

    def _send(self, storage: torch.UntypedStorage) -> _Stored:
        whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        stored = _Stored(self._pages, whole)
        with self._stream.beside():
            for page, piece in stored.pieces():
                page.copy_(piece, non_blocking=True)
        return stored

    def _let_go(self, kept: _Kept) -> None:
        self._stream.wait(kept.gone)
        for stored in kept.stored.values():
            stored.whole = None

    def _reach(self, kept: _Kept) -> None:
        """Backward has come to a layer: what it needs is there from here on, and that of the next is on its way."""
        if kept.reached:
            return
        kept.reached = True
        self._fetch(kept)
        self._stream.wait(kept.back)
        kept.stored.clear()  # each is freed with the last node that needs it
        self._coming, kept.below = kept.below, None
        if self._coming is not None:
            self._fetch(self._coming)

    def _fetch(self, kept: _Kept) -> None:
        missing = [stored for stored in kept.stored.values() if stored.whole is None]
        for stored in missing:
            stored.whole = torch.empty(stored.nbytes, dtype=torch.uint8, device=self._device)
        with self._stream.beside():
            for stored in missing:
                for page, piece in stored.pieces():
                    piece.copy_(page, non_blocking=True)
        if missing:
            kept.back = self._stream.mark()


class Pages:
    """Host memory in pages of one size, used again from step to step whatever the length of its packs."""

    def __init__(self, page_bytes: int, pinned: bool) -> None:
        self.page_bytes, self.num_pages = page_bytes, 0
        self._pinned, self._free = pinned, list[torch.Tensor]()

    def take(self, nbytes: int) -> list[torch.Tensor]:
        """Pages for so many bytes, the last one perhaps not full.

        Raises:
            UserError: the host has no more.
        """
        number = -(-nbytes // self.page_bytes)
        while len(self._free) < number:
            self._free += self._pin()
        taken = self._free[-number:]
        del self._free[-number:]
        return taken

    def give_back(self, pages: list[torch.Tensor]) -> None:
        """For others to take; copies under way go first, as all are on one stream."""
        self._free += pages

    def _pin(self) -> list[torch.Tensor]:
        try:
            block = torch.empty(PAGES_A_BLOCK, self.page_bytes, dtype=torch.uint8, pin_memory=self._pinned)
        except RuntimeError as error:
            pinned = self.num_pages * self.page_bytes / 2**30
            raise UserError(
                "train.offload_activations",
                f"the host gives no more memory than {pinned:.1f} GiB to this process: {error}",
                fix="set train.recompute: full, lower train.micro_batch or data.pack_length, or take more hosts",
            ) from error
        self.num_pages += PAGES_A_BLOCK
        return list(block)


@dataclass
class _Kept:
    """What one layer's forward has kept.

    Attributes:
        below: of the layer before.
        stays: on the GPU.
        stored: by where it lay; an address says so while it is held there.
        gone, back: when its copies are made.
        reached: by backward.
    """

    below: _Kept | None
    stays: bool
    stored: dict[int, _Stored] = field(default_factory=dict)
    gone: Mark = None
    back: Mark = None
    reached: bool = False


class _Stored:
    """One storage in host memory; `whole` is the same on the device as bytes, while it is there."""

    def __init__(self, pages: Pages, whole: torch.Tensor) -> None:
        self.whole: torch.Tensor | None = whole
        self.nbytes = whole.numel()
        self._pages, self._page_bytes = pages.take(whole.numel()), pages.page_bytes
        weakref.finalize(self, pages.give_back, self._pages)

    def pieces(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pages, and what of `whole` they hold."""
        assert self.whole is not None
        for page, piece in zip(self._pages, self.whole.split(self._page_bytes), strict=True):
            yield page[: len(piece)], piece


class _View(NamedTuple):
    """A tensor that was kept, in a storage that others may share."""

    kept: _Kept
    stored: _Stored
    layout: tuple[Any, ...]

    def restore(self) -> torch.Tensor:
        assert self.stored.whole is not None
        dtype, *view = self.layout
        empty = torch.empty(0, dtype=dtype, device=self.stored.whole.device)
        return empty.set_(self.stored.whole.untyped_storage(), *view)


class _Left(NamedTuple):
    """A tensor that stays, but tells that backward has come to its layer."""

    kept: _Kept
    tensor: torch.Tensor

    def restore(self) -> torch.Tensor:
        return self.tensor


def _pointer(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _parameter_of(tensor: torch.Tensor, owners: list[nn.Module]) -> torch.Tensor | None:
    """The parameter that autograd keeps as `tensor`, which shares its storage; a view of one is kept as it is.

    Autograd hands over a tensor that only shares the parameter's storage. The parameter itself has to be kept: an
    engine that gathers weights may give it another one for backward.
    """
    pointer = _pointer(tensor)
    found = (parameter for owner in owners for parameter in owner._parameters.values())
    own = [parameter for parameter in found if parameter is not None and _pointer(parameter) == pointer]
    for parameter in own:
        if _layout(parameter) == _layout(tensor):
            return parameter
    return tensor.detach() if own else None


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride()
