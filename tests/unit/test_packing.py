"""Packing: every row once, no pack too long, and the very packs of the textbook's best fit decreasing."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer.data.packing import Packs, keep_apart, pack_sequences

PACK_LENGTH = 24
lengths_of_rows = st.lists(st.integers(1, PACK_LENGTH), max_size=80)


def loads(packs: Packs, lengths: list[int]) -> list[int]:
    bounds = packs.offsets.tolist()
    return [sum(lengths[row] for row in packs.rows[a:b]) for a, b in pairwise(bounds)]


def best_fit_decreasing(lengths: list[int], pack_length: int) -> list[int]:
    """Loads of the packs of the algorithm as books have it, row by row."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(room, i) for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting)[1]] -= length
        else:
            rooms.append(pack_length - length)
    return [pack_length - room for room in rooms]


def first_fit_decreasing(lengths: list[int], pack_length: int) -> int:
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        i = next((i for i, room in enumerate(rooms) if room >= length), None)
        if i is None:
            rooms.append(pack_length - length)
        else:
            rooms[i] -= length
    return len(rooms)


@given(lengths_of_rows)
@example([])
@example([PACK_LENGTH] * 3)
@example([13] * 5)
@settings(max_examples=300, deadline=None)
def test_packs_are_those_of_best_fit_decreasing(lengths: list[int]) -> None:
    packs = pack_sequences(np.array(lengths, dtype=np.int64), PACK_LENGTH)
    assert sorted(packs.rows.tolist()) == list(range(len(lengths))), "every row lies in exactly one pack"
    assert packs.offsets[0] == 0 and packs.offsets[-1] == len(lengths)
    assert all(np.diff(packs.offsets) > 0), "no pack is empty"
    filled = loads(packs, lengths)
    assert all(load <= PACK_LENGTH for load in filled)
    assert sorted(filled) == sorted(best_fit_decreasing(lengths, PACK_LENGTH))


@given(st.lists(st.integers(1, 4096), min_size=1, max_size=300))
@settings(max_examples=50, deadline=None)
def test_packs_are_a_function_of_lengths(lengths: list[int]) -> None:
    once, again = (pack_sequences(np.array(lengths, dtype), 4096) for dtype in (np.int64, np.int32))
    assert once.rows.tolist() == again.rows.tolist() and once.offsets.tolist() == again.offsets.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_real_looking_lengths_fill_packs_as_well_as_first_fit(seed: int) -> None:
    lengths = np.clip(np.random.default_rng(seed).lognormal(5.3, 0.9, 3000), 1, 4096).astype(np.int64)
    packs = pack_sequences(lengths, 4096)
    assert len(packs) <= first_fit_decreasing(lengths.tolist(), 4096)
    assert lengths.sum() / (len(packs) * 4096) > 0.995


def test_pack_lengths_beyond_16_bits() -> None:
    lengths = [70_000, 1, 65_536, 60_000, 30_001]
    packs = pack_sequences(np.array(lengths), 100_000)
    assert sorted(loads(packs, lengths)) == sorted(best_fit_decreasing(lengths, 100_000))


def test_keep_apart_is_one_row_a_pack_in_order() -> None:
    packs = keep_apart(3)
    assert len(packs) == 3 and packs.rows.tolist() == [0, 1, 2] and packs.offsets.tolist() == [0, 1, 2, 3]
