"""`micro_batch: auto` and `recompute: auto`: try sizes once on the real model and keep the fastest that fits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from trainer.config import TrainConfig
from trainer.data.sampler import collate
from trainer.data.types import PackedBatch, PackedRows
from trainer.errors import UserError
from trainer.strategies.base import Strategy

logger = logging.getLogger(__name__)

# Larger micro-batches no longer raise an H200's rate; on a CPU they only cost memory.
MAX_TOKENS = {"cuda": 16384, "cpu": 4096}
# Share of the GPU a probe may take: fragmentation and evaluation need the rest.
USABLE_MEMORY = 0.92


@dataclass(frozen=True)
class Choice:
    """How many packs one forward takes, and whether activations are recomputed."""

    micro_batch: int
    recompute: bool

    def __str__(self) -> str:
        return f"micro-batch of {self.micro_batch} packs, recompute {'full' if self.recompute else 'none'}"


def choose_micro_batch(
    train: TrainConfig,
    strategy: Strategy,
    packs: PackedRows,
    packs_per_step: int,
    pack_length: int,
    set_recompute: Callable[[bool], None],
) -> Choice:
    """The recipe's sizes where it names them, else the fastest that fit; recompute is left set as chosen.

    On a GPU each candidate runs forward and backward over the longest packs, with the optimizer's moments allocated.
    Without recompute comes first: a smaller micro-batch costs less than a second forward.

    Raises:
        UserError: not even one pack with full recompute fits.
    """
    candidates = list(_candidates(train, strategy.device.type, min(packs_per_step, len(packs)), pack_length))
    choice = candidates[0]
    if len(candidates) > 1 and strategy.device.type == "cuda":
        choice = _probe(candidates, strategy, packs, packs_per_step, set_recompute)
    set_recompute(choice.recompute)
    return choice


def _candidates(train: TrainConfig, device_type: str, most: int, pack_length: int) -> Iterator[Choice]:
    recomputes = {"none": [False], "full": [True], "auto": [False, True]}[train.recompute]
    for recompute in recomputes:
        if train.micro_batch != "auto":
            yield Choice(train.micro_batch, recompute)
            continue
        size = max(1, min(most, MAX_TOKENS.get(device_type, MAX_TOKENS["cpu"]) // pack_length))
        while size:
            yield Choice(size, recompute)
            size //= 2


def _probe(
    candidates: list[Choice],
    strategy: Strategy,
    packs: PackedRows,
    packs_per_step: int,
    set_recompute: Callable[[bool], None],
) -> Choice:
    longest = packs.lengths().argsort()[::-1].tolist()
    strategy.module.train()
    random_state = torch.cuda.get_rng_state(strategy.device)
    try:
        for choice in candidates:
            set_recompute(choice.recompute)
            batch = collate([packs[i] for i in longest[: choice.micro_batch]])
            # Two, where a step has two: the second one's activations lie beside the first one's gradients.
            if _fits(strategy, [batch] * min(2, -(-packs_per_step // choice.micro_batch))):
                return choice
            logger.info("%s does not fit", choice)
    finally:
        strategy.discard_gradients()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(strategy.device)
        torch.cuda.set_rng_state(random_state, strategy.device)
    total = torch.cuda.get_device_properties(strategy.device).total_memory / 2**30
    raise UserError(
        "train.micro_batch",
        f"not even {candidates[-1]} fits this GPU's {total:.0f} GiB",
        fix="lower data.pack_length, quantise the base (quantization: {type: nf4}), or take optim.name: adamw_8bit",
    )


def _fits(strategy: Strategy, micro_batches: list[PackedBatch]) -> bool:
    device = strategy.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        strategy.allocate_optimizer()
        strategy.forward_backward(micro_batches, sum(batch.num_trained_tokens for batch in micro_batches))
        fits = True
    except torch.OutOfMemoryError:
        fits = False
    # Only here, not in a `finally`: while the exception lives, its frames hold the activations.
    peak = torch.cuda.max_memory_reserved(device)
    strategy.discard_gradients()
    return fits and peak <= USABLE_MEMORY * torch.cuda.get_device_properties(device).total_memory
