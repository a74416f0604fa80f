"""Moments go into a checkpoint and come back, on any number of shards; the shards are simulated in one process."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_blockwise
from torch import nn

from trainer.config import OptimConfig
from trainer.errors import PacktrainError
from trainer.optim import build_optimizer
from trainer.strategies.moments import Moments, min_8bit_size

NAMES = ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq")}  # bitsandbytes' otherwise
BOUND = {"state1": 0.0071, "state2": 0.0036}  # of the largest magnitude in the new block
SHAPES = {
    "big": torch.Size([61, 300]),  # 8 bit everywhere; no block begins with a row
    "wide": torch.Size([67, 192]),  # 8 bit on 1 and 2 shards, 32 bit on 3
    "few": torch.Size([4, 4500]),  # the third of 3 shards has no row
    "norm": torch.Size([5]),
}
STILL = slice(0, 9)  # rows of "big" that never had a gradient: whole blocks of zeros

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers")
Tensors = dict[str, torch.Tensor]


class Shard:
    """One process's rows of every weight, its optimizer and its moments."""

    def __init__(self, weights: Tensors, optim: OptimConfig, num_shards: int, shard_index: int) -> None:
        self.shapes = {name: weight.shape for name, weight in weights.items()}
        self.num_shards, self.shard_index = num_shards, shard_index
        rows = {name: weight[self.rows(name)] for name, weight in weights.items()}  # views: steps move the whole
        self.local = {name: nn.Parameter(part) for name, part in rows.items() if part.numel()}
        self.optimizer = build_optimizer(optim, self.local.items(), min_8bit_size(self.shapes, num_shards))
        self.moments = Moments(self.optimizer, self.local, self)

    def shape(self, name: str) -> torch.Size:
        return self.shapes[name]

    def wrap(self, name: str, local: torch.Tensor) -> torch.Tensor:
        return local

    def rows(self, name: str) -> slice:
        each = -(-self.shapes[name][0] // self.num_shards)
        return slice(self.shard_index * each, (self.shard_index + 1) * each)


class Run:
    """A training on `num_shards` processes."""

    def __init__(self, weights: Tensors, name: str, num_shards: int, **optim: Any) -> None:
        self.weights = {key: weight.clone() for key, weight in weights.items()}
        config = OptimConfig(name=name, **{"lr": 1e-2, "weight_decay": 0.1, **optim})
        self.shards = [Shard(self.weights, config, num_shards, k) for k in range(num_shards)]

    def step(self, grads: Tensors) -> None:
        for shard in self.shards:
            for name, local in shard.local.items():
                local.grad = grads[name][shard.rows(name)].clone()
            shard.optimizer.step()

    def save(self) -> Tensors:
        """Whole tensors by their keys, as a checkpoint has them."""
        saved: Tensors = {}
        for shard in self.shards:
            for key, tensor in shard.moments.state_dict().items():
                if key in saved and not is_plain(key):
                    saved[key] = torch.cat([saved[key], tensor])
                elif key in saved:
                    assert torch.equal(saved[key], tensor), f"{key} differs between processes"
                else:
                    saved[key] = tensor.clone()
        return saved

    def restore(self, saved: Tensors) -> None:
        for shard in self.shards:
            shard.moments.restore(Saved(saved, shard))

    def continued(self, name: str, num_shards: int, **optim: Any) -> Run:
        """This run, saved and gone on with on another number of processes."""
        other = Run(self.weights, name, num_shards, **optim)
        other.restore(self.save())
        return other

    def moment(self, name: str, key: str) -> torch.Tensor:
        """A moment in float32, whole; 8-bit ones by bitsandbytes' own function."""
        parts = []
        for shard in (shard for shard in self.shards if name in shard.local):
            state = shard.optimizer.state[shard.local[name]]
            scale, code = state.get(f"absmax{key[-1]}"), state.get(f"qmap{key[-1]}")
            is_codes = state[key].dtype == torch.uint8
            parts.append(
                dequantize_blockwise(state[key], absmax=scale, code=code, blocksize=256) if is_codes else state[key]
            )
        return torch.cat(parts)

    def bound(self, name: str, key: str) -> torch.Tensor:
        """How far each element of a moment may be from what it was before it was requantised into this run."""
        parts = []
        for shard in (shard for shard in self.shards if name in shard.local):
            state = shard.optimizer.state[shard.local[name]]
            scale = state.get(f"absmax{key[-1]}", torch.zeros(1 + state[key].numel() // 256))
            parts.append(scale.repeat_interleave(256)[: state[key].numel()].view(state[key].shape) * BOUND[key])
        return torch.cat(parts)


class Saved:
    """A checkpoint in memory, read by one shard."""

    def __init__(self, tensors: Tensors, shard: Shard) -> None:
        self.tensors, self.shard = tensors, shard

    @property
    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def load(self, state: Tensors) -> None:
        for key, target in state.items():
            value = self.tensors[key]
            if not is_plain(key):
                value = value[self.shard.rows(key.split(".")[1])]
            assert (value.shape, value.dtype) == (target.shape, target.dtype), key
            target.copy_(value)

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name].clone()


def is_plain(key: str) -> bool:
    return key.endswith(".step") or ".absmax" in key


def noise(seed: int, scale: float = 1.0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * scale for name, shape in SHAPES.items()}


def gradients(seed: int) -> Tensors:
    """Of magnitudes that differ a lot, within a block and between blocks."""
    spread = noise(seed + 1000)
    grads = {name: grad * (2 * spread[name]).exp() for name, grad in noise(seed).items()}
    grads["big"][STILL] = 0.0
    return grads


def trained(name: str, num_shards: int, steps: int = 3) -> Run:
    run = Run(noise(7), name, num_shards)
    for seed in range(steps):
        run.step(gradients(seed))
    return run


def assert_equal(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_on_as_many_shards_a_run_goes_on_bit_by_bit(name: str, num_shards: int) -> None:
    run = trained(name, num_shards)
    again = run.continued(name, num_shards)
    assert_equal(again.save(), run.save())
    for seed in range(3, 6):
        run.step(gradients(seed))
        again.step(gradients(seed))
    assert_equal(again.weights, run.weights)
    assert_equal(again.save(), run.save())


@pytest.mark.parametrize("name", ["adamw", "paged_adamw_32bit"])
def test_moments_of_32_bit_are_equal_on_any_number_of_shards(name: str) -> None:
    run = trained(name, 1)
    saved = run.save()
    for num_shards in (3, 2, 5, 1):
        run = run.continued(name, num_shards)
        assert_equal(run.save(), saved)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_moments_of_8_bit_stay_within_the_bound_on_another_number_of_shards(name: str) -> None:
    run = trained(name, 1)
    for num_shards in (3, 2, 4, 1):
        moved = run.continued(name, num_shards)
        for weight in SHAPES:
            for key in BOUND:
                before, after = run.moment(weight, key), moved.moment(weight, key)
                assert before.abs().max() > 0
                assert ((after - before).abs() <= moved.bound(weight, key)).all(), (weight, key, num_shards)
        assert not moved.moment("big", "state1")[: STILL.stop - 1].any()  # blocks of zeros alone
        assert {int(t) for key, t in moved.save().items() if key.endswith(".step")} == {3}
        moved.step(gradients(9))
        assert all(weight.isfinite().all() for weight in moved.weights.values())
        run = run.continued(name, num_shards)


def test_the_shards_and_sizes_tested_are_the_odd_ones() -> None:
    def dtypes(name: str, num_shards: int) -> list[torch.dtype]:
        shards = trained("adamw_8bit", num_shards, steps=1).shards
        return [s.optimizer.state[s.local[name]]["state1"].dtype for s in shards if name in s.local]

    assert dtypes("big", 3) == [torch.uint8] * 3
    assert dtypes("wide", 2) == [torch.uint8] * 2 and dtypes("wide", 3) == [torch.float32] * 3
    assert dtypes("few", 3) == [torch.uint8] * 2
    assert dtypes("norm", 4) == [torch.float32] * 3


def test_a_checkpoint_names_the_shards_that_wrote_it() -> None:
    names = trained("adamw_8bit", 3).save().keys()
    assert {name for name in names if name.startswith("optim.big.absmax1")} == {
        f"optim.big.absmax1.{k}" for k in range(3)
    }
    assert {name for name in names if name.startswith("optim.few.absmax2")} == {
        f"optim.few.absmax2.{k}" for k in range(2)
    }


def test_shards_that_lie_alike_are_not_requantised() -> None:
    """4 rows lie the same on 2 and on 3 shards, the third of which has none."""
    run = trained("adamw_8bit", 2)
    saved, again = run.save(), run.continued("adamw_8bit", 3).save()
    assert_equal(*({k: t for k, t in state.items() if k.startswith("optim.few.")} for state in (saved, again)))


@pytest.mark.parametrize(("first", "second"), [("adamw_8bit", 3), ("adamw_8bit", 2), ("adamw", 2)])
def test_training_continued_on_another_number_of_shards_ends_close_by(first: str, second: int) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(256, 192, generator=generator)
    y = x @ torch.randn(192, 66, generator=generator) / 14

    def train(run: Run, steps: int) -> Run:
        for _ in range(steps):
            run.step({"w": 2 * (x @ run.weights["w"].T - y).T @ x / 256})
        return run

    start = {"w": torch.zeros(66, 192)}
    options = {"lr": 5e-3, "weight_decay": 0.0}
    whole = train(Run(start, first, 1, **options), 30).weights["w"]
    half = train(Run(start, first, 1, **options), 15)
    continued = train(half.continued(first, second, **options), 15).weights["w"]
    forgotten = train(Run(half.weights, first, second, **options), 15).weights["w"]
    distance = [((other - whole).norm() / whole.norm()).item() for other in (continued, forgotten)]
    assert distance[0] < 0.02 < 0.2 < distance[1]


@pytest.mark.parametrize(("saved", "wanted"), [("adamw", "state1"), ("adamw_8bit", "exp_avg")])
def test_moments_of_another_optimizer_are_refused_by_name(saved: str, wanted: str) -> None:
    run = trained(saved, 1)
    with pytest.raises(PacktrainError, match=rf"optim\.big\.{wanted}(.|\n)*fix: .*optim\.name"):
        run.continued("adamw" if saved != "adamw" else "adamw_8bit", 1)


def test_a_layout_that_copies_is_found_out() -> None:
    """As DTensor does with a tensor that is not on its mesh's device."""
    shard = trained("adamw_8bit", 1).shards[0]
    shard.wrap = lambda name, local: local.clone()  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="copied"):
        shard.moments.state_dict()


def test_no_weight_is_8_bit_in_one_shard_and_32_bit_in_another() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        rows, columns = (torch.randint(1, high, (12,), generator=generator).tolist() for high in (60, 700))
        shapes = {str(i): torch.Size(shape) for i, shape in enumerate(zip(rows, columns, strict=True))}
        num_shards = int(torch.randint(1, 9, (), generator=generator))
        threshold = min_8bit_size(shapes, num_shards)
        assert threshold >= 4096
        for shape in shapes.values():
            sizes = [part.numel() for part in torch.empty(shape, device="meta").chunk(num_shards)]
            assert len({size >= threshold for size in sizes}) == 1, (shape, num_shards)
