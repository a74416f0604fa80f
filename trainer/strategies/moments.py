"""An optimizer's state over this process's rows of each parameter, to and from a checkpoint.

bitsandbytes' optimizers know no DTensor, so every optimizer here steps on ordinary local tensors; what is saved says
where their rows lie. Keys of parameter ``<name>``:

- ``exp_avg``, ``exp_avg_sq`` (torch) or ``state1``, ``state2`` (bitsandbytes): shaped and cut like the parameter;
- ``step``: a scalar, equal everywhere;
- ``absmax1.<k>``, ``absmax2.<k>``: scales of 8-bit moments, one for each 256 consecutive elements of shard k. Blocks
  begin anew with each shard, so another number of shards has other blocks: those moments are requantised. That of
  each shard with rows is there, so the names tell how many wrote the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch.distributed.tensor import DTensor

from trainer.errors import PacktrainError
from trainer.optim import (
    BLOCK_8BIT,
    CONSTANT_STATE,
    MIN_8BIT_SIZE,
    dequantize_moment,
    init_optimizer_state,
    quantize_moment,
)
from trainer.strategies.base import Checkpoint, StateDict
from trainer.strategies.rows import own_range


class Layout(Protocol):
    """Where the rows of named parameters lie: dimension 0 is cut as `torch.chunk` does, the last parts may be empty.

    Attributes:
        num_shards: processes that share one copy; 1 where every process has all.
        shard_index: which part this process has.
    """

    num_shards: int
    shard_index: int

    def shape(self, name: str) -> torch.Size:
        """Whole shape of a parameter."""
        ...

    def wrap(self, name: str, local: torch.Tensor) -> torch.Tensor:
        """A tensor shaped like this process's part of a parameter, as a checkpoint saves it; in the same memory."""
        ...


class Moments:
    """State of `optimizer`, which steps on the local tensors `named`."""

    def __init__(self, optimizer: torch.optim.Optimizer, named: Mapping[str, torch.Tensor], layout: Layout) -> None:
        self.optimizer, self.named, self.layout = optimizer, named, layout
        self._wrapped: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # a moment, and what a checkpoint saves of it

    def allocate(self) -> None:
        """Makes moments that are missing, as they are before the first step."""
        init_optimizer_state(self.optimizer)

    def state_dict(self) -> StateDict:
        """Live tensors by ``optim.<name>.<key>``."""
        self.allocate()  # there are none yet when every step so far was skipped, and a resume asks for them
        return {key: tensor for name in self.named for key, tensor in self._keyed(name, self._own(name)).items()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Puts back what some number of processes saved; on all processes together.

        Moments of 32 bit are equal bit for bit, and so are those of 8 bit on the same number of shards. On another
        number 8-bit moments are requantised: a value then moves by at most 0.0071 (first moment, signed) or 0.0036
        (second) of the largest magnitude in its new block, half the widest gap of bitsandbytes' dynamic maps. The
        same holds where a part is too small for 8 bit there and not here; the reverse loses nothing.

        The checkpoint cuts the bytes anew into the moments that are here, so that beside them only one moment of one
        parameter's own rows is held in float32.

        Raises:
            PacktrainError: the checkpoint holds another optimizer's moments.
        """
        self.allocate()
        arriving = {name: self._arriving(name, checkpoint) for name in self.named}
        checkpoint.load({key: t for name, moments in arriving.items() for key, t in self._keyed(name, moments).items()})
        for name, moments in arriving.items():
            self._set_step(name, moments["step"])
            if not self._lies_alike(name, checkpoint):
                self._convert(name, moments, _num_saved_shards(name, checkpoint))

    # ------------------------------------------------------------------------------------- between here and a key

    def _state(self, name: str) -> dict[str, Any]:
        return self.optimizer.state[self.named[name]]

    def _own(self, name: str) -> StateDict:
        """A parameter's moments here, live, by the last part of their key."""
        own: StateDict = {}
        for key, value in self._state(name).items():
            if key == "step":
                own[key] = torch.as_tensor(value)
            elif key not in CONSTANT_STATE:
                own[f"{key}.{self.layout.shard_index}" if key.startswith("absmax") else key] = value
        return own

    def _keyed(self, name: str, moments: StateDict) -> StateDict:
        """`moments` by their whole key, those shaped like the parameter laid out like it."""
        return {
            f"optim.{name}.{key}": tensor if key == "step" or key.startswith("absmax") else self._wrap(name, tensor)
            for key, tensor in moments.items()
        }

    def _wrap(self, name: str, local: torch.Tensor) -> torch.Tensor:
        wrapped = self.layout.wrap(name, local)
        # DTensor copies what is on another device than its mesh, and bitsandbytes' paged moments of a GPU call
        # themselves tensors of the CPU: a checkpoint would be read into the copy, and lost.
        here = wrapped.to_local() if isinstance(wrapped, DTensor) else wrapped
        assert here.data_ptr() == local.data_ptr(), f"{name}: {local.device} moments were copied to {here.device}"
        return wrapped

    def _set_step(self, name: str, count: torch.Tensor) -> None:
        state = self._state(name)
        if isinstance(state["step"], torch.Tensor):
            state["step"].copy_(count)
        else:
            state["step"] = int(count.item())

    # --------------------------------------------------------------------- other shards, or 8 bit there and not here

    def _lies_alike(self, name: str, checkpoint: Checkpoint) -> bool:
        """Whether the bytes there are the bytes here: the same dtype, and for 8 bit the same blocks."""
        # As many shards with rows means as many rows in each, whatever the number of processes.
        here = _num_filled(self.layout.shape(name), self.layout.num_shards) if "absmax1" in self._state(name) else 0
        return _num_saved_shards(name, checkpoint) == here

    def _arriving(self, name: str, checkpoint: Checkpoint) -> StateDict:
        """Tensors to load a parameter's moments into, in the dtype they were saved in; the live ones where they fit."""
        own = self._own(name)
        for key in own:
            if not key.startswith("absmax") and f"optim.{name}.{key}" not in checkpoint.names:
                raise PacktrainError(
                    f"the checkpoint has no optim.{name}.{key}: its moments are another optimizer's\n"
                    "  fix: resume with the optim.name and strategy it was trained with"
                )
        if self._lies_alike(name, checkpoint):
            return own
        shape, saved_shards = self.layout.shape(name), _num_saved_shards(name, checkpoint)
        dtype = torch.uint8 if saved_shards else torch.float32
        arriving = {"step": own["step"]}
        for key in ("state1", "state2"):
            arriving[key] = own[key] if own[key].dtype == dtype else torch.empty_like(own[key], dtype=dtype)
            for shard, _ in self._overlaps(name, saved_shards):
                elements = len(_rows(shape, saved_shards, shard)) * _row_size(shape)
                arriving[f"absmax{key[-1]}.{shard}"] = torch.empty(-(-elements // BLOCK_8BIT))
        return arriving

    def _convert(self, name: str, arrived: StateDict, saved_shards: int) -> None:
        """Makes of a parameter's moments, cut like here but in the blocks of `saved_shards`, what is held here."""
        state = self._state(name)
        for key in ("state1", "state2"):
            values = self._dequantize(name, key, arrived, saved_shards) if saved_shards else arrived[key]
            if state[key].dtype == torch.uint8:
                codes, absmax = quantize_moment(values, key)
                state[key].copy_(codes)
                state[f"absmax{key[-1]}"].copy_(absmax)
            else:
                state[key].copy_(values)

    def _dequantize(self, name: str, key: str, arrived: StateDict, saved_shards: int) -> torch.Tensor:
        """This process's rows of a moment, float32, on the device that steps."""
        shape, device = self.layout.shape(name), self.named[name].device
        codes, parts = arrived[key].to(device), []
        for shard, rows in self._overlaps(name, saved_shards):
            absmax = arrived[f"absmax{key[-1]}.{shard}"].to(device)
            start = (rows.start - _rows(shape, saved_shards, shard).start) * _row_size(shape)
            parts.append(dequantize_moment(codes[: len(rows)], absmax, key, start))
            codes = codes[len(rows) :]
        return torch.cat(parts)

    def _overlaps(self, name: str, saved_shards: int) -> Iterator[tuple[int, range]]:
        """Saved shards that hold rows of this process, and which rows; in their order."""
        shape = self.layout.shape(name)
        own = _rows(shape, self.layout.num_shards, self.layout.shard_index)
        for shard in range(saved_shards):
            saved = _rows(shape, saved_shards, shard)
            rows = range(max(own.start, saved.start), min(own.stop, saved.stop))
            if rows:
                yield shard, rows


def min_8bit_size(shapes: Mapping[str, torch.Size], num_shards: int) -> int:
    """Elements from which a local tensor gets 8-bit moments: no parameter may be 8 bit here and 32 bit there.

    The shards of a parameter differ in size where its rows do not divide evenly, and bitsandbytes looks at each by
    itself; so the threshold is raised past every parameter it would split.
    """
    sizes = []
    for shape in shapes.values():
        last = _num_filled(shape, num_shards) - 1
        sizes.append(
            (len(_rows(shape, num_shards, last)) * _row_size(shape), _rows_each(shape, num_shards) * _row_size(shape))
        )
    threshold = MIN_8BIT_SIZE
    for smallest, largest in sorted(sizes):
        if smallest < threshold <= largest:
            threshold = largest + 1
    return threshold


def _rows_each(shape: torch.Size, num_shards: int) -> int:
    return -(-shape[0] // num_shards)


def _rows(shape: torch.Size, num_shards: int, shard: int) -> range:
    own = own_range(shape[0], _rows_each(shape, num_shards), shard)
    return range(own.start, own.stop)


def _num_filled(shape: torch.Size, num_shards: int) -> int:
    """Shards that have rows of a parameter."""
    return -(-shape[0] // _rows_each(shape, num_shards))


def _row_size(shape: torch.Size) -> int:
    return shape[1:].numel()


def _num_saved_shards(name: str, checkpoint: Checkpoint) -> int:
    """How many shards with rows a parameter's 8-bit moments were saved in; 0 for moments of 32 bit."""
    count = 0
    while f"optim.{name}.absmax1.{count}" in checkpoint.names:
        count += 1
    return count
