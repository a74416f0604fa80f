"""Time and fill of packing millions of rows on one core.

    python benchmarks/packing.py --rows 10000000
    python benchmarks/packing.py --rows 10000000 --lengths lengths.txt

Lengths are drawn from a log-normal distribution (median 200 tokens), or resampled from a file: one number a line, or
the output of ``packtrain preprocess RECIPE --json``. numpy sorts and counts on one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from trainer.data.packing import pack_sequences


def main() -> None:
    """Prints one line of json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--pack-length", type=int, default=4096)
    parser.add_argument("--lengths", type=Path, help="file of lengths to resample from")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    lengths = draw_lengths(arguments.lengths, arguments.rows, arguments.pack_length, arguments.seed)
    start = time.perf_counter()
    packs = pack_sequences(lengths, arguments.pack_length)
    seconds = time.perf_counter() - start
    fill = int(lengths.sum()) / (len(packs) * arguments.pack_length)
    print(json.dumps({"rows": len(lengths), "packs": len(packs), "fill": round(fill, 6), "seconds": round(seconds, 3)}))


def draw_lengths(path: Path | None, rows: int, pack_length: int, seed: int) -> np.ndarray:
    """Lengths of `rows` rows, from 1 to `pack_length`."""
    random = np.random.default_rng(seed)
    if path is None:
        drawn = random.lognormal(np.log(200), 0.9, rows)
    else:
        drawn = random.choice(np.array(read_lengths(path)), rows)
    return np.clip(drawn, 1, pack_length).astype(np.int64)


def read_lengths(path: Path) -> list[int]:
    """Numbers, or numbers of ids of json rows."""
    values = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return [
        value if isinstance(value, int) else len(value["ids"]) for value in values if "summary" not in str(value)[:12]
    ]


if __name__ == "__main__":
    main()
