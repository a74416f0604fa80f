"""Sizes of a run: what is predicted is measured before it is taken, and lowered once where memory still runs out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.checkpoint.layout import RunDir, read_manifest
from trainer.config import RunConfig
from trainer.data.types import PackedBatch
from trainer.errors import PacktrainError, UserError
from trainer.loss import PackedCausalLM, chunk_bytes
from trainer.metrics.trackers import read_metrics
from trainer.model.shapes import published_shape
from trainer.planner import plan
from trainer.planning.hardware import GIB, find_gpu
from trainer.planning.job import Job
from trainer.planning.levels import LayerLevels
from trainer.planning.shape import ModelShape
from trainer.run import train
from trainer.sizes import Sizes

LORA: dict[str, Any] = {"adapter": {"r": 4}}
CUDA = torch.device("cuda")
AUTO: dict[str, Any] = {"micro_batch": "auto", "recompute": "auto", "global_batch": {"rows": 4}}
MODEL = "meta-llama/Llama-2-7b-hf"
PACKS = [[(list(range(64)), list(range(64)))]]


class Measured:
    """A strategy on a GPU that allocates as much as its level and tokens make it, and then its gradients."""

    device = CUDA

    def __init__(
        self, bytes_per_token: Callable[[LayerLevels], float], gradients: float = 0.0, paged: float = 0.0
    ) -> None:
        self.bytes_per_token, self.gradients, self.paged = bytes_per_token, gradients, paged
        self.levels = LayerLevels(())
        self.peak = self.allocated = 5.0 * GIB
        self.module = SimpleNamespace(train=lambda: None)
        self.processes = SimpleNamespace(min=lambda value: value, max=lambda value: value)
        self.tokens: list[int] = []

    def allocate_optimizer(self) -> float:
        return self.paged

    def discard_gradients(self) -> None:
        self.allocated = 5.0 * GIB

    def forward_backward(self, micro_batches: list[PackedBatch], num_trained_tokens: int) -> None:
        tokens = micro_batches[0].num_tokens
        self.tokens.append(tokens)
        for _ in micro_batches:
            forward = self.allocated + tokens * self.bytes_per_token(self.levels)
            self.allocated = 5 * GIB + self.gradients
            self.peak = max(self.peak, forward, self.allocated)


@pytest.fixture
def confirm(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Sizes]:
    config = {"model": {"path": MODEL, "init": "random"}, "adapter": {"r": 16}, "quantization": {}}
    config["data"] = {"train": [{"path": "x", "format": "text"}], "train_on": "all"}
    shape = published_shape(MODEL)
    assert shape
    job = Job(RunConfig.model_validate(config), ModelShape.build(shape), find_gpu(None, 24))

    def run(strategy: Measured, packs_each: int = 16) -> Sizes:
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=job.gpu.memory)
        )
        for name in ("empty_cache", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, lambda *arguments: None)
        forget = lambda device: setattr(strategy, "peak", strategy.allocated)  # noqa: E731
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", forget)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: strategy.peak)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: strategy.allocated)
        sizes = Sizes(plan(job), lambda levels: setattr(strategy, "levels", levels))
        sizes.confirm(strategy, PACKS, packs_each, job.config)  # type: ignore[arg-type]
        return sizes

    return run


def room_for(gib: float) -> float:
    return gib * GIB / 4096


def test_what_fits_is_taken_as_planned(confirm: Callable[..., Sizes]) -> None:
    strategy = Measured(lambda levels: room_for(10))
    sizes = confirm(strategy)
    assert str(sizes.setting.levels) == "none" and strategy.levels == sizes.setting.levels
    assert max(strategy.tokens) == sizes.setting.micro_batch * 4096 / 4  # a large batch is never tried


def test_what_takes_more_than_was_planned_gives_way_to_what_takes_as_much_less(
    confirm: Callable[..., Sizes], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "trainer.sizes")
    strategy = Measured(lambda levels: room_for({"none": 25, "norms": 20}.get(levels.of_layers[-1], 8)))
    sizes = confirm(strategy)
    assert levels_of(sizes) not in ("none", "norms") and strategy.levels == sizes.setting.levels
    assert "predicted" in caplog.text and "measured" in caplog.text


def test_gradients_take_the_place_of_a_steps_only_activations(
    confirm: Callable[..., Sizes], caplog: pytest.LogCaptureFixture
) -> None:
    """Beside 5 GiB of weights; the loss's chunk is on top."""
    caplog.set_level("INFO", "trainer.sizes")
    for packs_each, gib, gradients, measured in [(1, 10, 4, 15), (16, 10, 4, 19), (1, 2, 9, 14.125), (16, 2, 9, 16)]:
        caplog.clear()
        confirm(Measured(lambda levels, gib=gib: room_for(gib), gradients * GIB), packs_each)
        chunk = chunk_bytes(torch.bfloat16, CUDA) / GIB
        assert f"measured {measured + chunk:.1f};" in caplog.text


@pytest.mark.parametrize(
    ("paged", "is_leaner", "says"),
    [(1, False, "measured 16"), (8, True, "measured 23"), (16, True, "of 16.0 GiB move")],
)
def test_paged_moments_have_their_room_where_there_is_some(
    paged: float, is_leaner: bool, says: str, confirm: Callable[..., Sizes], caplog: pytest.LogCaptureFixture
) -> None:
    """Where even the leanest leaves too little they move to the host and back, as their optimizer is for."""
    caplog.set_level("INFO", "trainer.sizes")
    strategy = Measured(lambda levels: room_for(10 if levels.of_layers[-1] == "none" else 4), paged=paged * GIB)
    assert (levels_of(confirm(strategy)) != "none") == is_leaner
    assert says in caplog.text


def test_what_ran_out_is_told_with_paged_moments_as_it_was_predicted(confirm: Callable[..., Sizes]) -> None:
    sizes = confirm(Measured(lambda levels: room_for(10), paged=GIB))
    assert "found more than 11.0;" in str(sizes.back_off(found=10.0 * GIB))


def levels_of(sizes: Sizes) -> str:
    return sizes.setting.levels.of_layers[-1]


def test_where_nothing_fits_the_run_ends_before_its_first_step(confirm: Callable[..., Sizes]) -> None:
    with pytest.raises(UserError, match="and this GPU has 23.6") as refused:
        confirm(Measured(lambda levels: room_for(100)))
    assert refused.value.fix.startswith("cut the model over more GPUs, or lower data.pack_length;")  # it is quantised


# ---------------------------------------------------------------------------------------------------- out of memory


def events(run: RunDir) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run.metrics) if record["kind"] == "event"]


def losses(run: RunDir) -> list[float]:
    return [record["loss"] for record in read_metrics(run.metrics) if record["kind"] == "step"]


@pytest.fixture
def run_out(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int, int], bool]], None]:
    """Has memory run out in the forwards for which a function of their number and tokens says so."""

    def install(runs_out: Callable[[int, int], bool]) -> None:
        forward, calls = PackedCausalLM.forward, iter(range(10**6))

        def checked(self: PackedCausalLM, batch: PackedBatch) -> torch.Tensor:
            loss = forward(self, batch)  # part of the work is done when it happens
            if self.training and torch.is_grad_enabled() and runs_out(next(calls), batch.num_tokens):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
            return loss

        monkeypatch.setattr(PackedCausalLM, "forward", checked)

    return install


SMALLER: dict[str, Any] = {**AUTO, "recompute": "none"}  # where packs alone are left to take away
TWO_ROUNDS: dict[str, Any] = {"micro_batch": 2, "recompute": "auto", "global_batch": {"rows": 4}}


@pytest.mark.parametrize(
    ("sizes", "runs_out", "step"),
    [
        (SMALLER, lambda call, tokens: tokens > 2 * 128, 0),
        (SMALLER, lambda call, tokens: call > 1 and tokens > 2 * 128, 2),  # batches of the next step are cut already
        (TWO_ROUNDS, lambda call, tokens: call == 5, 2),  # with the gradient of a first micro-batch
    ],
    ids=["at once", "later", "in the second micro-batch"],
)
def test_out_of_memory_steps_down_once_and_trains_as_it_would_have(
    sizes: dict[str, Any],
    runs_out: Callable[[int, int], bool],
    step: int,
    toy_recipe: Callable[..., RunConfig],
    tmp_path: Path,
    run_out: Callable[[Callable[[int, int], bool]], None],
) -> None:
    config = toy_recipe(**LORA, train=sizes)
    whole, small = RunDir(tmp_path / "whole"), RunDir(tmp_path / "small")
    train(config, whole.path)
    run_out(runs_out)
    train(config, small.path)
    assert losses(small) == pytest.approx(losses(whole), rel=1e-4) and len(losses(small)) == 4
    (event,) = [event for event in events(small) if event["event"] == "out_of_memory"]
    assert event["step"] == step and "predicted" in event["text"] and "goes on with" in event["text"]
    before, after = (read_manifest(run.step_dir(4))["progress"] for run in (whole, small))
    assert (before["micro_batch"], before["recompute"]) != (after["micro_batch"], after["recompute"])


def test_out_of_memory_twice_ends_the_run(
    toy_recipe: Callable[..., RunConfig], tmp_path: Path, run_out: Callable[[Callable[[int, int], bool]], None]
) -> None:
    run_out(lambda call, tokens: True)
    with pytest.raises(PacktrainError, match="the GPU's memory is full"):
        train(toy_recipe(**LORA, train=AUTO), tmp_path / "run")
    assert len([event for event in events(RunDir(tmp_path / "run")) if event["event"] == "out_of_memory"]) == 1


def test_out_of_memory_with_sizes_of_the_recipe_ends_the_run(
    toy_recipe: Callable[..., RunConfig], tmp_path: Path, run_out: Callable[[Callable[[int, int], bool]], None]
) -> None:
    run_out(lambda call, tokens: call == 0)
    asked = {"micro_batch": 2, "recompute": "none", "global_batch": {"rows": 4}}
    with pytest.raises(PacktrainError, match="the GPU's memory is full"):
        train(toy_recipe(**LORA, train=asked), tmp_path / "run")
