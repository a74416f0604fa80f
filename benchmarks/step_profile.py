"""Where the time of an optimizer step goes on each GPU, by torch's profiler: kernels by stream, and when nothing runs.

    python benchmarks/step_profile.py recipes/llama2-7b-qlora.yaml --packs 4 --model.init random \
        --model.tokenizer FOLDER
    torchrun --nproc-per-node 4 benchmarks/step_profile.py recipes/llama2-70b-qlora.yaml --strategy.kind fsdp2 ...

The model is built and stepped as `benchmarks/planner.py` does it, and its rate without the profiler is printed first.
Each process writes ``rank_N.txt`` to `--out`; rank 0 prints its own. Dotted options go to the recipe.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from planner import Bench
from torch.profiler import ProfilerActivity, profile

from trainer.data.sampler import collate
from trainer.launchers import read_world
from trainer.processes import start_processes
from trainer.recipe import split_overrides

STEPS = 3
KINDS = ("kernel", "gpu_memcpy", "gpu_memset")
LINES = 14  # of the stream that computes; a third of them of the others
LONG = 300.0  # microseconds


@dataclass(frozen=True)
class Span:
    """Something that ran on a GPU; times in microseconds."""

    stream: int
    name: str
    begin: float
    end: float


def main() -> None:
    """Prints rank 0's profile."""
    overrides, rest = split_overrides(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--packs", type=int, default=1, help="of the step's one micro-batch")
    parser.add_argument("--level", default="none", help="train.recompute")
    parser.add_argument("--out", type=Path, default=Path("."))
    arguments = parser.parse_args(rest)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    world = read_world(os.environ)
    with start_processes(world, needs_group=world.world_size > 1) as processes:
        if processes.device.type != "cuda":
            sys.exit("step_profile.py: needs a GPU")
        bench = Bench(arguments.recipe, overrides, processes)
        cell = bench.measure(arguments.packs, arguments.level, steps=6, micro_batches=1)
        spans = run_profiled(bench, arguments.packs)
        text = json.dumps(cell) + "\n" + "\n".join(summarise(spans)) + "\n"
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / f"rank_{processes.rank}.txt").write_text(text)
        if processes.is_first:
            print(text, end="")


def run_profiled(bench: Bench, packs: int) -> list[Span]:
    """What ran on this process's GPU in `STEPS` steps."""
    strategy, processes = bench.strategy, bench.strategy.processes
    first = processes.rank * packs
    batch = collate([bench.packs[(first + index) % len(bench.packs)] for index in range(packs)])
    (num_trained,) = processes.sum(batch.num_trained_tokens)
    torch.cuda.synchronize()
    processes.barrier()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            strategy.forward_backward([batch], num_trained)
            result = strategy.step(1e-5, 1.0)
        result.grad_norm  # noqa: B018  waits for the device
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return [
        Span(event["args"]["stream"], event["name"], event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") in KINDS
    ]


def summarise(spans: list[Span]) -> list[str]:
    """Milliseconds by stream and kernel, the busiest first, and when the busiest stream had nothing to do."""
    streams: dict[int, list[Span]] = defaultdict(list)
    for span in sorted(spans, key=lambda span: span.begin):
        streams[span.stream].append(span)
    began, ended = min(span.begin for span in spans), max(span.end for span in spans)
    lines = [f"{STEPS} steps in {(ended - began) / 1e3:.1f} ms"]
    busiest, *others = sorted(streams.values(), key=lambda own: -_total(own))
    for own in (busiest, *others):
        lines.append(f"stream {own[0].stream}: {_total(own) / 1e3:.1f} ms in {len(own)}")
        by_name: dict[str, list[Span]] = defaultdict(list)
        for span in own:
            by_name[span.name[:70]].append(span)
        shown = sorted(by_name.items(), key=lambda item: -_total(item[1]))[: LINES if own is busiest else LINES // 3]
        lines += [f"  {_total(found) / 1e3:9.1f} ms {len(found):6d}  {name}" for name, found in shown]
    return lines + _idle(busiest, [span for own in others for span in own], began)


def _idle(stream: list[Span], others: list[Span], began: float) -> list[str]:
    gaps = [(before.end, after.begin, before, after) for before, after in itertools.pairwise(stream)]
    gaps = [gap for gap in gaps if gap[1] > gap[0]]
    long = sorted((gap for gap in gaps if gap[1] - gap[0] > LONG), key=lambda gap: gap[0] - gap[1])
    in_all, in_long = (sum(end - begin for begin, end, *_ in found) / 1e3 for found in (gaps, long))
    lines = [
        f"nothing runs in stream {stream[0].stream} for {in_all:.1f} ms, {in_long:.1f} of them in gaps over 0.3 ms"
    ]
    for begin, end, before, after in long[:LINES]:
        beside = {span.name[:40]: None for span in others if span.begin < end and span.end > begin}
        lines.append(
            f"  {(end - begin) / 1e3:9.1f} ms at {(begin - began) / 1e3:.0f}: {before.name[:40]} -> {after.name[:40]}"
            + (f", beside {', '.join([*beside][:3])}" if beside else "")
        )
    return lines


def _total(spans: list[Any]) -> float:
    return sum(span.end - span.begin for span in spans)


if __name__ == "__main__":
    main()
