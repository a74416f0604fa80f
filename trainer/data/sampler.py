"""Which packs a step trains on, and how packs become one batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from trainer.data.types import IGNORE_INDEX, PackedBatch

Pack = list[tuple[list[int], list[int]]]
NOTHING = ([0] * 8, [IGNORE_INDEX] * 8)
# What a token costs beside its attention, in pairs of tokens: 8 to 12 hidden sizes of a Llama, whose attention has
# 2 * hidden FLOPs a pair and layer and whose matrices have some 24 * hidden**2 a token (`metrics.meters`).
TOKEN_COST = 65536
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def sample_order(num_packs: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of ``range(num_packs)`` of an epoch, int64 ``[num_packs]``.

    Sorts SplitMix64 hashes of the indices (https://prng.di.unimi.it/splitmix64.c) and not numpy's generators, whose
    streams may change with numpy's version: a resumed run must see the same order.
    """
    start = _mix_number((_mix_number(seed & _MASK) + epoch) & _MASK)
    counter = np.arange(1, num_packs + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(start)
    return np.argsort(_mix(counter), kind="stable")


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _mix_number(value: int) -> int:
    return int(_mix(np.array([(value + _GOLDEN) & _MASK], dtype=np.uint64))[0])


class GlobalBatchSampler:
    """The packs of every optimizer step, as a function of seed and global sample index alone.

    Sample i of the run is at position ``i % num_packs`` of epoch ``i // num_packs``'s permutation; step s takes samples
    ``[s * packs_per_step, (s + 1) * packs_per_step)``. The last step may be short.

    Attributes:
        num_steps: steps in `epochs` passes.
    """

    def __init__(self, num_packs: int, packs_per_step: int, epochs: float, seed: int) -> None:
        self.num_packs = num_packs
        self.packs_per_step = packs_per_step
        self.seed = seed
        self.num_samples = max(1, round(epochs * num_packs))
        self.num_steps = math.ceil(self.num_samples / packs_per_step)
        self._order = lru_cache(maxsize=2)(lambda epoch: sample_order(num_packs, seed, epoch))

    def samples(self, step: int) -> range:
        """Global sample indices of `step`, counted from 0.

        Raises:
            IndexError: there is no such step.
        """
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        first = step * self.packs_per_step
        return range(first, min(first + self.packs_per_step, self.num_samples))

    def pack(self, sample: int) -> int:
        """Index of the pack that is the run's sample `sample`."""
        return int(self._order(sample // self.num_packs)[sample % self.num_packs])

    def batch(self, step: int) -> list[int]:
        """Pack indices of `step`, counted from 0."""
        return [self.pack(sample) for sample in self.samples(step)]

    def noise_seed(self, sample: int) -> int:
        """Seed of the dropout in the micro-batch that begins with `sample`, whichever process computes it, and when."""
        return _mix_number((_mix_number(self.seed & _MASK) + sample) & _MASK) >> 1


def document_cost(lengths: np.ndarray) -> np.ndarray:
    """Work of documents of so many tokens, in attention's per pair of tokens; int64, of `lengths`' shape.

    A pack's is the sum over its documents: attention's part grows with the squares of their lengths, the rest with the
    tokens.
    """
    lengths = np.asarray(lengths, np.int64)
    return lengths * (lengths + TOKEN_COST)


def deal(samples: Sequence[int], costs: np.ndarray, rank: int, world_size: int, micro_batch: int) -> list[list[int]]:
    """This process's micro-batches of a global batch, dealt so that those computed at one time cost alike.

    Processes that share a model's layers wait for one another in each, so a round of micro-batches lasts as long as its
    dearest. Dearest first, each turn gives a pack to every process; packs of a turn are neighbours by cost, and the
    dearest goes to whom the round, then the step, has cost least so far.

    Args:
        costs: of `samples`, ``[samples]``; see `document_cost`.

    Returns:
        Lists of samples, as many on every process, of at most `micro_batch`; where the samples do not suffice some are
        short or empty (see `collate`).
    """
    if world_size == 1:  # nobody waits
        return [list(samples[start : start + micro_batch]) for start in range(0, len(samples), micro_batch)]
    dearest_first = np.argsort(-np.asarray(costs), kind="stable")
    step_so_far, round_so_far = np.zeros(world_size), np.zeros(world_size)
    own: list[list[int]] = []
    for turn, start in enumerate(range(0, len(samples), world_size)):
        if turn % micro_batch == 0:
            own.append([])
            round_so_far[:] = 0
        dealt = dearest_first[start : start + world_size]
        ranks = np.lexsort((step_so_far, round_so_far))[: len(dealt)]  # the last key counts first
        for so_far in (round_so_far, step_so_far):
            so_far[ranks] += costs[dealt]
        own[-1] += [samples[index] for index in dealt[ranks == rank]]
    return own


def collate(packs: Sequence[Pack], seed: int = 0) -> PackedBatch:
    """Lays the documents of `packs` end to end; tensors on the CPU, pinned where there is a GPU to copy them to.

    No packs make a few tokens of which none is trained: a process that has no sample left computes along.

    Args:
        seed: of the random numbers drawn while computing the batch.
    """
    import torch

    documents = [document for pack in packs for document in pack] or [NOTHING]
    lengths = np.array([len(ids) for ids, _ in documents], dtype=np.int64)
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    input_ids = np.fromiter((token for ids, _ in documents for token in ids), np.int64, count=cu_seqlens[-1])
    labels = np.fromiter((label for _, labels in documents for label in labels), np.int64, count=cu_seqlens[-1])
    labels[cu_seqlens[:-1]] = IGNORE_INDEX  # nothing before a document predicts its first token
    position_ids = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
    trained_positions = np.flatnonzero(labels[1:] != IGNORE_INDEX)

    def tensor(array: np.ndarray) -> torch.Tensor:
        made = torch.from_numpy(array)
        return made.pin_memory() if torch.cuda.is_available() else made

    return PackedBatch(
        input_ids=tensor(input_ids[None]),
        labels=tensor(labels[None]),
        position_ids=tensor(position_ids[None]),
        cu_seqlens=tensor(cu_seqlens.astype(np.int32)),
        max_seqlen=int(lengths.max(initial=0)),
        trained_positions=tensor(trained_positions),
        seed=seed,
    )
