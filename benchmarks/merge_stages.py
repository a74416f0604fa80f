"""How fast each stage of `packtrain merge` is alone on this host: the slowest limits a merge, as they overlap.

    python benchmarks/merge_stages.py --folder /disk --out-folder /dev/shm

A merge takes several tensors through its stages at once: read from the base, hash, merge (on the GPU where there is
one), write, hash. Hashing is one tensor after the other, each by all processors; a file is written by one thread at a
time, and read, merged and copied by several. Each stage is measured in GiB/s of 16-bit weights, by one thread and by as
many as the host has processors (at most 8), on pieces of 64 MiB. The rate of a merge is at most that of the slowest
stage, and its processor seconds are those of all stages together.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from blake3 import blake3

from trainer.export.adapter import LowRank
from trainer.model.nf4 import FourBit
from trainer.model.quantized import Fingerprint

ROWS, COLUMNS, RANK = 4096, 8192, 16
PIECE = 2 * ROWS * COLUMNS
MOST_THREADS = 8
PIECES = 4  # a thread


class Bench:
    """What a thread needs of its own: a buffer, a file to write, a stream."""

    def __init__(self, source: Path, out: Path, number: int, device: torch.device) -> None:
        self.device, self.number = device, number
        self.weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(number)).mul_(0.02).bfloat16()
        if device.type == "cuda":
            self.weight = self.weight.pin_memory()
            self.stream = torch.cuda.Stream(device)
        self.bytes = self.weight.view(-1).view(torch.uint8).numpy()
        self.pair = LowRank(torch.randn(RANK, COLUMNS) * 0.02, torch.randn(ROWS, RANK) * 0.02, 1.0)
        self.source = os.open(source / f"in{number}", os.O_RDWR | os.O_CREAT)
        self.out = os.open(out / f"out{number}", os.O_RDWR | os.O_CREAT)

    def fill(self) -> None:
        """Writes the file that is read later."""
        for place in range(PIECES):
            os.pwrite(self.source, self.bytes, place * PIECE)
        os.fsync(self.source)

    def forget(self) -> None:
        """Takes it out of the page cache."""
        os.posix_fadvise(self.source, 0, 0, os.POSIX_FADV_DONTNEED)

    def read(self) -> None:
        for place in range(PIECES):
            os.preadv(self.source, [memoryview(self.bytes)], place * PIECE)

    def hash(self) -> None:
        hasher = blake3(max_threads=1)
        for _ in range(PIECES):
            hasher.update(self.bytes)

    def hash_by_all(self) -> None:
        hasher = blake3(max_threads=blake3.AUTO)
        for _ in range(PIECES):
            hasher.update(self.bytes)

    def merge(self) -> None:
        for _ in range(PIECES):
            self.pair.merge_into(self.weight, torch.bfloat16)

    def merge_on_gpu(self) -> None:
        with torch.cuda.stream(self.stream):
            for _ in range(PIECES):
                self.weight.copy_(self.pair.merge_into(self.weight.to(self.device), torch.bfloat16))

    def quantize(self) -> None:
        weight = self.weight.to(self.device)
        format = FourBit("nf4", double_quant=True)
        packed, scales = format.quantize(weight)
        Fingerprint().add(packed, scales)
        self.weight.copy_(format.dequantize(packed, scales, torch.bfloat16))

    def quantize_on_gpu(self) -> None:
        with torch.cuda.stream(self.stream):
            for _ in range(PIECES):
                self.quantize()

    def write(self) -> None:
        os.ftruncate(self.out, 0)
        for place in range(PIECES):
            os.pwrite(self.out, self.bytes, place * PIECE)

    def write_to_disk(self) -> None:
        self.write()
        os.fsync(self.out)


def main() -> None:
    """Prints a line for each stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where a base would be read from")
    parser.add_argument("--out-folder", type=Path, help="where a model would be written, if elsewhere")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = min(MOST_THREADS, len(os.sched_getaffinity(0)))
    with (
        tempfile.TemporaryDirectory(dir=arguments.folder) as source,
        tempfile.TemporaryDirectory(dir=arguments.out_folder or arguments.folder) as out,
    ):
        benches = [Bench(Path(source), Path(out), number, device) for number in range(threads)]
        for bench in benches:
            bench.fill()
        print(f"{'GiB/s':24} {'1 thread':>10} {f'{threads} threads':>10}")
        show("read from the disk", Bench.read, benches, Bench.forget)
        show("read from the page cache", Bench.read, benches)
        show("hash, 1 thread", Bench.hash, benches)
        show("hash, all processors", Bench.hash_by_all, benches[:1])
        if device.type == "cuda":
            show("merge, with copies", Bench.merge_on_gpu, benches)
            show("nf4 and back, with copies", Bench.quantize_on_gpu, benches)
        else:
            show("merge", Bench.merge, benches)
            show("nf4 and back", Bench.quantize, benches, pieces=1)
        show("write, to the page cache", Bench.write, benches)
        show("write, to the disk", Bench.write_to_disk, benches)


def show(
    name: str,
    stage: Callable[[Bench], None],
    benches: list[Bench],
    before: Callable[[Bench], None] = lambda _: None,
    pieces: int = PIECES,
) -> None:
    """The rates of a stage by the first thread alone and by all, each the better of two."""
    sizes = [1] if len(benches) == 1 else [1, len(benches)]
    rates = [max(rate(stage, benches[:size], before, pieces) for _ in range(2)) for size in sizes]
    print(f"{name:24} " + " ".join(f"{value:10.2f}" for value in rates), flush=True)


def rate(
    stage: Callable[[Bench], None], benches: list[Bench], before: Callable[[Bench], None], pieces: int = PIECES
) -> float:
    """GiB a second of all together."""
    for bench in benches:
        before(bench)
    with ThreadPoolExecutor(len(benches), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        started = time.perf_counter()
        list(pool.map(stage, benches))
        return len(benches) * pieces * PIECE / 2**30 / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
