"""One loss on any number of processes: every strategy, method and cut of the batch against one float32 process."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest

from distributed.pool import Pools
from distributed.reference import train_reference
from distributed.runs import (
    Trace,
    build,
    largest_relative_error,
    make_packs,
    relative_error,
    train_steps,
    whole_state,
)
from trainer.config import RunConfig
from trainer.data.sampler import GlobalBatchSampler
from trainer.errors import UserError
from trainer.model.recompute import decoder_layers
from trainer.processes import Processes

STEPS = 5  # two epochs of `PACKS`, and every `learning_rate`
PACKS = make_packs(30)
NF4 = {"quantization": {"type": "nf4", "double_quant": True}}
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "full": ({}, 1e-5),
    "lora": ({"adapter": {"r": 4}}, 1e-5),
    "qlora": ({"adapter": {"r": 4}, **NF4}, 1e-4),
}
VARIANTS: dict[str, tuple[dict[str, Any], float]] = {
    **METHODS,
    "rslora": ({"adapter": {"r": 4, "rslora": True}}, 1e-5),
    "dora": ({"adapter": {"r": 4, "dora": True}}, 1e-5),
    "qdora": ({"adapter": {"r": 4, "dora": True}, **NF4}, 1e-4),
    "head and embeddings": ({"adapter": {"r": 4, "modules_to_save": ["embed_tokens", "lm_head"]}}, 1e-5),
    "some targets": ({"adapter": {"r": 4, "targets": ["k_proj", "down_proj"]}, **NF4}, 1e-4),
    "fp4": ({"adapter": {"r": 4}, "quantization": {"type": "fp4", "double_quant": False}}, 1e-4),
    "int8": ({"adapter": {"r": 4}, "quantization": {"type": "int8"}}, 1e-4),
    "tied": ({"model": {"tied": True}}, 1e-5),
    "tied lora": ({"model": {"tied": True}, "adapter": {"r": 4}}, 1e-5),
    "full, bfloat16": ({"model": {"dtype": "bfloat16"}}, 1e-2),
    "lora, bfloat16": ({"model": {"dtype": "bfloat16"}, "adapter": {"r": 4}}, 1e-2),
    "qlora, bfloat16": ({"model": {"dtype": "bfloat16"}, "adapter": {"r": 4}, **NF4}, 1e-2),
}
# With AdamW's usual epsilon an element whose gradient is all rounding error moves its weight by a whole step.
OPTIM = {"weight_decay": 0.1, "max_grad_norm": 1.0, "eps": 1e-4}


@lru_cache
def sampler(packs_per_step: int = 12, steps: int = STEPS) -> GlobalBatchSampler:
    return GlobalBatchSampler(len(PACKS), packs_per_step, steps * packs_per_step / len(PACKS), seed=3)


def train_cell(processes: Processes, config: RunConfig, packs_per_step: int, micro_batch: int) -> Trace:
    """A rank's part in one cell."""
    strategy = build(processes, config)
    trace = train_steps(strategy, sampler(packs_per_step), PACKS, micro_batch, range(STEPS), config.optim.max_grad_norm)
    if config.train.offload_activations:
        root: Any = strategy.module
        assert decoder_layers(root.get_submodule("model"))[0].offload.host_bytes > 0
    state = whole_state(strategy)
    if processes.is_first:
        trace.state = {name: tensor for name, tensor in state.items() if not name.endswith(".step")}
    return trace


class Cells:
    """Recipes of the variants, and the reference of each, trained once."""

    def __init__(self, make: Callable[..., RunConfig], model: str, tied: str, folders: Any) -> None:
        self.make, self.model, self.tied, self.folders = make, model, tied, folders
        self.references: dict[tuple[str, int], Trace] = {}

    def config(self, variant: str, **sections: Any) -> RunConfig:
        merged = {**VARIANTS[variant][0], **sections}
        model = dict(merged.get("model", {}))
        model["path"] = self.tied if model.pop("tied", False) else self.model
        return self.make(**{**merged, "model": model, "optim": OPTIM})

    def reference(self, variant: str, packs_per_step: int) -> Trace:
        key = (variant, packs_per_step)
        if key not in self.references:
            order = sampler(packs_per_step)
            batches = [[PACKS[index] for index in order.batch(step)] for step in range(STEPS)]
            self.references[key] = train_reference(self.config(variant), batches, self.folders.mktemp("adapter"))
        return self.references[key]


@pytest.fixture(scope="session")
def references() -> dict[tuple[str, int], Trace]:
    return {}


@pytest.fixture
def cells(
    toy_recipe: Any, toy_model_dir: Any, toy_tied_model_dir: Any, tmp_path_factory: Any, references: Any
) -> Cells:
    made = Cells(toy_recipe, str(toy_model_dir), str(toy_tied_model_dir), tmp_path_factory)
    made.references = references
    return made


def check(
    pool: Pools,
    cells: Cells,
    world_size: int,
    variant: str,
    kind: str,
    accumulation: int = 1,
    packs_per_step: int = 12,
    **sections: Any,
) -> list[Trace]:
    """Trains one cell and compares losses, gradient norms, gradients (as the moments hold them) and weights."""
    strategy = {"kind": kind, **sections.pop("strategy", {})}
    config = cells.config(variant, strategy=strategy, **sections)
    rounds = -(-packs_per_step // world_size)
    micro_batch = -(-rounds // accumulation)
    traces = pool(world_size).run(train_cell, config, packs_per_step, micro_batch)

    found, wanted, tolerance = traces[0], cells.reference(variant, packs_per_step), VARIANTS[variant][1]
    assert {tuple(trace.num_micro_batches) for trace in traces} == {(accumulation,) * STEPS}
    assert not any(found.skipped)
    for trace in traces:
        assert trace.losses == found.losses and trace.grad_norms == found.grad_norms
    errors = {
        "losses": largest_relative_error(found.losses, wanted.losses),
        "gradient norms": largest_relative_error(found.grad_norms, wanted.grad_norms),
        "gradients": relative_error(found.section(".exp_avg"), wanted.section(".exp_avg")),
        "squared gradients": relative_error(found.section(".exp_avg_sq"), wanted.section(".exp_avg_sq")),
        "weights": relative_error(found.section("model."), wanted.section("model.")),
    }
    assert max(errors.values()) <= tolerance, errors
    return traces


KINDS = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]
CELLS = [(1, "single", 3), *((world_size, kind, 3) for world_size in (1, 2, 4) for kind in KINDS)]
CELLS += [(2, kind, 1) for kind in KINDS]  # a micro-batch that is a step's first and last at once


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("world_size", "kind", "accumulation"), CELLS)
def test_matrix(world_size: int, kind: str, accumulation: int, method: str, pool: Pools, cells: Cells) -> None:
    check(pool, cells, world_size, method, kind, accumulation)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero3"])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in METHODS and "bfloat16" not in name])
@pytest.mark.parametrize("world_size", [2])
def test_kinds_of_models(world_size: int, variant: str, kind: str, pool: Pools, cells: Cells) -> None:
    check(pool, cells, world_size, variant, kind, accumulation=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("world_size", [2])
def test_bfloat16_with_float32_masters(world_size: int, method: str, kind: str, pool: Pools, cells: Cells) -> None:
    check(pool, cells, world_size, f"{method}, bfloat16", kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("world_size", "method"), [(2, "full"), (4, "qlora")])
def test_a_global_batch_that_the_ranks_do_not_divide(
    world_size: int, method: str, kind: str, pool: Pools, cells: Cells
) -> None:
    traces = check(pool, cells, world_size, method, kind, accumulation=2, packs_per_step=5)
    shares = [[len(trace.samples[step]) for trace in traces] for step in range(STEPS)]
    assert all(sum(share) == 5 and min(share) < max(share) for share in shares)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [4])
def test_fewer_packs_than_ranks(world_size: int, kind: str, pool: Pools, cells: Cells) -> None:
    traces = check(pool, cells, world_size, "lora", kind, packs_per_step=3)
    assert traces[3].samples == [[]] * STEPS  # it computes along on nothing


@pytest.mark.parametrize("method", ["full", "qlora"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [2])
def test_recomputed_activations(world_size: int, kind: str, method: str, pool: Pools, cells: Cells) -> None:
    check(pool, cells, world_size, method, kind, accumulation=3, train={"recompute": "full"})


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("method", ["full", "qlora"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero3"])
@pytest.mark.parametrize("world_size", [2])
def test_activations_in_host_memory(
    world_size: int, kind: str, method: str, recompute: str, pool: Pools, cells: Cells
) -> None:
    train = {"recompute": recompute, "offload_activations": True}
    check(pool, cells, world_size, method, kind, accumulation=3, train=train)


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp, moments on the host": (2, {"kind": "ddp", "offload": "optimizer"}),
    "fsdp2, moments on the host": (2, {"kind": "fsdp2", "offload": "optimizer"}),
    "fsdp2, all on the host": (2, {"kind": "fsdp2", "offload": "all"}),
    "fsdp2, layers stay gathered": (2, {"kind": "fsdp2", "reshard": False}),
    "zero2, moments on the host": (2, {"kind": "zero2", "offload": "optimizer"}),
    "zero3, all on the host": (2, {"kind": "zero3", "offload": "all"}),
    "fsdp2, two copies of two shards": (4, {"kind": "fsdp2", "shard_size": 2}),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("world_size", "strategy"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(world_size: int, strategy: dict[str, Any], method: str, pool: Pools, cells: Cells) -> None:
    rest = {key: value for key, value in strategy.items() if key != "kind"}
    check(pool, cells, world_size, method, strategy["kind"], accumulation=3, strategy=rest)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("world_size", [2])
def test_float16_finds_its_loss_scale_on_all_ranks_alike(world_size: int, kind: str, pool: Pools, cells: Cells) -> None:
    config = cells.config("lora", model={"dtype": "float16"}, strategy={"kind": kind})
    first, second = pool(world_size).run(train_cell, config, 12, 2)
    assert first.skipped == second.skipped and first.losses == second.losses
    done = [index for index, skipped in enumerate(first.skipped) if not skipped]
    assert done  # the scale came down to where gradients are finite
    wanted = cells.reference("lora", 12)
    assert largest_relative_error(first.losses[:1], wanted.losses[:1]) <= 1e-2
    assert max(first.losses) < 2 * first.losses[0]


def refuse_single(processes: Processes, config: RunConfig) -> str:
    """What `build` says to one process's strategy on several."""
    with pytest.raises(UserError) as caught:
        build(processes, config)
    return str(caught.value)


@pytest.mark.parametrize("world_size", [2])
def test_the_single_strategy_is_refused_on_several_processes(world_size: int, pool: Pools, cells: Cells) -> None:
    said = pool(world_size).run(refuse_single, cells.config("full", strategy={"kind": "single"}))
    assert all("strategy.kind" in text and "2 processes" in text and "fsdp2" in text for text in said)
