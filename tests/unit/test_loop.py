"""What a run tells of its steps: each once, in order, before what comes of it, however late its figures are read."""

import os
import signal
import time
from itertools import pairwise

import pytest
import torch

from trainer.checkpoint.layout import RunDir, read_manifest
from trainer.errors import MemoryRanOut, Preempted, TrainingDiverged
from trainer.loss import PackedCausalLM
from trainer.metrics.trackers import read_metrics
from trainer.readings import Figure
from trainer.strategies.single import SingleProcess

LORA = {"method": "lora", "r": 4, "alpha": 8}
MICRO_BATCHES = 2  # a step's, of the toy recipe


@pytest.fixture(params=[False, True], ids=["at once", "late"])
def late(request, monkeypatch):
    """Whether the figures of a step come when the next one is under way, as a GPU's do."""
    if request.param:
        monkeypatch.setattr(Figure, "is_here", False)
    return request.param


@pytest.fixture
def at_step(monkeypatch):
    """``at_step(number, fault)``: the first forward of that step, counted over all runs, gives `fault` of its loss."""
    faults, forward, done = {}, PackedCausalLM.forward, []

    def planted(module, batch):
        loss = forward(module, batch)
        if module.training and loss.requires_grad:
            done.append(loss)
            step, index = divmod(len(done) - 1, MICRO_BATCHES)
            if index == 0 and step + 1 in faults:
                loss = faults[step + 1](loss)
        return loss

    monkeypatch.setattr(PackedCausalLM, "forward", planted)
    return faults.__setitem__


def train(config, folder):
    from trainer.run import train

    train(config, folder)


def broken(loss):
    return loss * float("nan")


def told(run):
    return [
        record for record in read_metrics(run.metrics) if record.get("event") not in ("start", "resume", "micro_batch")
    ]


def steps(records):
    return [record["step"] for record in records if record["kind"] == "step"]


def out_of_order(records):
    """Whatever does not follow the line of its own step, with nothing but what came of that step between."""
    return [
        record for before, record in pairwise(records) if record["step"] != before["step"] + (record["kind"] == "step")
    ]


def test_every_step_is_told_once_and_before_what_comes_of_it(toy_recipe, tmp_path, late, at_step):
    at_step(3, broken)
    config = toy_recipe(
        adapter=LORA,
        train={"max_steps": 7},
        eval={"every_steps": 2, "samples": ["Repeat a b."], "max_new_tokens": 2},
        checkpoint={"every_steps": 3},
    )
    train(config, tmp_path / "run")
    records = told(RunDir(tmp_path / "run"))
    assert steps(records) == [1, 2, 3, 4, 5, 6, 7] and not out_of_order(records)
    assert [r["step"] for r in records if r["kind"] == "eval"] == [2, 4, 6, 7]
    assert [r["step"] for r in records if r.get("event") == "skipped_step"] == [3]
    assert {3, 6, 7} <= {r["step"] for r in records if r.get("event") == "checkpoint"}


def test_steps_skipped_before_a_stop_count_after_it(toy_recipe, tmp_path, late, at_step):
    def stopping(loss):
        os.kill(os.getpid(), signal.SIGTERM)
        return broken(loss)

    at_step(5, stopping)
    at_step(6, broken)
    at_step(7, broken)
    config, run = toy_recipe(adapter=LORA, train={"max_steps": 9}, eval={}), RunDir(tmp_path / "run")
    with pytest.raises(Preempted):
        train(config, run.path)
    saved = read_manifest(run.step_dir(5))["progress"]["loop"]
    assert (saved["step"], saved["failures_in_a_row"], saved["skipped_steps"]) == (5, 1, 1)
    with pytest.raises(TrainingDiverged, match="step 7: .*the last good checkpoint is step 5"):
        train(config, run.path)
    records = told(run)
    assert steps(records) == [1, 2, 3, 4, 5, 6, 7] and not out_of_order(records)


def test_a_step_is_told_before_memory_runs_out_in_the_next(toy_recipe, tmp_path, late, at_step):
    def run_out(loss):
        raise torch.OutOfMemoryError("CUDA out of memory")

    at_step(2, run_out)  # the third, of steps of one micro-batch
    sizes = {"micro_batch": "auto", "recompute": "auto", "global_batch": {"rows": 4}}
    train(toy_recipe(adapter=LORA, train=sizes, eval={}), tmp_path / "run")
    records = told(RunDir(tmp_path / "run"))
    assert steps(records) == [1, 2, 3, 4] and not out_of_order(records)
    assert [r["step"] for r in records if r.get("event") == "out_of_memory"] == [2]


def test_memory_that_runs_out_under_an_engine_that_cuts_ends_the_run_and_the_next_start_is_leaner(
    toy_recipe, tmp_path, at_step
):
    def run_out(loss):
        raise torch.OutOfMemoryError("CUDA out of memory")

    at_step(2, run_out)
    sizes = {"micro_batch": "auto", "recompute": "auto", "global_batch": {"rows": 4}}
    config = toy_recipe(adapter=LORA, train=sizes, eval={}, strategy={"kind": "fsdp2"})
    run = RunDir(tmp_path / "run")
    with pytest.raises(MemoryRanOut, match="predicted .*; the next start takes"):
        train(config, run.path)
    assert run.read_state()["state"] == "preempted"
    assert not [r for r in told(run) if r.get("event") == "out_of_memory"]
    train(config, run.path)
    assert steps(told(run))[-4:] == [1, 2, 3, 4]
    saved = read_manifest(run.step_dir(4))["progress"]
    assert (saved["micro_batch"], saved["recompute"]) != (4, {"none": 2})


def test_a_step_is_told_before_the_optimizer_makes_the_next(toy_recipe, tmp_path, late, monkeypatch):
    run, step, found = RunDir(tmp_path / "run"), SingleProcess.step, []

    def looking(*arguments):
        found.append(steps(told(run)))
        return step(*arguments)

    monkeypatch.setattr(SingleProcess, "step", looking)
    train(toy_recipe(adapter=LORA, train={"max_steps": 3, "micro_batch": 2}, eval={}), run.path)
    assert found == [[], [1], [1, 2]] and steps(told(run)) == [1, 2, 3]


def test_no_part_of_a_step_is_timed_with_another(toy_recipe, tmp_path, at_step):
    def slow(loss):
        time.sleep(0.2)
        return loss

    for step in range(1, 6):
        at_step(step, slow)
    train(toy_recipe(adapter=LORA, train={"max_steps": 5}, eval={"every_steps": 2}), tmp_path / "run")
    seconds = [r["seconds"] for r in told(RunDir(tmp_path / "run")) if r["kind"] == "step"]
    assert len(seconds) == 5 and min(seconds) >= 0.2


def test_memory_that_runs_out_in_the_optimizer_leaves_the_next_start_less(toy_recipe, tmp_path, monkeypatch):
    def run_out(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    sizes = {"micro_batch": "auto", "recompute": "none", "global_batch": {"rows": 4}}
    config, run = toy_recipe(adapter=LORA, train=sizes, eval={}), RunDir(tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(MemoryRanOut, match="micro-batch of 4 packs.*; the next start"):
        patch.setattr(SingleProcess, "step", run_out)
        train(config, run.path)
    train(config, run.path)
    assert read_manifest(run.step_dir(4))["progress"]["micro_batch"] < 4
