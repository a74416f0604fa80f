"""Best-fit-decreasing packing on a histogram of lengths.

Rows of one length are alike to the packer, and so are packs of one composition. So it places counts, not rows: 4,096
lengths and some thousand compositions instead of ten million rows (arXiv:2107.02027 packs by histogram too). The result
is that of the textbook's best fit decreasing, row by row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packs:
    """Which rows lie in which pack.

    Attributes:
        rows: row indices, pack after pack, int64 ``[rows]``.
        offsets: pack i holds ``rows[offsets[i]:offsets[i + 1]]``, int64 ``[packs + 1]``.
    """

    rows: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1


@dataclass
class _Group:
    """`count` packs of one composition: ``(length, number of rows of that length)``, longest first."""

    count: int
    content: tuple[tuple[int, int], ...]


def pack_sequences(lengths: np.ndarray, pack_length: int) -> Packs:
    """Packs rows so that no pack is longer than `pack_length`: longest first, each where least room is left over.

    Args:
        lengths: tokens of each row, ``[rows]``, from 1 to `pack_length`.

    Returns:
        Every row in exactly one pack; a function of the lengths alone.
    """
    lengths = np.asarray(lengths)
    if len(lengths) == 0:
        return Packs(np.zeros(0, np.int64), np.zeros(1, np.int64))
    assert lengths.min() >= 1 and lengths.max() <= pack_length
    counts = np.bincount(lengths, minlength=pack_length + 1)
    return _deal_rows(lengths, counts, _place_lengths(counts, pack_length))


def keep_apart(num_rows: int) -> Packs:
    """One row a pack, in order."""
    return Packs(np.arange(num_rows), np.arange(num_rows + 1))


def _place_lengths(counts: np.ndarray, pack_length: int) -> list[_Group]:
    """Best fit decreasing over counts of lengths."""
    by_room: list[list[_Group]] = [[] for _ in range(pack_length + 1)]
    open_rooms = 0  # bit r is set where by_room[r] has groups
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            fitting = open_rooms >> length
            if not fitting:
                group, room = _Group(left, ()), pack_length
            else:
                room = length + (fitting & -fitting).bit_length() - 1
                group = by_room[room].pop()
                if not by_room[room]:
                    open_rooms ^= 1 << room
            # Best fit puts rows of one length into a pack until it is full, for no other pack has less room that fits.
            each = room // length
            full = min(left // each, group.count)
            rest = left - full * each if full < group.count and left < group.count * each else 0
            parts = [(full, each), (1, rest)] if rest else [(full, each)]
            used = full + (1 if rest else 0)
            for number, rows in parts:
                if number:
                    open_rooms |= 1 << (room - rows * length)
                    by_room[room - rows * length].append(_Group(number, (*group.content, (length, rows))))
            if fitting and group.count > used:
                open_rooms |= 1 << room
                by_room[room].append(_Group(group.count - used, group.content))
            left -= full * each + rest
    return [group for groups in by_room for group in groups]


def _deal_rows(lengths: np.ndarray, counts: np.ndarray, groups: list[_Group]) -> Packs:
    """Gives the places of each length to the rows of that length, in order."""
    small = lengths.astype(np.uint16) if len(counts) <= 1 << 16 else lengths  # numpy sorts 16 bits by radix
    by_length = np.argsort(small, kind="stable")
    taken = np.concatenate([[0], np.cumsum(counts)[:-1]])
    rows, sizes = [], []
    for group in groups:
        columns = []
        for length, number in group.content:
            first = taken[length]
            taken[length] = last = first + group.count * number
            columns.append(by_length[first:last].reshape(group.count, number))
        table = np.concatenate(columns, axis=1)
        rows.append(table.ravel())
        sizes.append(np.full(group.count, table.shape[1], np.int64))
    return Packs(np.concatenate(rows), np.concatenate([[0], np.cumsum(np.concatenate(sizes))]))
