"""What ``state.json`` says of a run that failed, and of a start that never became one."""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer import host_checks
from trainer.checkpoint.layout import RunDir
from trainer.config import RunConfig
from trainer.errors import PacktrainError, PreflightFailed, UserError

LORA = {"method": "lora", "r": 4, "alpha": 8}
Recipe = Callable[..., RunConfig]


def train(config: RunConfig, run: RunDir) -> None:
    from trainer.run import train

    train(config, run.path)


@pytest.fixture(autouse=True)
def _on_node_n7(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")


@pytest.fixture
def in_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RunDir:
    """The run dir of a submitted run, in its job."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.job.write_text(json.dumps({"job_id": "12"}))
    return run


def fail_at_step(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    from trainer.loop import TrainLoop

    def fails(loop: TrainLoop) -> None:
        raise error

    monkeypatch.setattr(TrainLoop, "train_step", fails)


def shrink_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    look = host_checks._look
    monkeypatch.setattr(host_checks, "_look", lambda rank: dataclasses.replace(look(rank), shared=0))


@pytest.mark.parametrize(
    ("error", "blamed"),
    [
        (OSError(errno.EIO, "Input/output error"), "n7"),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), "n7"),
        (OSError(errno.ENOSPC, "No space left on device"), None),
        (torch.OutOfMemoryError("CUDA out of memory"), None),
        (UserError("data.train", "a row that no template takes"), None),
        (ValueError("a bug"), None),
    ],
)
def test_a_failure_of_the_machine_is_blamed_on_it_and_no_other(
    error: BaseException, blamed: str | None, toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises((type(error), PacktrainError)):
        fail_at_step(patch, error)
        train(toy_recipe(adapter=LORA), run)
    assert run.read_state()["state"] == "failed" and run.read_state().get("blamed") == blamed
    before = run.state.read_text()
    with monkeypatch.context() as patch, pytest.raises((type(error), PacktrainError)):
        fail_at_step(patch, error)
        train(toy_recipe(adapter=LORA), run)
    assert run.state.read_text() != before  # the job's script counts a second fault by the change
    train(toy_recipe(adapter=LORA), run)
    assert run.read_state()["state"] == "done" and "blamed" not in run.read_state()


def test_a_running_run_blames_nobody_for_what_was_before(
    toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.loop import TrainLoop

    run, states = RunDir(tmp_path / "run"), list[dict[str, Any]]()
    run.write_state("failed", 3, "rank 1 died", blamed="n2")
    train_step = TrainLoop.train_step
    monkeypatch.setattr(TrainLoop, "train_step", lambda loop: (states.append(run.read_state()), train_step(loop)))
    train(toy_recipe(adapter=LORA), run)
    assert {state["state"] for state in states} == {"running"}
    assert not any("blamed" in state for state in states)
    assert all({"started", "pid"} <= state.keys() for state in states)


def test_a_job_that_fails_before_it_becomes_a_run_says_so(
    toy_recipe: Recipe, in_job: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(PreflightFailed, match="/dev/shm on n7"):
        shrink_shared_memory(patch)
        train(toy_recipe(adapter=LORA), in_job)
    state = in_job.read_state()
    assert state["state"] == "failed" and state["blamed"] == "n7" and "/dev/shm on n7" in state["reason"]
    with pytest.raises(UserError):
        train(toy_recipe(adapter=LORA, model={"path": "no-model"}), in_job)
    state = in_job.read_state()
    assert state["state"] == "failed" and "blamed" not in state and "no-model" in state["reason"]


def test_a_job_without_its_gpus_blames_its_node(
    toy_recipe: Recipe, in_job: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PreflightFailed, match="CUDA sees 0 here, SLURM granted 2"):
        train(toy_recipe(adapter=LORA), in_job)
    assert in_job.read_state()["state"] == "failed" and in_job.read_state()["blamed"] == "n7"
    train(toy_recipe(adapter=LORA, train={"max_steps": 1, "device": "cpu"}), in_job)  # a rehearsal is not refused
    assert in_job.read_state()["state"] == "done"


def test_outside_of_a_job_a_start_that_fails_leaves_no_trace(
    toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "run")
    shrink_shared_memory(monkeypatch)
    with pytest.raises(PreflightFailed):
        train(toy_recipe(adapter=LORA), run)
    assert not run.path.exists()


def test_wrong_input_leaves_the_state_of_a_run_as_it_was(
    toy_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "run")
    run.write_state("preempted", 3, "stopped at step 3")
    before = run.state.read_text()
    with pytest.raises(UserError):
        train(toy_recipe(adapter=LORA, model={"path": "no-model"}), run)
    assert run.state.read_text() == before
    shrink_shared_memory(monkeypatch)
    with pytest.raises(PreflightFailed):
        train(toy_recipe(adapter=LORA), run)
    assert run.read_state()["state"] == "failed" and run.read_state()["blamed"] == "n7"


def test_what_another_process_trains_is_its_to_tell(toy_recipe: Recipe, in_job: RunDir) -> None:
    from trainer.resume import only_one_trainer

    in_job.write_state("running", 3)
    before = in_job.state.read_text()
    with only_one_trainer(in_job), pytest.raises(UserError, match="is training in this run dir"):
        train(toy_recipe(adapter=LORA), in_job)
    assert in_job.state.read_text() == before
