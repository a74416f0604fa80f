"""A GPU's memory runs out on one of two ranks, the other waiting in a collective: the next start takes leaner sizes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distributed.pool import Started
from trainer.checkpoint.layout import RunDir, read_manifest

PACK_LENGTH = 128
RECIPE: dict[str, Any] = {
    "adapter": {"r": 4},
    "data": {"pack_length": PACK_LENGTH},
    "train": {"max_steps": 2, "global_batch": {"rows": 8}, "micro_batch": "auto", "recompute": "none"},
}


def run_out_of_memory(rank: int) -> None:
    """Rank 1 holds two packs in a forward."""
    from trainer.data.types import PackedBatch
    from trainer.loss import PackedCausalLM

    forward = PackedCausalLM.forward

    def limited(self: PackedCausalLM, batch: PackedBatch) -> torch.Tensor:
        loss = forward(self, batch)
        if rank == 1 and self.training and batch.num_tokens > 2 * PACK_LENGTH:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return loss

    PackedCausalLM.forward = limited  # type: ignore[method-assign]


def start(arguments: list[str], folder: Path) -> tuple[list[int | None], str]:
    started = Started(2, arguments, folder, run_out_of_memory)
    try:
        return started.wait(90.0), started.said()
    finally:
        started.kill()


def test_the_next_start_goes_on_with_leaner_sizes(toy_recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    arguments = [str(toy_recipe_file(**RECIPE, strategy={"kind": "fsdp2"})), "--run-dir", str(run.path)]
    statuses, said = start(arguments, tmp_path)
    assert statuses == [75, 75] and "rank 1 on host" in said
    text = re.search(r"out of memory with (.*): predicted .*; the next start takes (.*)", said)
    state = run.read_state()
    assert text and state["state"] == "preempted" and text[0] in state["reason"]
    statuses, said = start(arguments, tmp_path)
    assert statuses == [0, 0] and f"memory ran out with {text[1]}: takes less" in said
    assert run.read_state()["state"] == "done"
    assert read_manifest(run.step_dir(2))["progress"]["micro_batch"] <= 2
