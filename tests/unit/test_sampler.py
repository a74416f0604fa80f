"""Sample order and collation: the same samples in the same order on every machine, and nothing crosses documents."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.packing import pack_sequences
from trainer.data.sampler import GlobalBatchSampler, collate, deal, document_cost, sample_order
from trainer.data.types import IGNORE_INDEX

PINNED = ([6, 2, 5, 7, 0, 9, 4, 3, 8, 1], [8, 0, 3, 7, 1, 4, 2, 9, 6, 5])


def test_order_is_written_down() -> None:
    """A run resumed years later, on another numpy, must go on with the samples of this order."""
    assert sample_order(10, seed=42, epoch=0).tolist() == PINNED[0]
    assert sample_order(10, seed=42, epoch=1).tolist() == PINNED[1]


@given(st.integers(0, 500), st.integers(-(2**63), 2**63), st.integers(0, 50))
@settings(max_examples=100, deadline=None)
def test_order_is_a_permutation_of_its_own(num_packs: int, seed: int, epoch: int) -> None:
    order = sample_order(num_packs, seed, epoch)
    assert sorted(order.tolist()) == list(range(num_packs))
    if num_packs > 50:
        assert order.tolist() != list(range(num_packs))
        assert order.tolist() != sample_order(num_packs, seed, epoch + 1).tolist()
        assert order.tolist() != sample_order(num_packs, seed + 1, epoch).tolist()


@given(st.integers(1, 60), st.integers(1, 20), st.floats(0.1, 4), st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_steps_take_every_sample_once_an_epoch(num_packs: int, packs_per_step: int, epochs: float, seed: int) -> None:
    sampler = GlobalBatchSampler(num_packs, packs_per_step, epochs, seed)
    batches = [sampler.batch(step) for step in range(sampler.num_steps)]
    assert all(len(batch) == packs_per_step for batch in batches[:-1]) and 1 <= len(batches[-1]) <= packs_per_step
    samples = [pack for batch in batches for pack in batch]
    assert len(samples) == max(1, round(epochs * num_packs))
    for start in range(0, len(samples) - num_packs + 1, num_packs):
        assert sorted(samples[start : start + num_packs]) == list(range(num_packs))
    counts = np.bincount(samples, minlength=num_packs)
    assert counts.max() - counts.min() <= 1


def test_a_step_does_not_depend_on_the_steps_before() -> None:
    asked_in_order = GlobalBatchSampler(7, 3, 3, seed=1)
    batches = [asked_in_order.batch(step) for step in range(7)]
    resumed = GlobalBatchSampler(7, 3, 3, seed=1)
    assert [resumed.batch(step) for step in reversed(range(7))] == batches[::-1]


def test_there_is_no_step_beyond_the_last() -> None:
    sampler = GlobalBatchSampler(5, 2, 1, seed=0)
    assert sampler.num_steps == 3
    for step in (3, -1):
        with pytest.raises(IndexError):
            sampler.batch(step)


def deal_to_all(costs: np.ndarray, world_size: int, micro_batch: int) -> list[list[list[int]]]:
    """Micro-batches of samples ``0, 1, ...`` by rank."""
    return [deal(range(len(costs)), costs, rank, world_size, micro_batch) for rank in range(world_size)]


costs_of_a_step = st.lists(st.integers(1, 2**30), min_size=1, max_size=70).map(np.array)


@given(costs_of_a_step, st.integers(1, 9), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_every_rank_gets_as_many_micro_batches_and_every_sample_goes_once(
    costs: np.ndarray, world_size: int, micro_batch: int
) -> None:
    dealt = deal_to_all(costs, world_size, micro_batch)
    assert {len(batches) for batches in dealt} == {-(-len(costs) // (world_size * micro_batch))}
    assert sorted(s for batches in dealt for batch in batches for s in batch) == list(range(len(costs)))
    sizes = [sum(map(len, batches)) for batches in dealt]
    assert max(sizes) - min(sizes) <= 1, "no rank waits for more than one pack of another"
    assert all(len(batch) <= micro_batch for batches in dealt for batch in batches)


def round_costs(dealt: list[list[list[int]]], costs: np.ndarray) -> np.ndarray:
    """Of each rank's micro-batch in each round, ``[rounds, ranks]``."""
    return np.array([[costs[batch].sum() for batch in of_round] for of_round in zip(*dealt, strict=True)])


@given(costs_of_a_step, st.integers(2, 9))
@settings(max_examples=200, deadline=None)
def test_rounds_of_single_packs_last_as_short_as_they_can(costs: np.ndarray, world_size: int) -> None:
    """No other way to deal has a smaller sum of the rounds' dearest packs than groups of neighbours by cost."""
    rounds = round_costs(deal_to_all(costs, world_size, 1), costs)
    assert rounds.max(axis=1).sum() == np.sort(costs)[::-1][::world_size].sum()


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("micro_batch", [2, 4])
def test_steps_of_packed_rows_wait_less_than_in_stripes(world_size: int, micro_batch: int) -> None:
    """Taken together; a single step may happen to lie well in stripes."""
    waited = np.zeros(2)
    for seed in range(12):
        lengths = np.clip(np.random.default_rng(seed).lognormal(np.log(200), 0.9, 4000), 1, 2048).astype(np.int64)
        packs = pack_sequences(lengths, 2048)
        every_cost = np.add.reduceat(document_cost(lengths)[packs.rows], packs.offsets[:-1])
        costs = every_cost[sample_order(len(packs), seed, 0)][: world_size * micro_batch * 3]
        stripes = [list(range(rank, len(costs), world_size)) for rank in range(world_size)]
        striped = [[own[at : at + micro_batch] for at in range(0, len(own), micro_batch)] for own in stripes]
        dealt = deal_to_all(costs, world_size, micro_batch)
        least = costs.sum() / world_size  # where nobody waits
        waited += [round_costs(way, costs).max(axis=1).sum() - least for way in (dealt, striped)]
        totals = round_costs(dealt, costs).sum(axis=0)
        assert totals.max() - totals.min() <= costs.max(), "nor does a rank have more to do in a whole step"
    assert waited[0] < 0.7 * waited[1]


def test_packs_that_cost_alike_are_dealt_in_turn() -> None:
    assert deal_to_all(np.full(7, 5), 3, 2) == [[[0, 3], [6]], [[1, 4], []], [[2, 5], []]]


def test_one_process_takes_the_samples_as_they_come() -> None:
    assert deal(range(10, 15), np.arange(5), 0, 1, 2) == [[10, 11], [12, 13], [14]]


def test_noise_is_of_the_sample_and_the_run_not_of_the_process() -> None:
    sampler, other = GlobalBatchSampler(9, 2, 1, seed=1), GlobalBatchSampler(9, 2, 1, seed=2)
    seeds = [sampler.noise_seed(sample) for sample in range(100)]
    assert len({*seeds, *(other.noise_seed(sample) for sample in range(100))}) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_process_without_samples_computes_along_and_trains_nothing() -> None:
    batch = collate([], seed=3)
    assert batch.num_trained_tokens == 0 and batch.num_tokens > 0 and batch.seed == 3


def test_collate_lays_documents_end_to_end() -> None:
    packs = [[([5, 6, 7], [IGNORE_INDEX, 6, 7]), ([8], [8])], [([9, 10], [9, 10])]]
    batch = collate(packs)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert batch.max_seqlen == 3
    x = IGNORE_INDEX
    assert batch.labels.tolist() == [[x, 6, 7, x, x, 10]], "a document's first token is never predicted"
    assert batch.trained_positions.tolist() == [0, 1, 4]
    assert (batch.num_tokens, batch.num_trained_tokens) == (6, 3)
    assert {str(t.dtype) for t in (batch.input_ids, batch.labels, batch.position_ids)} == {"torch.int64"}
    assert str(batch.cu_seqlens.dtype) == "torch.int32"


documents = st.lists(
    st.integers(1, 9).flatmap(
        lambda n: st.tuples(
            st.lists(st.integers(0, 99), min_size=n, max_size=n),
            st.lists(st.sampled_from([-100, 1]), min_size=n, max_size=n),
        )
    ),
    min_size=1,
    max_size=6,
)


@given(st.lists(documents, min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_positions_predict_trained_tokens_of_their_own_document(packs: list) -> None:
    batch = collate(packs)
    flat = [document for pack in packs for document in pack]
    expected, start = [], 0
    for ids, labels in flat:
        expected += [start + t for t in range(len(ids) - 1) if labels[t + 1] != IGNORE_INDEX]
        start += len(ids)
    assert batch.trained_positions.tolist() == expected
    assert batch.input_ids[0].tolist() == [token for ids, _ in flat for token in ids]
