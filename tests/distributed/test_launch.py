"""Whole runs under every launcher: the same losses as one process, one voice, and an end that tells the truth."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from distributed.runs import largest_relative_error

ROOT = Path(__file__).parents[2]
WAIT = 240.0  # seconds for a run; it takes some 15 on a machine that has nothing else to do
BIN = Path(sys.executable).parent
ALONE = [sys.executable, "-m", "launch.cli", "train"]
TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "trainer"]
FULL = {"adapter": None, "quantization": None}
ACCELERATE: dict[str, dict[str, Any]] = {  # accelerate's config files
    "plain": {"distributed_type": "MULTI_GPU"},
    "fsdp": {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, "fsdp_reshard_after_forward": True}},
    "zero3": {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3, "zero3_init_flag": True}},
}


@dataclass
class Run:
    """What a launcher's run left behind."""

    path: Path
    status: int
    output: str

    @property
    def losses(self) -> list[float]:
        records = map(json.loads, (self.path / "metrics.jsonl").read_text().splitlines())
        return [record["loss"] for record in records if record["kind"] == "step"]

    @property
    def state(self) -> dict[str, Any]:
        return json.loads((self.path / "state.json").read_text())

    @property
    def strategy(self) -> dict[str, Any]:
        return yaml.safe_load((self.path / "recipe.yaml").read_text())["strategy"]

    @property
    def logs(self) -> set[str]:
        return {file.name for file in (self.path / "logs").glob("*.log")}


def start(command: list[str], recipe: Path, run_dir: Path, *options: str) -> subprocess.Popen[str]:
    """The launcher in a session of its own, on the CPU; Ctrl-C reaches it, even if these tests run under nohup."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_", "SLURM_"))}
    return subprocess.Popen(
        [*command, str(recipe), "--run-dir", str(run_dir), *options],
        cwd=ROOT,
        env={**own, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen[str], run_dir: Path) -> Run:
    try:
        output, _ = process.communicate(timeout=WAIT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return Run(run_dir, process.returncode, output)


def launch(command: list[str], recipe: Path, run_dir: Path, *options: str) -> Run:
    return finish(start(command, recipe, run_dir, *options), run_dir)


def accelerate(config: dict[str, Any], folder: Path, num_processes: int = 2) -> list[str]:
    """The launcher with a config file of its own."""
    common = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "machine_rank": 0, "use_cpu": False}
    path = folder / "accelerate.yaml"
    path.write_text(yaml.safe_dump({**common, "num_processes": num_processes, "mixed_precision": "no", **config}))
    command = [str(BIN / "accelerate"), "launch", "--config_file", str(path), "--main_process_port", "0"]
    return [*command, "-m", "trainer"]


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Run]:
    """The run of `recipe` that one process makes; once for all launchers."""
    runs: list[Run] = []

    def run(recipe: Path) -> Run:
        if not runs:
            runs.append(launch(ALONE, recipe, tmp_path_factory.mktemp("alone") / "run"))
        return runs[0]

    return run


@pytest.fixture
def recipe(toy_recipe_file: Callable[..., Path]) -> Path:
    return toy_recipe_file(**FULL)


def check_equal(run: Run, reference: Run) -> None:
    """Trained to the end, to the same losses; rank 0 alone spoke, every rank has its log."""
    assert run.status == 0, run.output
    assert run.state["state"] == "done"
    assert largest_relative_error(run.losses, reference.losses) < 1e-5
    assert run.output.count("step 1/4 ") == 1
    assert "on 2 processes" in run.output
    assert {"rank_0.log", "rank_1.log"} <= run.logs


def test_packtrain_train(recipe: Path, tmp_path: Path, of_one_process: Callable[[Path], Run]) -> None:
    run = launch([*ALONE, "--gpus", "2"], recipe, tmp_path / "run", "--train.log_every", "1")
    check_equal(run, of_one_process(recipe))
    assert "ddp on 2 processes on the CPU, as a rehearsal" in run.output
    assert "step 1/4" not in (tmp_path / "run" / "logs" / "rank_1.out").read_text()


def test_torchrun(recipe: Path, tmp_path: Path, of_one_process: Callable[[Path], Run]) -> None:
    check_equal(launch(TORCHRUN, recipe, tmp_path / "run"), of_one_process(recipe))


@pytest.mark.parametrize(("name", "kind"), [("plain", "auto"), ("fsdp", "fsdp2"), ("zero3", "zero3")])
def test_accelerate_launch(
    name: str, kind: str, recipe: Path, tmp_path: Path, of_one_process: Callable[[Path], Run]
) -> None:
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed")
    run = launch(accelerate(ACCELERATE[name], tmp_path), recipe, tmp_path / "run")
    check_equal(run, of_one_process(recipe))
    assert run.strategy["kind"] == kind


def test_processes_that_accelerate_leaves_unconnected_are_refused(recipe: Path, tmp_path: Path) -> None:
    command = accelerate({"distributed_type": "MULTI_CPU", "use_cpu": True}, tmp_path)
    run = launch(command, recipe, tmp_path / "run")
    assert run.status == 1  # accelerate's, whatever a child says
    assert all(text in run.output for text in ("RANK, WORLD_SIZE: not set", "num_processes", "fix: ")), run.output
    assert not run.path.exists()


def test_a_wrong_recipe_is_told_once(recipe: Path, tmp_path: Path) -> None:
    run = launch(TORCHRUN, recipe, tmp_path / "run", "--optim.lr", "-1")
    assert run.status == 1
    assert run.output.count("optim.lr") == 1
    assert not run.path.exists()


def test_wrong_data_is_told_once(recipe: Path, tmp_path: Path) -> None:
    """Every process sees it, after they have met."""
    (tmp_path / "empty.jsonl").touch()
    options = ["--data.train[0].path", str(tmp_path / "empty.jsonl")]
    run = launch([*ALONE, "--gpus", "2"], recipe, tmp_path / "run", *options)
    assert run.status == 2, run.output
    assert run.output.count("empty.jsonl") == 1, run.output


# Ends


@pytest.fixture
def long_recipe(toy_recipe_file: Callable[..., Path]) -> Path:
    return toy_recipe_file(**FULL, train={"max_steps": 100_000}, checkpoint={"every_steps": 5})


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int = 6) -> None:
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + WAIT
    while not metrics.exists() or metrics.read_text().count('"kind": "step"') < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no step was made"
        time.sleep(0.1)


def children(process: subprocess.Popen[str]) -> list[int]:
    """Pids of its direct children, by start."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_a_preempted_run_goes_on_with_another_number_of_processes(long_recipe: Path, tmp_path: Path) -> None:
    process = start([*ALONE, "--gpus", "2"], long_recipe, tmp_path / "run")
    wait_for_step(process, tmp_path / "run")
    process.send_signal(signal.SIGUSR2)
    run = finish(process, tmp_path / "run")
    assert run.status == 75, run.output
    assert run.state["state"] == "preempted"
    step = run.state["step"]
    assert run.output.count(f"stopped at step {step} by SIGUSR2") == 1
    process = start(ALONE, long_recipe, tmp_path / "run")
    wait_for_step(process, tmp_path / "run", step + 3)
    process.send_signal(signal.SIGTERM)
    run = finish(process, tmp_path / "run")
    assert f"resumed at step {step}" in run.output
    assert process.returncode == 75


def test_a_lost_process_ends_the_run_within_a_minute_and_is_named(long_recipe: Path, tmp_path: Path) -> None:
    lost = []
    for fault in (signal.SIGSTOP, signal.SIGKILL):  # the second run begins while the first one waits
        folder = tmp_path / fault.name
        process = start([*ALONE, "--gpus", "2"], long_recipe, folder)
        wait_for_step(process, folder)
        pids = children(process)
        os.kill(pids[1], fault)
        lost.append((fault, process, folder, pids, time.time()))
    for fault, process, folder, pids, since in lost:
        run = finish(process, folder)
        assert run.status == 1
        assert run.state["time"] - since < 60
        assert fault == signal.SIGSTOP or "rank 1 was killed by SIGKILL" in run.output
        assert run.output.count("rank 1 on host") == 1, run.output  # told once
        assert run.state["state"] == "failed" and "rank 1" in run.state["reason"]
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_second_ctrl_c_ends_without_a_traceback(long_recipe: Path, tmp_path: Path) -> None:
    process = start([*ALONE, "--gpus", "2"], long_recipe, tmp_path / "run")
    wait_for_step(process, tmp_path / "run")
    process.send_signal(signal.SIGINT)
    log, deadline = tmp_path / "run" / "logs" / "rank_0.log", time.monotonic() + WAIT
    while "SIGINT received" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)  # while it saves; or a little later
    run = finish(process, tmp_path / "run")
    assert "Traceback" not in run.output
    assert run.status in (130, 75, -signal.SIGINT)
    assert run.state["state"] in ("cancelled", "preempted")
