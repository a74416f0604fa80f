"""Rates and peaks of a GPU by micro-batch and level of recompute, and what the planner predicts of each.

    python benchmarks/planner.py recipes/llama2-7b-qlora.yaml --packs 4,2,1 --levels none,norms,mlp,full \
        --model.init random --model.tokenizer FOLDER --results points.jsonl
    torchrun --nproc-per-node 2 benchmarks/planner.py recipes/llama2-7b-qlora.yaml --packs 4 --strategy.kind ddp ...

The model is built once, by the steps of a real run: recipe, packed rows, model, strategy, optimizer. A cell is the mean
of some whole optimizer steps of a few micro-batches after two that are not counted: in the first kernels are compiled,
in the second the allocator asks for its memory anew. Nothing is evaluated or saved.
Dotted options go to the recipe. Each cell is a line of json, and the table at the end has the prediction's errors.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer.config import GlobalBatch
from trainer.data.prepare import load_splits
from trainer.data.recall import DataFacts
from trainer.data.sampler import collate
from trainer.launchers import read_world
from trainer.loss import PackedCausalLM
from trainer.model.load import build_model, load_weights
from trainer.model.recompute import set_computation, set_recompute
from trainer.model.tokenizer import load_tokenizer
from trainer.optim import build_optimizer
from trainer.planner import price
from trainer.planning.job import Setting
from trainer.planning.levels import read_levels
from trainer.processes import Processes, start_processes
from trainer.recipe import load_recipe, split_overrides
from trainer.sizes import describe_job
from trainer.strategies.choose import build_strategy

GIB = 2**30
NOT_COUNTED = 2
HEADS = ("packs", "recompute", "tok/s", "predicted", "error", "peak GiB", "predicted", "error")


def main() -> None:
    """Prints a line of json for each cell, then a table."""
    overrides, rest = split_overrides(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--packs", default="4,2,1", help="packs of a micro-batch, by commas")
    parser.add_argument("--levels", default="none,norms,mlp,full", help="train.recompute, by commas")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument(
        "--micro-batches", type=int, default=2, help="of a step: a second one's activations lie beside gradients"
    )
    parser.add_argument("--results", type=Path, help="append the cells to this file")
    arguments = parser.parse_args(rest)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    cells, world = [], read_world(os.environ)
    with start_processes(world, needs_group=world.world_size > 1) as processes:
        bench = Bench(arguments.recipe, overrides, processes)
        for packs in map(int, arguments.packs.split(",")):
            for level in arguments.levels.split(","):
                cells.append(bench.measure(packs, level, arguments.steps, arguments.micro_batches))
                if processes.is_first:
                    print(json.dumps(cells[-1]), flush=True)
                if processes.is_first and arguments.results:
                    with arguments.results.open("a") as results:
                        results.write(json.dumps(cells[-1]) + "\n")
    if processes.is_first:
        print_table(cells)


class Bench:
    """A recipe's model, data and optimizer on this process's device."""

    def __init__(self, recipe: Path, overrides: dict[str, str], processes: Processes) -> None:
        self.config = config = load_recipe(recipe, overrides)
        splits = load_splits(config, load_tokenizer(config.model), lambda: None)
        self.packs, facts = splits.train, DataFacts.build(splits.reports["train"])
        built = build_model(config, processes.device)
        set_computation(built.model, config, processes.device)
        self.model: Any = built.model
        root = PackedCausalLM(built.model, getattr(torch, config.compute_dtype))
        self.job = describe_job(config, built.model, processes, facts)
        self.strategy = build_strategy(config, self.job, processes, None)
        self.strategy.shard(root)
        load_weights(built, config, self.strategy.place, processes, lambda what: None, lambda: None)
        self.strategy.prepare(partial(build_optimizer, config.optim))
        root.train()

    def measure(self, packs: int, level: Any, steps: int, micro_batches: int) -> dict[str, Any]:
        """Rate of a GPU and peak of this one in a cell, and their predictions."""
        levels, processes = read_levels(level, self.job.shape.num_layers), self.strategy.processes
        set_recompute(self.model, levels)
        rows = GlobalBatch(rows=processes.world_size * micro_batches * packs)
        train = self.config.train.model_copy(update={"global_batch": rows})
        job = replace(self.job, config=self.config.model_copy(update={"train": train}))
        candidate = price(job, Setting(self.strategy.name, packs, levels))  # type: ignore[arg-type]
        cell = {
            "model": self.config.model.path,
            "method": self.config.method,
            "strategy": self.strategy.name,
            "gpus": processes.world_size,
            "attention": self.model.config._attn_implementation,
            "trained_share": round(self.job.trained_share, 3),
            "attended": round(self.job.attended),
            "packs": packs,
            "recompute": level,
            "predicted_tokens_per_second": round(candidate.step.tokens_per_second),
            "predicted_gib": round(candidate.memory.peak / GIB, 2),
        }
        try:
            return cell | self._run(packs, steps, micro_batches)
        except torch.OutOfMemoryError:
            if processes.world_size > 1:  # the others wait for this one
                raise
            self.strategy.discard_gradients()
            torch.cuda.empty_cache()
            return cell | {"out_of_memory": True}

    def _run(self, packs: int, steps: int, micro_batches: int) -> dict[str, Any]:
        processes, on_gpu = self.strategy.processes, self.strategy.device.type == "cuda"
        world_size = processes.world_size
        batches = [
            collate([self.packs[((step * world_size + processes.rank) * packs + i) % len(self.packs)]
                     for i in range(packs)])
            for step in range(NOT_COUNTED + steps)
        ]  # fmt: skip
        counts = [processes.sum(batch.num_tokens, batch.num_trained_tokens) for batch in batches]
        for number, (batch, (_, num_trained)) in enumerate(zip(batches, counts, strict=True)):
            if number == 1 and on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            if number == NOT_COUNTED:
                started = time.perf_counter()
            self.strategy.forward_backward([batch] * micro_batches, micro_batches * num_trained)
            result = self.strategy.step(1e-5, 1.0)
            if number < NOT_COUNTED or number == len(batches) - 1:
                result.grad_norm  # noqa: B018  waits for the device
        seconds, tokens = time.perf_counter() - started, micro_batches * sum(count for count, _ in counts[NOT_COUNTED:])
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0
        return {"tokens_per_second": round(tokens / seconds / world_size), "peak_gib": round(peak / GIB, 2)}


def print_table(cells: list[dict[str, Any]]) -> None:
    """Markdown."""
    print("| " + " | ".join(HEADS) + " |\n|" + "---|" * len(HEADS))
    for cell in cells:
        pairs = [("tokens_per_second", "predicted_tokens_per_second"), ("peak_gib", "predicted_gib")]
        shown = [cell["packs"], cell["recompute"]]
        for found, predicted in pairs:
            measured, expected = cell.get(found), cell[predicted]
            shown += [measured, expected, f"{expected / measured - 1:+.1%}" if measured else "-"]
        print("| " + " | ".join(map(str, shown)) + " |")


if __name__ == "__main__":
    main()
