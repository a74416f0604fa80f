"""An optimizer's state over this process's rows of each parameter, to and from a checkpoint.

bitsandbytes' optimizers know no DTensor, so every optimizer here steps on ordinary local tensors; what is saved says
where their rows lie. Keys of parameter ``<name>``:

- ``exp_avg``, ``exp_avg_sq`` (torch) or ``state1``, ``state2`` (bitsandbytes): shaped and cut like the parameter;
- ``step``: a scalar, equal everywhere;
- ``absmax1.<k>``, ``absmax2.<k>``: scales of 8-bit moments, one for each 256 consecutive elements of shard k. Blocks
  begin anew with each shard, so another number of shards has other blocks: those moments are requantised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from trainer.errors import PacktrainError
from trainer.optim import (
    CONSTANT_STATE,
    MIN_8BIT_SIZE,
    dequantize_moment,
    init_optimizer_state,
    quantize_moment,
)
from trainer.strategies.base import Checkpoint, StateDict


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
        """A tensor shaped like this process's part of a parameter, as a checkpoint saves it."""
        ...


class Moments:
    """State of `optimizer`, which steps on the local tensors `named`."""

    def __init__(self, optimizer: torch.optim.Optimizer, named: Mapping[str, torch.Tensor], layout: Layout) -> None:
        self.optimizer, self.named, self.layout = optimizer, named, layout

    def allocate(self) -> None:
        """Makes moments that are missing, as they are before the first step."""
        init_optimizer_state(self.optimizer)

    def state_dict(self) -> StateDict:
        """Live tensors by ``optim.<name>.<key>``."""
        self.allocate()  # there are none yet when every step so far was skipped, and a resume asks for them
        return {key: tensor for name in self.named for key, tensor in self._saved(name).items()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Puts back what some number of processes saved.

        Moments of 32 bit are equal bit for bit, and so are those of 8 bit on the same number of shards. On another
        number 8-bit moments are requantised: a value then moves by at most 0.0071 (first moment, signed) or 0.0036
        (second) of the largest magnitude in its new block, half the widest gap of bitsandbytes' dynamic maps.

        Raises:
            PacktrainError: the checkpoint holds another optimizer's moments.
        """
        self.allocate()
        as_they_are: StateDict = {}
        for name in self.named:
            self._check_keys(name, checkpoint)
            if self._lies_alike(name, checkpoint):
                as_they_are |= self._saved(name)
            else:
                self._convert(name, checkpoint)
        counters = {key: tensor for key, tensor in as_they_are.items() if key.endswith(".step")}
        checkpoint.load(as_they_are)
        for key, count in counters.items():
            self._set_step(key.removeprefix("optim.").removesuffix(".step"), count)

    def _state(self, name: str) -> dict[str, Any]:
        return self.optimizer.state[self.named[name]]

    def _saved(self, name: str) -> StateDict:
        saved: StateDict = {}
        for key, value in self._state(name).items():
            if key in CONSTANT_STATE:
                continue
            if key.startswith("absmax"):
                saved[f"optim.{name}.{key}.{self.layout.shard_index}"] = value
            elif key == "step":
                saved[f"optim.{name}.step"] = torch.as_tensor(value)
            else:
                saved[f"optim.{name}.{key}"] = self.layout.wrap(name, value)
        return saved

    def _check_keys(self, name: str, checkpoint: Checkpoint) -> None:
        for key in self._state(name):
            saved = f"optim.{name}.{key}"
            if key not in CONSTANT_STATE and not key.startswith("absmax") and saved not in checkpoint.names:
                raise PacktrainError(
                    f"the checkpoint has no {saved}: its moments are another optimizer's\n"
                    "  fix: resume with the optim.name and strategy it was trained with"
                )

    def _lies_alike(self, name: str, checkpoint: Checkpoint) -> bool:
        saved, own = _num_saved_shards(name, checkpoint), 0
        if "absmax1" in self._state(name):
            rows = self.layout.shape(name)[0]
            own = -(-rows // _rows_each(rows, self.layout.num_shards))
        return saved == own

    def _convert(self, name: str, checkpoint: Checkpoint) -> None:
        """One parameter's moments from or to 8 bit, or from 8 bit in other shards."""
        state, local = self._state(name), self.named[name]
        rows = self.layout.shape(name)[0]
        first = self.layout.shard_index * _rows_each(rows, self.layout.num_shards)
        for key in ("state1", "state2"):
            whole = self._read_whole(name, key, checkpoint)
            own = whole[first : first + local.shape[0]].to(local.device).contiguous()
            if f"absmax{key[-1]}" in state:
                codes, absmax = quantize_moment(own, key)
                state[key].copy_(codes)
                state[f"absmax{key[-1]}"].copy_(absmax)
            else:
                state[key].copy_(own)
        self._set_step(name, checkpoint.read(f"optim.{name}.step"))

    def _read_whole(self, name: str, key: str, checkpoint: Checkpoint) -> torch.Tensor:
        """A saved moment in float32 ``[whole shape]`` on the CPU."""
        whole = checkpoint.read(f"optim.{name}.{key}")
        shards = _num_saved_shards(name, checkpoint)
        if not shards:
            return whole.float()
        parts = whole.split(_rows_each(whole.shape[0], shards))
        scales = [checkpoint.read(f"optim.{name}.absmax{key[-1]}.{shard}") for shard in range(shards)]
        return torch.cat([dequantize_moment(part, scale, key) for part, scale in zip(parts, scales, strict=True)])

    def _set_step(self, name: str, count: torch.Tensor) -> None:
        state = self._state(name)
        if isinstance(state["step"], torch.Tensor):
            state["step"].copy_(count)
        else:
            state["step"] = int(count.item())


def min_8bit_size(shapes: Mapping[str, torch.Size], num_shards: int) -> int:
    """Elements from which a local tensor gets 8-bit moments: no parameter may be 8 bit here and 32 bit there.

    The shards of a parameter differ in size where its rows do not divide evenly, and bitsandbytes looks at each by
    itself; so the threshold is raised past every parameter it would split.
    """
    sizes = []
    for shape in shapes.values():
        each = _rows_each(shape[0], num_shards)
        last = shape[0] % each or each
        sizes.append((last * (shape.numel() // shape[0]), each * (shape.numel() // shape[0])))
    threshold = MIN_8BIT_SIZE
    for smallest, largest in sorted(sizes):
        if smallest < threshold <= largest:
            threshold = largest + 1
    return threshold


def _rows_each(rows: int, num_shards: int) -> int:
    return -(-rows // num_shards)


def _num_saved_shards(name: str, checkpoint: Checkpoint) -> int:
    """How many shards with rows a parameter's 8-bit moments were saved in; 0 for moments of 32 bit."""
    count = 0
    while f"optim.{name}.absmax1.{count}" in checkpoint.names:
        count += 1
    return count
