"""Rates and peaks of one GPU by micro-batch and level of recompute, and what the planner predicts of each.

    python benchmarks/planner.py recipes/llama2-7b-qlora.yaml --packs 4,2,1 --levels none,norms,mlp,full \
        --model.init random --model.tokenizer FOLDER --results points.jsonl

The model is built once, by the steps of a real run: recipe, packed rows, model, strategy, optimizer. A cell is the mean
of some whole optimizer steps of two micro-batches after one that is not counted; nothing is evaluated or saved. Dotted
options go to the recipe. Each cell is a line of json, and the table at the end has the prediction's errors.
"""

from __future__ import annotations

import argparse
import json
import logging
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
from trainer.launchers import World
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
MICRO_BATCHES = 2  # of a step: the second one's activations lie beside the first one's gradients
HEADS = ("packs", "recompute", "tok/s", "predicted", "error", "peak GiB", "predicted", "error")


def main() -> None:
    """Prints a line of json for each cell, then a table."""
    overrides, rest = split_overrides(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--packs", default="4,2,1", help="packs of a micro-batch, by commas")
    parser.add_argument("--levels", default="none,norms,mlp,full", help="train.recompute, by commas")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--results", type=Path, help="append the cells to this file")
    arguments = parser.parse_args(rest)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    cells = []
    with start_processes(World(), needs_group=False) as processes:
        bench = Bench(arguments.recipe, overrides, processes)
        for packs in map(int, arguments.packs.split(",")):
            for level in arguments.levels.split(","):
                cells.append(bench.measure(packs, level, arguments.steps))
                print(json.dumps(cells[-1]), flush=True)
                if arguments.results:
                    with arguments.results.open("a") as results:
                        results.write(json.dumps(cells[-1]) + "\n")
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

    def measure(self, packs: int, level: Any, steps: int) -> dict[str, Any]:
        """Rate and peak of a cell, and their predictions."""
        levels = read_levels(level, self.job.shape.num_layers)
        set_recompute(self.model, levels)
        train = self.config.train.model_copy(update={"global_batch": GlobalBatch(rows=MICRO_BATCHES * packs)})
        job = replace(self.job, config=self.config.model_copy(update={"train": train}))
        candidate = price(job, Setting("single", packs, levels))
        cell = {
            "model": self.config.model.path,
            "method": self.config.method,
            "attention": self.model.config._attn_implementation,
            "trained_share": round(self.job.trained_share, 3),
            "attended": round(self.job.attended),
            "packs": packs,
            "recompute": level,
            "predicted_tokens_per_second": round(candidate.step.tokens_per_second),
            "predicted_gib": round(candidate.memory.peak / GIB, 2),
        }
        try:
            return cell | self._run(packs, steps)
        except torch.OutOfMemoryError:
            self.strategy.discard_gradients()
            torch.cuda.empty_cache()
            return cell | {"out_of_memory": True}

    def _run(self, packs: int, steps: int) -> dict[str, Any]:
        on_gpu = self.strategy.device.type == "cuda"
        batches = [
            collate([self.packs[(step * packs + i) % len(self.packs)] for i in range(packs)])
            for step in range(steps + 1)
        ]
        for number, batch in enumerate(batches):
            if number == 1:
                if on_gpu:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                started = time.perf_counter()
            self.strategy.forward_backward([batch] * MICRO_BATCHES, MICRO_BATCHES * batch.num_trained_tokens)
            self.strategy.step(1e-5, 1.0)  # waits for the device
        seconds, tokens = time.perf_counter() - started, MICRO_BATCHES * sum(b.num_tokens for b in batches[1:])
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0
        return {"tokens_per_second": round(tokens / seconds), "peak_gib": round(peak / GIB, 2)}


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
