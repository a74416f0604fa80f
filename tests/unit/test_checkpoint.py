"""A checkpoint is whole or it is not there; damage is found by its hash and named."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from trainer.checkpoint.appearing import folder_appears_when_complete
from trainer.checkpoint.layout import RunDir, find_damage, write_atomically
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.saved import SavedCheckpoint
from trainer.config import CheckpointConfig
from trainer.errors import PacktrainError
from trainer.launchers import World
from trainer.processes import Processes

ALONE = Processes(World(), torch.device("cpu"))


def manager(tmp_path, finish=lambda folder, saved: None, **settings):
    return CheckpointManager(RunDir(tmp_path), CheckpointConfig(**settings), {"base": {}, "data": "d"}, ALONE, finish)


def tensors(value):
    return {"model.w": torch.full((8, 4), float(value)), "optim.w.step": torch.tensor(float(value))}


def test_what_was_saved_comes_back_though_the_tensors_changed_at_once(tmp_path):
    checkpoints, state = manager(tmp_path), tensors(1)
    checkpoints.save(10, state, {"loop": {"step": 10}})
    state["model.w"].fill_(-1)  # as the next step would, while the save is under way
    checkpoints.wait()
    restored, saved = tensors(0), checkpoints.open(10)
    saved.load(restored)
    assert saved.progress == {"loop": {"step": 10}}
    assert torch.equal(restored["model.w"], torch.full((8, 4), 1.0))
    assert restored["optim.w.step"] == 1
    checkpoints.close()


def test_keeps_the_newest_and_the_best(tmp_path):
    checkpoints = manager(tmp_path, keep=2)
    for step in (1, 2, 3, 4, 5):
        checkpoints.save(step, tensors(step), {}, is_best=step == 2)
    checkpoints.close()
    assert RunDir(tmp_path).steps() == [2, 4, 5]
    assert checkpoints.best_step() == 2


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def damage_flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, os.remove])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(tmp_path, caplog, damage):
    checkpoints = manager(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, tensors(step), {})
    checkpoints.close()
    victim = next((tmp_path / "checkpoints/step_00000002/dcp").glob("*.distcp"))
    damage(victim)
    assert checkpoints.newest_intact() == 1
    assert str(victim) in caplog.text
    checkpoints.discard_after(1)
    assert RunDir(tmp_path).steps() == [1]


def test_no_intact_checkpoint_is_an_error_never_a_fresh_start(tmp_path):
    checkpoints = manager(tmp_path)
    checkpoints.save(1, tensors(1), {})
    checkpoints.close()
    damage_flip(next((tmp_path / "checkpoints/step_00000001/dcp").glob("*.distcp")))
    with pytest.raises(PacktrainError, match="none of the 1 checkpoints is intact"):
        checkpoints.newest_intact()


def test_a_failed_save_is_raised_and_leaves_the_last_one(tmp_path):
    checkpoints = manager(tmp_path)
    checkpoints.save(1, tensors(1), {})
    checkpoints.wait()
    checkpoints.save(2, tensors(2), {"not json": object()})
    with pytest.raises(PacktrainError, match="could not be saved"):
        checkpoints.wait()
    assert checkpoints.newest_intact() == 1
    checkpoints.close()
    assert manager(tmp_path).newest_intact() == 1
    assert not list(tmp_path.glob("checkpoints/*.unfinished"))


def best_saved_and_killed_before_it_was_noted(tmp_path, **settings):
    """Steps 1 and 2 were each the best when they were saved; the note still names 1."""
    checkpoints = manager(tmp_path, **settings)
    checkpoints.save(1, tensors(1), {}, is_best=True)
    checkpoints.wait()
    noted = RunDir(tmp_path).best.read_text()
    checkpoints.save(2, tensors(2), {}, is_best=True)
    checkpoints.close()
    RunDir(tmp_path).best.write_text(noted)
    assert RunDir(tmp_path).best_step() == 1


def test_a_kill_before_the_best_was_noted_leaves_no_older_best(tmp_path):
    best_saved_and_killed_before_it_was_noted(tmp_path)
    assert manager(tmp_path).best_step() == 2


@pytest.mark.parametrize("file", ["manifest.json", "dcp/__0_0.distcp"])
def test_a_damaged_checkpoint_does_not_become_the_best_nor_cost_the_intact_one(tmp_path, file):
    best_saved_and_killed_before_it_was_noted(tmp_path)
    (tmp_path / "checkpoints/step_00000002" / file).write_bytes(b"no json")
    checkpoints = manager(tmp_path, keep=1)
    assert checkpoints.best_step() == 1
    assert checkpoints.newest_intact() == 1
    checkpoints.discard_after(1)
    assert RunDir(tmp_path).steps() == [1] and checkpoints.best_step() == 1


def test_the_one_before_is_there_until_the_new_one_is_committed(tmp_path):
    run = RunDir(tmp_path)
    seen = []
    checkpoints = manager(tmp_path, finish=lambda folder, saved: seen.append(run.steps()), keep=1)
    for step in (1, 2, 3):
        checkpoints.save(step, tensors(step), {})
    checkpoints.close()
    assert seen == [[], [1], [2]] and run.steps() == [3]


def test_reading_names_what_is_not_there_or_of_another_shape(tmp_path):
    checkpoints = manager(tmp_path)
    checkpoints.save(1, tensors(1), {})
    checkpoints.close()
    saved = checkpoints.open(1)
    with pytest.raises(PacktrainError, match="holds no tensor model.absent"):
        saved.read("model.absent")
    with pytest.raises(PacktrainError, match="cannot be read into this model.*model.absent"):
        saved.load({**tensors(0), "model.absent": torch.zeros(1)})
    with pytest.raises(PacktrainError, match=r"8, 4.*4, 8.*model.w"):
        saved.load({"model.w": torch.zeros(4, 8)})
    with pytest.raises(PacktrainError, match="no readable checkpoint"):
        _ = SavedCheckpoint(tmp_path).names


SAVE_FOREVER = """
import sys, torch
from pathlib import Path
from trainer.checkpoint.layout import RunDir
from trainer.checkpoint.manager import CheckpointManager
from trainer.config import CheckpointConfig
from trainer.launchers import World
from trainer.processes import Processes
run, alone = RunDir(Path(sys.argv[1])), Processes(World(), torch.device("cpu"))
checkpoints = CheckpointManager(run, CheckpointConfig(keep=3), {}, alone, lambda folder, saved: None)
step = 0
while True:
    step += 1
    checkpoints.save(step, {"w": torch.full((200_000,), float(step))}, {"step": step})
    print(step, flush=True)
"""


def test_kill_at_any_moment_leaves_an_intact_newest_checkpoint(tmp_path):
    for round_, lines in enumerate((3, 5, 8)):
        folder = tmp_path / str(round_)
        process = subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, folder], stdout=subprocess.PIPE, text=True)
        for _ in range(lines):
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        run = RunDir(folder)
        assert run.steps(), "at least one save had been waited for"
        for step in run.steps():
            assert find_damage(run.step_dir(step)) is None
        newest = manager(folder).newest_intact()
        saved = SavedCheckpoint(run.step_dir(newest))
        assert saved.progress == {"step": newest}
        assert torch.equal(saved.read("w"), torch.full((200_000,), float(newest)))


def test_a_folder_appears_only_when_complete(tmp_path):
    with pytest.raises(RuntimeError), folder_appears_when_complete(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert not list(tmp_path.iterdir())  # nor is there half a model that takes the room of the next one
    with folder_appears_when_complete(tmp_path / "out") as folder:
        (folder / "whole").write_text("x")
    assert (tmp_path / "out/whole").read_text() == "x"


def test_state_is_replaced_whole(tmp_path):
    run = RunDir(tmp_path)
    assert run.read_state() == {}
    run.write_state("running", 3)
    run.write_state("failed", 4, "why")
    state = run.read_state()
    assert state.pop("time") == pytest.approx(time.time(), abs=60)
    assert state == {"state": "failed", "step": 4, "reason": "why"}
    write_atomically(tmp_path / "a.json", json.dumps([1]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "state.json"]
