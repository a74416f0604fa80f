"""Whole runs on two GPUs over NCCL: the same losses under every strategy, and an end when a process is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from distributed.pool import Pool
from distributed.test_bytes import train_on_patterns
from distributed.test_preflight import look, timed

from trainer.checkpoint.layout import RunDir
from trainer.config import RunConfig
from trainer.metrics.trackers import read_metrics
from trainer.processes import Processes
from trainer.recipe import load_recipe
from trainer.strategies.gathering import choose_piece

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]
ROOT = Path(__file__).parents[2]
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"adapter": {"r": 8}},
    "qlora": {"adapter": {"r": 8}, "quantization": {}},
}


@pytest.fixture
def recipe(tmp_path: Path, toy_recipe: Callable[..., RunConfig], toy_model_dir: Path) -> Callable[..., Path]:
    """A small random Llama in bfloat16, wide enough for the kernels' usual paths."""
    config = json.loads((toy_model_dir / "config.json").read_text())
    config |= {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "head_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def write(**sections: Any) -> Path:
        model = {"path": str(tmp_path), "dtype": "bfloat16", "init": "random", "tokenizer": str(toy_model_dir)}
        made = toy_recipe(model=model, **sections).model_dump(mode="json", exclude_unset=True)
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(made))
        return file

    return write


@pytest.fixture(scope="module")
def gpus() -> Iterator[Pool]:
    pool = Pool(2, on_gpus=True)
    yield pool
    pool.close()


def test_preflight_takes_a_moment_and_names_a_gpu_that_miscomputes(gpus: Pool) -> None:
    found = gpus.run(look)
    assert [one["error"] for one in found] == [None, None]
    assert "NCCL all-reduce" in found[0]["said"][0]
    assert max(gpus.run(timed)) < 2.0
    for one in gpus.run(look, "misreads", (1,)):
        assert "rank 1 on host n1: an all-reduce over NCCL of all processes gave wrong sums" in one["error"]
        assert one["blamed"] == "n1"


def start(recipe: Path, run_dir: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launch.cli", "train", str(recipe), "--run-dir", str(run_dir), *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(RunDir(run_dir).metrics) if record["kind"] == "step"]


@pytest.mark.parametrize("method", METHODS)
def test_every_strategy_finds_the_losses_of_one_gpu(recipe: Callable[..., Path], tmp_path: Path, method: str) -> None:
    train = {"max_steps": 4, "global_batch": {"rows": 3}, "micro_batch": 1}
    file = recipe(**METHODS[method], train=train, optim={"lr": 1e-4})
    found = {}
    for kind in ("single", "ddp", "fsdp2", "zero3"):
        gpus = "1" if kind == "single" else "2"
        process = start(file, tmp_path / kind, "--gpus", gpus, "--strategy.kind", kind)
        output, _ = process.communicate(timeout=180)
        assert process.returncode == 0, output
        found[kind] = losses(tmp_path / kind)
    for kind in found:
        assert found[kind] == pytest.approx(found["single"], rel=5e-4), found


@pytest.mark.parametrize("scales", ["patterns", "double quantised"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero3"])
def test_4bit_bytes_stay_as_they_were_placed(
    recipe: Callable[..., Path], gpus: Pool, tmp_path: Path, kind: str, scales: str
) -> None:
    sections = METHODS["qlora"] | {"quantization": {"double_quant": scales != "patterns"}}
    config = load_recipe(recipe(**sections, strategy={"kind": kind}))
    for found in gpus.run(train_on_patterns, config, scales, tmp_path / "run"):
        assert found["wrong"] == []
        assert found["pairs"]["packed"] == 2**16
        assert scales != "patterns" or found["pairs"]["scales"] == 2**16


def pull(processes: Processes) -> dict[str, Any]:
    """What comes of a piece whose home is a GPU that the other one reaches."""
    device, nbytes, before = processes.device, 64 * 2**20, torch.cuda.memory_allocated()
    group = dist.group.WORLD
    assert group is not None
    make_piece = choose_piece(processes, group, device, device)
    assert make_piece is not None
    piece = make_piece(nbytes)
    counted = torch.cuda.memory_allocated() - before
    piece.own.fill_(processes.rank + 1)
    torch.cuda.synchronize()
    processes.barrier()
    line = torch.empty(2 * nbytes, dtype=torch.uint8, device=device)
    piece.fill(line)
    found = [int(value) for part in line.chunk(2) for value in part.unique()]
    processes.barrier()  # nobody lets go of what the other still reads
    return {"kind": type(piece).__name__, "counted": counted >= nbytes, "found": found}


def test_pieces_are_pulled_from_the_other_gpu_and_torch_counts_them(gpus: Pool) -> None:
    assert gpus.run(pull) == [{"kind": "PulledPiece", "counted": True, "found": [1, 2]}] * 2


def test_a_run_goes_on_under_another_strategy(recipe: Callable[..., Path], tmp_path: Path) -> None:
    sections = METHODS["qlora"] | {"optim": {"lr": 1e-3, "name": "adamw"}}
    train = {"max_steps": 6, "global_batch": {"rows": 2}, "micro_batch": 1}
    file = recipe(**sections, train=train, checkpoint={"every_steps": 3})
    whole = start(file, tmp_path / "whole", "--gpus", "2", "--strategy.kind", "fsdp2")
    assert whole.communicate(timeout=180) and whole.returncode == 0
    steps = sorted((tmp_path / "whole" / "checkpoints").iterdir())
    for later in steps[1:]:
        for entry in sorted(later.rglob("*"), reverse=True):
            entry.rmdir() if entry.is_dir() else entry.unlink()
        later.rmdir()
    expected = losses(tmp_path / "whole")
    again = start(file, tmp_path / "whole", "--gpus", "1", "--strategy.kind", "single")
    output, _ = again.communicate(timeout=180)
    assert again.returncode == 0, output
    assert "resumed at step 3" in output
    assert losses(tmp_path / "whole") == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_process_ends_the_run_and_is_named(recipe: Callable[..., Path], tmp_path: Path, number: int) -> None:
    file = recipe(**METHODS["qlora"], train={"max_steps": 100_000, "global_batch": {"rows": 2}, "micro_batch": 1})
    run = RunDir(tmp_path / "run")
    process = start(file, run.path, "--gpus", "2", "--strategy.kind", "fsdp2")
    deadline = time.monotonic() + 120
    while not (run.metrics.exists() and len(losses(run.path)) > 5):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    victim = next(pid for pid in _children(process.pid) if _environ(pid).get("RANK") == "1")
    os.kill(victim, number)
    lost = time.monotonic()
    output, _ = process.communicate(timeout=90)
    assert time.monotonic() - lost < 60
    assert process.returncode == 1 and "rank 1" in output, output
    assert run.read_state()["state"] == "failed" and "rank 1" in run.read_state()["reason"]


def _children(pid: int) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, ValueError):
                continue
            if parent == pid:
                yield int(entry.name)


def _environ(pid: int) -> dict[str, str]:
    pairs = (Path("/proc") / str(pid) / "environ").read_bytes().decode(errors="replace").split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)
