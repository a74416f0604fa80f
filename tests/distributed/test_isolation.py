"""The self-test before the first step: it refuses every attention that mixes documents, on any strategy's model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.llama.modeling_llama import eager_attention_forward

from distributed.pool import Pools
from distributed.runs import build, make_packs, train_steps
from trainer.config import RunConfig
from trainer.data.sampler import GlobalBatchSampler
from trainer.errors import PacktrainError
from trainer.isolation import check_isolation
from trainer.model.attention import BY_DOCUMENT, VARLEN, document_attention
from trainer.processes import Processes

Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
QLORA = {"adapter": {"r": 4, "dropout": 0.2}, "quantization": {}}


def causal_over_the_row(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    """The library's eager attention under the mask of one long document: `cu_seq_lens_q` is ignored."""
    tokens = query.shape[2]
    ahead = torch.full((tokens, tokens), float("-inf")).triu(1)[None, None]
    return eager_attention_forward(module, query, key, value, ahead.to(query.dtype), kwargs["scaling"])


def all_ones(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    """Every token sees every other."""
    return eager_attention_forward(module, query, key, value, None, kwargs["scaling"])


def both_ways_in_a_document(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    """Documents are apart, but their tokens see what comes after."""
    lengths = kwargs["cu_seq_lens_q"].diff().tolist()
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    outputs = [F.scaled_dot_product_attention(q, k, v, enable_gqa=True) for q, k, v in parts]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def itself_alone(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    """No token sees another: isolated, and useless."""
    return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2), None


def boundaries_off_by(shift: int) -> Attention:
    """Each document begins `shift` tokens late or early."""

    def shifted(*args: Any, cu_seq_lens_q: torch.Tensor, **kwargs: Any) -> Any:
        boundaries = cu_seq_lens_q.clone()
        boundaries[1:-1] += shift
        return document_attention(*args, cu_seq_lens_q=boundaries, **kwargs)

    return shifted


FAULTS: dict[str, tuple[Attention, str]] = {
    "causal over the row": (causal_over_the_row, "see each other"),
    "all ones": (all_ones, "see each other"),
    "documents begin late": (boundaries_off_by(1), "see each other"),
    "documents begin early": (boundaries_off_by(-1), "see each other"),
    "both ways": (both_ways_in_a_document, "not causal"),
    "itself alone": (itself_alone, "sees no earlier token"),
}


def said_of(processes: Processes, config: RunConfig, fault: str) -> str:
    """What the self-test says of a model with a planted fault."""
    AttentionInterface.register(fault, FAULTS[fault][0])
    AttentionMaskInterface.register(fault, lambda *args, **kwargs: None)
    strategy = build(processes, config)
    strategy.module.causal_lm.set_attn_implementation(fault)  # type: ignore[union-attr, operator]
    with pytest.raises(PacktrainError) as caught:
        check_isolation(strategy)
    return str(caught.value)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("world_size", "kind"), [(1, "single"), (2, "fsdp2")])
def test_refuses(world_size: int, kind: str, fault: str, pool: Pools, toy_recipe: Any) -> None:
    said = pool(world_size).run(said_of, toy_recipe(**QLORA, strategy={"kind": kind}), fault)
    assert len(set(said)) == 1, "all processes end alike"
    assert f"attention {fault} " in said[0] and FAULTS[fault][1] in said[0] and "fix: " in said[0]


def said_of_sdpa(processes: Processes, config: RunConfig) -> str:
    """The library's own sdpa goes by a mask, and packed rows have none."""
    strategy = build(processes, config)
    strategy.module.causal_lm.set_attn_implementation("sdpa")  # type: ignore[union-attr, operator]
    with pytest.raises(PacktrainError) as caught:
        check_isolation(strategy)
    return str(caught.value)


@pytest.mark.parametrize("world_size", [1])
def test_refuses_the_librarys_sdpa(world_size: int, pool: Pools, toy_recipe: Any) -> None:
    (said,) = pool(1).run(said_of_sdpa, toy_recipe(strategy={"kind": "single"}))
    assert "attention sdpa lets packed documents see each other" in said


def said_of_one_rank(processes: Processes, config: RunConfig) -> str:
    """Rank 1 alone has the fault."""
    AttentionInterface.register("late", boundaries_off_by(1))
    AttentionMaskInterface.register("late", lambda *args, **kwargs: None)
    strategy = build(processes, config)
    if processes.rank == 1:
        strategy.module.causal_lm.set_attn_implementation("late")  # type: ignore[union-attr, operator]
    with pytest.raises(PacktrainError) as caught:
        check_isolation(strategy)
    return str(caught.value)


@pytest.mark.parametrize("world_size", [2])
def test_one_faulty_rank_ends_all(world_size: int, pool: Pools, toy_recipe: Any) -> None:
    said = pool(2).run(said_of_one_rank, toy_recipe(strategy={"kind": "ddp"}))
    assert all("rank 1" in text and "see each other" in text for text in said)


def said_of_broken_weights(processes: Processes, config: RunConfig) -> str:
    """Where nothing is a number, nothing can be seen to move."""
    strategy = build(processes, config)
    with torch.no_grad():
        strategy.module.causal_lm.model.norm.weight.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(PacktrainError) as caught:
        check_isolation(strategy)
    return str(caught.value)


@pytest.mark.parametrize("world_size", [1])
def test_refuses_what_it_cannot_measure(world_size: int, pool: Pools, toy_recipe: Any) -> None:
    (said,) = pool(1).run(said_of_broken_weights, toy_recipe(strategy={"kind": "single"}))
    assert "not finite" in said and "fix: " in said


PACKS = make_packs(12)
SAMPLER = GlobalBatchSampler(len(PACKS), packs_per_step=4, epochs=1, seed=3)


def train_with_and_without(processes: Processes, config: RunConfig, attention: str) -> tuple[Any, Any]:
    """Losses and gradient norms of a run that was tested first, and of one that was not."""
    traces = []
    for tested in (True, False):
        strategy = build(processes, config)
        strategy.module.causal_lm.set_attn_implementation(attention)  # type: ignore[union-attr, operator]
        if tested:
            strategy.module.train()
            before = torch.get_rng_state()
            check_isolation(strategy)
            assert torch.equal(before, torch.get_rng_state())
            assert all(module.training for module in strategy.module.modules())
        traces.append(train_steps(strategy, SAMPLER, PACKS, 2, range(3)))
    return tuple((trace.losses, trace.grad_norms) for trace in traces)  # type: ignore[return-value]


SOUND: dict[str, tuple[int, str, str, dict[str, Any]]] = {
    "single, qlora": (1, "single", BY_DOCUMENT, QLORA),
    "single, varlen": (1, "single", VARLEN, QLORA),  # in float32, and so by document: its kernel is CUDA's
    "single, bfloat16": (1, "single", BY_DOCUMENT, {"model": {"dtype": "bfloat16"}}),
    "ddp, qlora": (2, "ddp", BY_DOCUMENT, QLORA),
    "fsdp2, qlora": (2, "fsdp2", BY_DOCUMENT, QLORA),
    "fsdp2, bfloat16": (2, "fsdp2", BY_DOCUMENT, {"model": {"dtype": "bfloat16"}}),
    "fsdp2, all on the host": (2, "fsdp2", BY_DOCUMENT, {"strategy": {"offload": "all"}}),
    "zero3, qlora": (2, "zero3", BY_DOCUMENT, QLORA),
    "zero3, full": (2, "zero3", BY_DOCUMENT, {}),
}


@pytest.mark.parametrize(("world_size", "kind", "attention", "sections"), SOUND.values(), ids=SOUND)
def test_a_sound_model_passes_and_trains_as_if_untested(
    world_size: int, kind: str, attention: str, sections: dict[str, Any], pool: Pools, toy_recipe: Any
) -> None:
    config = toy_recipe(**sections | {"strategy": {"kind": kind, **sections.get("strategy", {})}})
    for tested, untested in pool(world_size).run(train_with_and_without, config, attention):
        assert tested == untested
