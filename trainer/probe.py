"""`micro_batch: auto` and `recompute: auto`: measure small batches on the real model, keep the fastest size that fits.

Memory grows linearly with the tokens of a micro-batch (packed attention builds no mask), so two small batches foretell
a large one. Trying the large one instead would end in running out of memory, after which a sharded model, some of
whose processes wait in a collective, cannot go on.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from trainer.config import TrainConfig
from trainer.data.sampler import Pack, collate
from trainer.data.types import IGNORE_INDEX, PackedRows
from trainer.errors import UserError
from trainer.strategies.base import Strategy

logger = logging.getLogger(__name__)

# Larger micro-batches no longer raise an H200's rate; on a CPU they only cost memory.
MAX_TOKENS = {"cuda": 16384, "cpu": 4096}
PROBE_TOKENS = (256, 1024)
TRAINED_IN_PROBE = 128  # tokens, the same in both: the loss works in chunks of a fixed size ...
CHUNK_BYTES = 2**30  # ... whose logits, as float32 and in 16 bit, with their gradient stay below this
# Share of the GPU a step may take: fragmentation and communication buffers need the rest.
USABLE_MEMORY = 0.90


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
    packs_per_rank: int,
    pack_length: int,
    set_recompute: Callable[[bool], None],
) -> Choice:
    """The recipe's sizes where it names them, else the fastest that fit; recompute is left set as chosen.

    Without recompute comes first: a smaller micro-batch costs less than a second forward. All processes choose alike,
    by the one with the least room.

    Args:
        packs_per_rank: packs of a global batch that one process computes.

    Raises:
        UserError: not even one pack with full recompute fits.
    """
    candidates = list(_candidates(train, strategy.device.type, min(packs_per_rank, len(packs)), pack_length))
    choice = candidates[0]
    if len(candidates) > 1 and strategy.device.type == "cuda":
        choice = _probe(candidates, strategy, packs, packs_per_rank, pack_length, set_recompute)
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
    packs_per_rank: int,
    pack_length: int,
    set_recompute: Callable[[bool], None],
) -> Choice:
    total = strategy.processes.min(torch.cuda.get_device_properties(strategy.device).total_memory)
    strategy.module.train()
    strategy.allocate_optimizer()
    needed = 0.0
    for recompute, same in itertools.groupby(candidates, key=lambda choice: choice.recompute):
        set_recompute(recompute)
        small, large = (_peak(strategy, packs, tokens, packs_per_rank) for tokens in PROBE_TOKENS)
        per_token = (large - small) / (PROBE_TOKENS[1] - PROBE_TOKENS[0])
        for choice in same:
            tokens = choice.micro_batch * pack_length
            needed = large + per_token * max(0, tokens - PROBE_TOKENS[1]) + CHUNK_BYTES
            logger.info("%s: %.1f of %.0f GiB", choice, needed / 2**30, total / 2**30)
            if needed <= USABLE_MEMORY * total:
                return choice
    raise UserError(
        "train.micro_batch",
        f"{candidates[-1]} takes some {needed / 2**30:.1f} GiB, and this GPU has {total / 2**30:.1f}",
        fix="lower data.pack_length, quantise the base (quantization: {type: nf4}), cut it over more GPUs "
        "(strategy.kind: fsdp2), or take optim.name: adamw_8bit",
    )


def _peak(strategy: Strategy, packs: PackedRows, tokens: int, packs_per_rank: int) -> float:
    """Most bytes allocated on any process while `tokens` tokens a micro-batch go forward and backward."""
    device = strategy.device
    batch = collate([_cut(packs, tokens)])
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    # Two, where a step has two: the second one's activations lie beside the first one's gradients.
    strategy.forward_backward([batch] * min(2, packs_per_rank), batch.num_trained_tokens)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    strategy.discard_gradients()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return strategy.processes.max(peak)


def _cut(packs: PackedRows, tokens: int) -> Pack:
    """Documents of the data, `tokens` tokens in all, of which the first few are trained."""
    documents: Pack = []
    missing = tokens
    for index in itertools.cycle(range(len(packs))):
        for ids, _ in packs[index]:
            taken = ids[:missing]
            missing -= len(taken)
            documents.append((taken, [IGNORE_INDEX] * len(taken)))
            if not missing:
                first = documents[0][0]
                documents[0] = (first, (first[:TRAINED_IN_PROBE] + [IGNORE_INDEX] * len(first))[: len(first)])
                return documents
    raise AssertionError("packs without tokens")
