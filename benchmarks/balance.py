"""How long processes wait for each other because packs of one size differ in attention: dealt by cost, and in stripes.

    packtrain preprocess RECIPE --json > lengths.txt
    python benchmarks/balance.py --lengths lengths.txt --pack-length 16384 --ranks 8

Rows are packed, put into the order they are trained in, and cut into steps. A round is what all ranks compute at one
time; it lasts as long as its dearest micro-batch, so the figure is the sum over rounds of the largest cost, over the
sum of the mean costs: 1 is even. Printed of attention alone (sum of squared lengths), and of all work
(`document_cost`). In stripes every ``ranks``-th pack is a rank's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from packing import draw_lengths

from trainer.data.packing import pack_sequences
from trainer.data.sampler import GlobalBatchSampler, deal, document_cost

Deal = Callable[[np.ndarray, int, int, int], list[list[int]]]


def main() -> None:
    """Prints one line of json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--pack-length", type=int, default=4096)
    parser.add_argument("--lengths", type=Path, help="file of lengths to resample from, as packing.py takes")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=1, help="packs in one forward")
    parser.add_argument("--rounds", type=int, default=4, help="micro-batches of a rank in a step")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    lengths = draw_lengths(arguments.lengths, arguments.rows, arguments.pack_length, arguments.seed)
    packs = pack_sequences(lengths, arguments.pack_length)
    of_rows = {"attention": lengths**2, "work": document_cost(lengths)}
    of_packs = {what: np.add.reduceat(costs[packs.rows], packs.offsets[:-1]) for what, costs in of_rows.items()}
    ranks, micro_batch = arguments.ranks, arguments.micro_batch
    per_step = ranks * micro_batch * arguments.rounds
    order = GlobalBatchSampler(len(packs), per_step, 1, arguments.seed)
    steps = [np.array(order.batch(step)) for step in range(len(packs) // per_step)]  # full ones
    figures = {"packs": len(packs), "pack_length": arguments.pack_length, "ranks": ranks}
    figures |= {"micro_batch": micro_batch, "rounds": arguments.rounds}
    for name, way in (("striped", deal_in_stripes), ("dealt", deal_by_cost)):
        rounds = [part for step in steps for part in deal_step(way, step, of_packs["work"][step], ranks, micro_batch)]
        for what, costs in of_packs.items():
            found = np.array([[costs[batch].sum() for batch in of_round] for of_round in rounds])
            figures[f"{name}_{what}"] = round(float(found.max(axis=1).sum() / found.mean(axis=1).sum()), 4)
    print(json.dumps(figures))


def deal_step(way: Deal, step: np.ndarray, costs: np.ndarray, ranks: int, micro_batch: int) -> list[list[np.ndarray]]:
    """The packs of a step by round and rank."""
    dealt = [way(costs, rank, ranks, micro_batch) for rank in range(ranks)]
    return [[step[batch] for batch in of_round] for of_round in zip(*dealt, strict=True)]


def deal_by_cost(costs: np.ndarray, rank: int, ranks: int, micro_batch: int) -> list[list[int]]:
    """As training does."""
    return deal(range(len(costs)), costs, rank, ranks, micro_batch)


def deal_in_stripes(costs: np.ndarray, rank: int, ranks: int, micro_batch: int) -> list[list[int]]:
    """Every ``ranks``-th, blind to the cost."""
    own = list(range(rank, len(costs), ranks))
    return [own[at : at + micro_batch] for at in range(0, len(own), micro_batch)]


if __name__ == "__main__":
    main()
