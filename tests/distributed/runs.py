"""Short training runs under any strategy on made-up packs: what the tests of this folder let ranks do and compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from trainer.config import RunConfig
from trainer.data.sampler import GlobalBatchSampler, Pack, collate, deal, document_cost
from trainer.data.types import IGNORE_INDEX
from trainer.loss import PackedCausalLM
from trainer.model.load import build_model, load_weights
from trainer.model.offload import ActivationOffload
from trainer.model.quantized import fingerprint
from trainer.model.recompute import decoder_layers, set_recompute
from trainer.optim import build_optimizer
from trainer.planning.levels import read_levels
from trainer.processes import Processes
from trainer.sizes import describe_job
from trainer.strategies.base import Strategy
from trainer.strategies.choose import build_strategy

Tensors = dict[str, torch.Tensor]


@dataclass
class Trace:
    """What a run left behind.

    Attributes:
        losses: of each step, per trained token.
        grad_norms: of each step, before clipping.
        state: weights and moments after the last step, whole, by `Strategy.state_dict`'s names.
        samples: packs that this rank trained on, in its order.
        num_micro_batches: of this rank in each step.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)
    state: Tensors = field(default_factory=dict)
    samples: list[list[int]] = field(default_factory=list)
    num_micro_batches: list[int] = field(default_factory=list)

    def section(self, ending: str) -> Tensors:
        """Tensors of `state` whose names end so (``exp_avg``), or begin so (``model.``)."""
        return {name: t for name, t in self.state.items() if name.endswith(ending) or name.startswith(ending)}


def make_packs(count: int, seed: int = 0) -> list[Pack]:
    """Packs of 1 to 4 documents of 1 to 24 random tokens, masked in stretches; lengths differ a lot on purpose."""
    generator = torch.Generator().manual_seed(seed)

    def random(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def document() -> tuple[list[int], list[int]]:
        ids = torch.randint(5, 300, (random(1, 25),), generator=generator).tolist()
        masked = (torch.rand(len(ids), generator=generator) < 0.4).tolist()
        masked[0] = True  # nothing before it predicts a document's first token
        return ids, [IGNORE_INDEX if hidden else token for token, hidden in zip(ids, masked, strict=True)]

    return [[document() for _ in range(random(1, 5))] for _ in range(count)]


def learning_rate(step: int) -> float:
    """A different one each step, counted from 0."""
    return 1e-3 * (1 + step % 5 / 4)


def _place(strategy: Strategy, owner: nn.Module, leaf: str, whole: torch.Tensor) -> None:
    strategy.place(owner, leaf, whole)


def build(processes: Processes, config: RunConfig, place: Callable[..., None] = _place) -> Strategy:
    """Model and strategy of a recipe, loaded and ready to train, as a run assembles them.

    Args:
        place: called as ``place(strategy, owner, leaf, whole)`` for every parameter.
    """
    built = build_model(config, processes.device)
    if config.train.offload_activations:
        offload_activations(built.model, processes.device)
    bytes_of = fingerprint if config.quantization else None
    job = describe_job(config, built.model, processes)
    strategy = build_strategy(config, job, processes, bytes_of)
    strategy.shard(PackedCausalLM(built.model, getattr(torch, config.compute_dtype)))
    load_weights(built, config, partial(place, strategy), processes, lambda activity: None)
    strategy.prepare(partial(build_optimizer, config.optim))
    set_levels(built.model, config)
    return strategy


def offload_activations(model: nn.Module, device: torch.device) -> None:
    """As a run does it, but with pages as small as the toys' activations."""
    layers = decoder_layers(model)
    offload = ActivationOffload(layers, device, page_bytes=1024)
    for layer in layers:
        layer.offload = offload


def set_levels(model: nn.Module, config: RunConfig) -> None:
    """The recipe's recompute levels, which are not automatic."""
    assert config.train.recompute != "auto"
    set_recompute(model, read_levels(config.train.recompute, len(decoder_layers(model))))


def train_steps(
    strategy: Strategy,
    sampler: GlobalBatchSampler,
    packs: Sequence[Pack],
    micro_batch: int,
    steps: Iterable[int],
    max_norm: float | None = 1.0,
) -> Trace:
    """Trains `steps` (counted from 0) of the sampler, as the loop does."""
    processes, trace = strategy.processes, Trace()
    strategy.module.train()
    for step in steps:
        costs = np.array([sum(document_cost(len(ids)) for ids, _ in packs[index]) for index in sampler.batch(step)])
        dealt = deal(sampler.samples(step), costs, processes.rank, processes.world_size, micro_batch)
        batches = [
            collate([packs[sampler.pack(sample)] for sample in own], sampler.noise_seed(own[0] if own else 0))
            for own in dealt
        ]
        (num_trained,) = processes.sum(sum(batch.num_trained_tokens for batch in batches))
        loss = strategy.forward_backward(batches, num_trained)
        result = strategy.step(learning_rate(step), max_norm)
        trace.losses.append(loss.item() / num_trained)
        trace.grad_norms.append(result.grad_norm)
        trace.skipped.append(result.skipped)
        trace.samples.append([sample for own in dealt for sample in own])
        trace.num_micro_batches.append(len(dealt))
    return trace


def whole_state(strategy: Strategy) -> Tensors:
    """Copies of `Strategy.state_dict`'s tensors, whole, on the CPU; on all ranks together.

    Every rank must hold rows of every parameter: one without has no moments for it, and would not take part.
    """
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()
        for name, tensor in sorted(strategy.state_dict().items())
    }


def relative_error(found: Tensors, wanted: Tensors) -> float:
    """Norm of the difference over the norm of what was wanted, all tensors as one vector."""
    assert set(found) == set(wanted), sorted(set(found) ^ set(wanted))[:4]
    assert found
    difference = sum((found[name].double() - wanted[name].double()).square().sum() for name in wanted)
    return float((difference / sum(tensor.double().square().sum() for tensor in wanted.values())) ** 0.5)


def largest_relative_error(found: Sequence[float], wanted: Sequence[float]) -> float:
    """Of numbers one by one; infinite where one is no number."""
    assert len(found) == len(wanted)
    errors = [abs(one - other) / abs(other) for one, other in zip(found, wanted, strict=True)]
    return max(error if error == error else float("inf") for error in errors)
