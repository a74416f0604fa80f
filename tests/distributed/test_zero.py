"""DeepSpeed's ZeRO where it differs from the other strategies: cut weights, its own masters, what it does with moments.

Toys are small, so `keep_whole` is 0: else zero3 would leave every weight of theirs whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from distributed.pool import Pools
from distributed.reference import train_reference
from distributed.runs import (
    Trace,
    build,
    largest_relative_error,
    make_packs,
    relative_error,
    set_levels,
    train_steps,
    whole_state,
)
from trainer.checkpoint.layout import RunDir
from trainer.checkpoint.manager import CheckpointManager
from trainer.config import RunConfig
from trainer.data.sampler import GlobalBatchSampler, collate
from trainer.errors import PacktrainError
from trainer.loss import PackedCausalLM
from trainer.model.load import build_model, load_weights
from trainer.model.quantized import fingerprint
from trainer.optim import build_optimizer
from trainer.processes import Processes
from trainer.strategies.base import StateDict, Strategy
from trainer.strategies.zero import Zero

PACKS = make_packs(20, seed=2)
STAGES = ["zero1", "zero2", "zero3"]
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "full": ({}, 1e-5),
    "lora": ({"adapter": {"r": 8}}, 1e-5),
    "qlora": ({"adapter": {"r": 8}, "quantization": {}}, 1e-4),
}
DROPOUT = {"adapter": {"r": 4, "dropout": 0.2}}


def sampler(packs_per_step: int = 6, steps: int = 20) -> GlobalBatchSampler:
    return GlobalBatchSampler(len(PACKS), packs_per_step, steps * packs_per_step / len(PACKS), seed=3)


def build_zero(processes: Processes, config: RunConfig, keep_whole: int = 0) -> Zero:
    """As a run assembles it, with every weight cut."""
    built = build_model(config, processes.device)
    bytes_of = fingerprint if config.quantization else None
    strategy = Zero(processes, config, config.strategy.kind, bytes_of, keep_whole)
    strategy.shard(PackedCausalLM(built.model, getattr(torch, config.compute_dtype)))
    load_weights(built, config, strategy.place, processes, lambda activity: None)
    strategy.prepare(partial(build_optimizer, config.optim))
    set_levels(built.model, config)
    return strategy


def train(zero: Strategy, steps: Sequence[int], accumulation: int = 1, packs_per_step: int = 6) -> Trace:
    rounds = -(-packs_per_step // zero.processes.world_size)
    micro_batch = -(-rounds // accumulation)
    return train_steps(zero, sampler(packs_per_step), PACKS, micro_batch, steps)


# ------------------------------------------------------------------------------------------------------ the same model


def train_three_steps(processes: Processes, config: RunConfig, accumulation: int) -> Trace:
    zero = build_zero(processes, config)
    trace = train(zero, range(3), accumulation)
    state = whole_state(zero)
    trace.state = {name: tensor for name, tensor in state.items() if not name.endswith(".step")}
    return trace


def check(pool: Pools, world_size: int, config: RunConfig, accumulation: int, tolerance: float, folder: Path) -> None:
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"weight_decay": 0.1})})
    (found, *_) = pool(world_size).run(train_three_steps, config, accumulation)
    batches = [[PACKS[index] for index in sampler().batch(step)] for step in range(3)]
    wanted = train_reference(config, batches, folder)
    assert largest_relative_error(found.losses, wanted.losses) <= tolerance
    assert largest_relative_error(found.grad_norms, wanted.grad_norms) <= tolerance
    for section in (".exp_avg", ".exp_avg_sq", "model."):
        assert relative_error(found.section(section), wanted.section(section)) <= tolerance, section


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("world_size", "kind", "accumulation"),
    [(1, "zero3", 3), (2, "zero3", 3), (3, "zero2", 2), (3, "zero3", 1)],
)
def test_it_trains_what_plain_transformers_train(
    world_size: int, kind: str, accumulation: int, method: str, pool: Pools, toy_recipe: Any, tmp_path: Path
) -> None:
    sections, tolerance = METHODS[method]
    check(pool, world_size, toy_recipe(**sections, strategy={"kind": kind}), accumulation, tolerance, tmp_path)


@pytest.mark.parametrize("method", ["full", "qlora"])
@pytest.mark.parametrize(
    ("kind", "offload"), [("zero1", "optimizer"), ("zero3", "optimizer"), ("zero3", "all")], ids=str
)
@pytest.mark.parametrize("world_size", [2])
def test_state_in_host_memory(
    world_size: int, kind: str, offload: str, method: str, pool: Pools, toy_recipe: Any, tmp_path: Path
) -> None:
    sections, tolerance = METHODS[method]
    config = toy_recipe(**sections, strategy={"kind": kind, "offload": offload})
    check(pool, world_size, config, 3, tolerance, tmp_path)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("kind", ["zero2", "zero3"])
@pytest.mark.parametrize("world_size", [2])
def test_tied_embeddings(
    world_size: int, kind: str, method: str, pool: Pools, toy_recipe: Any, toy_tied_model_dir: Path, tmp_path: Path
) -> None:
    model = {"path": str(toy_tied_model_dir)}
    config = toy_recipe(model=model, **METHODS[method][0], strategy={"kind": kind}, train={"recompute": "full"})
    check(pool, world_size, config, 2, 1e-5, tmp_path)


@pytest.mark.parametrize(
    "sections",
    [
        {"adapter": {"r": 4, "dora": True}},
        {"adapter": {"r": 4, "dora": True}, "quantization": {}},
        {"adapter": {"r": 4, "modules_to_save": ["embed_tokens", "lm_head"]}},
        {"adapter": {"r": 4, "targets": ["k_proj", "down_proj"]}, "quantization": {"double_quant": False}},
    ],
    ids=["dora", "qdora", "head and embeddings", "some targets"],
)
@pytest.mark.parametrize("world_size", [2])
def test_other_adapters_on_cut_weights(
    world_size: int, sections: dict[str, Any], pool: Pools, toy_recipe: Any, tmp_path: Path
) -> None:
    config = toy_recipe(**sections, strategy={"kind": "zero3"}, train={"recompute": "full"})
    check(pool, world_size, config, 2, 1e-4 if "quantization" in sections else 1e-5, tmp_path)


# ------------------------------------------------------------------------------------------------------ where it lies


def describe(processes: Processes, config: RunConfig) -> dict[str, Any]:
    """What a rank holds after the first step."""
    zero = build_zero(processes, config)
    before = zero.fingerprint()
    train(zero, range(1))
    held = {name: (p.dtype, getattr(p, "ds_tensor", p.data).numel()) for name, p in zero.module.named_parameters()}
    rows = {name: t.to_local().shape[0] for name, t in zero.state_dict().items() if isinstance(t, DTensor)}
    dtypes = {t.dtype for name, t in zero.state_dict().items()}
    gathered = sum(p.data.numel() for p in zero.module.parameters() if hasattr(p, "ds_tensor"))
    return {
        "held": held,
        "rows": rows,
        "dtypes": dtypes,
        "gathered": gathered,
        "fingerprints": {before, zero.fingerprint()},
    }


@pytest.mark.parametrize("method", ["full", "qlora"])
@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("world_size", [3])
def test_weights_and_state_are_cut_and_keep_their_dtypes(
    world_size: int, kind: str, method: str, pool: Pools, toy_recipe: Any
) -> None:
    config = toy_recipe(**METHODS[method][0], model={"dtype": "bfloat16"}, strategy={"kind": kind})
    ranks = pool(world_size).run(describe, config)
    whole = {
        name: p.numel()
        for name, p in PackedCausalLM(build_model(config, torch.device("cpu")).model, torch.bfloat16).named_parameters()
    }
    for found in ranks:
        assert found["dtypes"] == {torch.float32}  # masters and moments
        assert found["gathered"] == 0
        for name, (dtype, numel) in found["held"].items():
            if method == "qlora":
                expected = (
                    torch.float32
                    if "lora" in name
                    else torch.uint8
                    if "packed" in name or "scales" in name
                    else torch.bfloat16
                )
            else:
                expected = torch.bfloat16
            assert dtype == expected, name
            assert numel == (-(-whole[name] // world_size) if kind == "zero3" else whole[name])
    assert len(set.union(*(found["fingerprints"] for found in ranks))) == 1
    for name in ranks[0]["rows"]:
        assert max(found["rows"][name] for found in ranks) == -(-sum(found["rows"][name] for found in ranks) // 3)


# --------------------------------------------------------------------------------------------------------- going on


class Kept:
    """A checkpoint in memory, whole."""

    def __init__(self, state: StateDict) -> None:
        self.state, self.names = state, state.keys()

    def load(self, state: StateDict) -> None:
        for name, target in state.items():
            assert isinstance(target, DTensor)
            rows = -(-target.shape[0] // target.device_mesh.size())
            start = min(rows * target.device_mesh.get_rank(), target.shape[0])
            target.to_local().copy_(self.state[name][start : start + target.to_local().shape[0]])

    def read(self, name: str) -> torch.Tensor:
        return self.state[name]


def stop_and_go_on(processes: Processes, config: RunConfig, keep_whole: int) -> list[str]:
    """Names of what differs between 8 steps and 4, a checkpoint and 4 more; and losses that do."""
    straight = build_zero(processes, config, keep_whole)
    wanted = train(straight, range(8), 2).losses
    first = build_zero(processes, config, keep_whole)
    losses = train(first, range(4), 2).losses
    kept = whole_state(first)
    second = build_zero(processes, config, keep_whole)
    train(second, range(15, 17))  # weights and moments of its own, to be replaced
    second.restore(Kept(kept))
    wrong = [f"restored {name}" for name, tensor in whole_state(second).items() if not torch.equal(tensor, kept[name])]
    losses += train(second, range(4, 8), 2).losses
    ended = whole_state(straight)
    wrong += [name for name, tensor in whole_state(second).items() if not torch.equal(tensor, ended[name])]
    return wrong + ["losses"] * (losses != wanted)


RESUMED: dict[str, tuple[str, int, dict[str, Any], int]] = {
    **{f"{kind}, full": (kind, 2, {}, 10_000) for kind in STAGES},
    **{f"{kind}, lora with dropout": (kind, 2, DROPOUT, 100_000) for kind in ("zero1", "zero3")},
    **{f"{kind}, full in bfloat16": (kind, 2, {"model": {"dtype": "bfloat16"}}, 0) for kind in ("zero2", "zero3")},
    "zero3, full on three": ("zero3", 3, {}, 0),
}


@pytest.mark.parametrize(("kind", "world_size", "sections", "keep_whole"), RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(
    kind: str, world_size: int, sections: dict[str, Any], keep_whole: int, pool: Pools, toy_recipe: Any
) -> None:
    config = toy_recipe(**sections, strategy={"kind": kind})
    assert pool(world_size).run(stop_and_go_on, config, keep_whole) == [[]] * world_size


def save_after(processes: Processes, config: RunConfig, folder: Path, steps: int) -> tuple[StateDict, StateDict]:
    """State as saved, and after one more step."""
    strategy = build_zero(processes, config) if config.strategy.kind.startswith("zero") else build(processes, config)
    train_steps(strategy, sampler(), PACKS, 2, range(steps))
    checkpoints = CheckpointManager(RunDir(folder), config.checkpoint, {}, processes, lambda step, saved: None)
    checkpoints.save(steps, strategy.state_dict(), {}, False)
    checkpoints.close()
    saved = whole_state(strategy)
    train_steps(strategy, sampler(), PACKS, 2, range(steps, steps + 1))
    return saved, whole_state(strategy)


def resume_and_train(processes: Processes, config: RunConfig, folder: Path, steps: int) -> tuple[StateDict, StateDict]:
    """State as restored, and after one more step."""
    strategy = build_zero(processes, config) if config.strategy.kind.startswith("zero") else build(processes, config)
    checkpoints = CheckpointManager(RunDir(folder), config.checkpoint, {}, processes, lambda step, saved: None)
    strategy.restore(checkpoints.open(steps))
    restored = whole_state(strategy)
    train(strategy, range(steps, steps + 1))
    checkpoints.close()
    return restored, whole_state(strategy)


@pytest.mark.parametrize(
    ("before", "after", "method"),
    [
        ("zero1", "zero1", "full"),
        ("zero2", "zero2", "qlora"),
        ("zero3", "zero3", "full"),
        ("zero3", "zero3", "qlora"),
        ("zero3", "zero1", "lora"),
        ("fsdp2", "zero3", "full"),
        ("ddp", "zero2", "lora"),
        ("zero3", "fsdp2", "qlora"),
        ("zero2", "ddp", "full"),
    ],
)
@pytest.mark.parametrize("world_size", [2])
def test_going_on_with_another_number_of_processes(
    world_size: int, before: str, after: str, method: str, pool: Pools, toy_recipe: Any, tmp_path: Path
) -> None:
    sections = METHODS[method][0]
    writer, reader = (toy_recipe(**sections, strategy={"kind": kind}) for kind in (before, after))
    saved, further = pool(world_size).run(save_after, writer, tmp_path, 3)[0]
    for other in (3, 1):
        restored, trained = pool(other).run(resume_and_train, reader, tmp_path, 3)[0]
        assert set(restored) == set(saved)
        assert all(torch.equal(restored[name], saved[name]) for name in saved)
        assert relative_error(trained, further) <= METHODS[method][1]


def restore_from_less(processes: Processes, config: RunConfig, ending: str) -> str:
    zero = build_zero(processes, config)
    state = {name: tensor for name, tensor in whole_state(zero).items() if not name.endswith(ending)}
    with pytest.raises(PacktrainError) as caught:
        zero.restore(Kept(state))
    return str(caught.value)


@pytest.mark.parametrize("ending", [".exp_avg_sq", "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("world_size", [2])
def test_a_checkpoint_that_lacks_something_is_refused(
    world_size: int, ending: str, pool: Pools, toy_recipe: Any
) -> None:
    for said in pool(world_size).run(restore_from_less, toy_recipe(strategy={"kind": "zero2"}), ending):
        assert ending.removeprefix("model.") in said


# ------------------------------------------------------------------------------------------------------- odd moments


def meet_infinity(processes: Processes, config: RunConfig) -> dict[str, Any]:
    """A step on an infinite gradient, of one rank alone, between two good ones."""
    zero, wanted = build_zero(processes, config), build_zero(processes, config)
    train(zero, range(1), 2)
    before = whole_state(zero)
    poison = zero.module.register_forward_hook(
        lambda module, inputs, loss: loss * (float("inf") if processes.is_first else 1.0)
    )
    batch = collate(PACKS[:2])
    zero.forward_backward([batch, batch], 10)
    result = zero.step(1e-3, 1.0)
    poison.remove()
    after = whole_state(zero)
    good = train(zero, range(1, 2), 2)
    train(wanted, range(2), 2)
    ended = whole_state(wanted)
    return {
        "skipped": result.skipped and result.is_failure,
        "changed": [name for name in before if not torch.equal(before[name], after[name])],
        "later": good.skipped,
        "stale": [name for name, t in whole_state(zero).items() if not torch.equal(t, ended[name])],
    }


def probe_and_train(processes: Processes, config: RunConfig) -> list[str]:
    """Names of what a forward and backward before the run, forgotten, have changed."""
    probed, wanted = build_zero(processes, config), build_zero(processes, config)
    batch = collate(PACKS[3:5])
    probed.allocate_optimizer()
    probed.forward_backward([batch, batch], 10)
    probed.discard_gradients()
    for zero in (probed, wanted):
        train(zero, range(2), 2)
    ended = whole_state(wanted)
    return [name for name, tensor in whole_state(probed).items() if not torch.equal(tensor, ended[name])]


@pytest.mark.parametrize(
    ("kind", "offload", "dtype"),
    [
        ("zero1", "none", "bfloat16"),
        ("zero2", "none", "float32"),
        ("zero2", "optimizer", "float32"),
        ("zero3", "optimizer", "float32"),
        ("zero3", "none", "bfloat16"),
    ],
)
@pytest.mark.parametrize("world_size", [2])
def test_gradients_that_must_not_count(
    world_size: int, kind: str, offload: str, dtype: str, pool: Pools, toy_recipe: Any
) -> None:
    config = toy_recipe(model={"dtype": dtype}, strategy={"kind": kind, "offload": offload})
    for found in pool(world_size).run(meet_infinity, config):
        assert found == {"skipped": True, "changed": [], "later": [False], "stale": []}
    assert pool(world_size).run(probe_and_train, config) == [[]] * world_size


def look_inside(processes: Processes, config: RunConfig) -> dict[str, Any]:
    """Evaluation and the causal LM called without the root, before the first step and between steps."""
    batch = collate(PACKS[:4])
    make = build if config.strategy.kind == "fsdp2" else build_zero
    zero, undisturbed = make(processes, config), make(processes, config)
    bytes_before = zero.fingerprint()
    causal_lm: Any = zero.module.get_submodule("model")
    losses, logits = [], []

    def look() -> None:
        zero.module.eval()
        with torch.no_grad(), zero.whole_weights():
            logits.append(causal_lm(input_ids=batch.input_ids[:, :5], use_cache=False).logits.float())
            losses.append(zero.module(batch).item())
            logits.append(causal_lm(input_ids=batch.input_ids[:, :5], use_cache=False).logits.float())
        assert zero.fingerprint() == bytes_before
        zero.module.train()

    look()
    before = train(zero, range(2), 2).losses
    look()
    before += train(zero, range(2, 4), 2).losses
    return {
        "losses": losses,
        "logits": logits,
        "trained": before,
        "undisturbed": train(undisturbed, range(2), 2).losses + train(undisturbed, range(2, 4), 2).losses,
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kind", "reshard"), [("zero2", True), ("zero3", True), ("fsdp2", True), ("fsdp2", False)])
@pytest.mark.parametrize("world_size", [2])
def test_evaluation_and_generation_see_the_trained_weights_and_change_nothing(
    world_size: int, kind: str, reshard: bool, method: str, pool: Pools, toy_recipe: Any
) -> None:
    sections, tolerance = METHODS[method]
    config = toy_recipe(**sections, strategy={"kind": kind, "reshard": reshard})
    first, second = pool(world_size).run(look_inside, config)
    (alone,) = pool(1).run(look_inside, toy_recipe(**sections, strategy={"kind": "zero1"}))
    for found in (first, second):
        assert found["trained"] == found["undisturbed"]
        assert largest_relative_error(found["losses"], alone["losses"]) <= tolerance
        assert len({float(t.sum()) for t in found["logits"]}) == 2  # before and after training
        for one, other in zip(found["logits"], alone["logits"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
