"""Checkpoints that all processes write together: read by any number of them, and whole or not there."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForCausalLM

from distributed.pool import Pool, Pools, WorkerFailed
from trainer.checkpoint.layout import RunDir, find_damage, read_manifest
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.saved import SavedCheckpoint
from trainer.config import CheckpointConfig, RunConfig
from trainer.errors import PacktrainError
from trainer.export.consolidate import consolidate
from trainer.export.result import finish_full
from trainer.model.tokenizer import load_tokenizer
from trainer.processes import Processes

Tensors = dict[str, torch.Tensor]
CUT = {"model.uneven", "model.fewer_rows_than_processes", "model.bytes", "optim.uneven.exp_avg"}


def whole_tensors(step: int) -> Tensors:
    """A state whose values are a function of the step; those of `CUT` are spread over processes."""
    generator = torch.Generator().manual_seed(step)
    return {
        "model.uneven": torch.randn(7, 5, generator=generator),
        "model.fewer_rows_than_processes": torch.randn(2, 3, generator=generator).bfloat16(),
        "model.bytes": torch.randint(0, 256, (5, 16), generator=generator, dtype=torch.uint8),
        "optim.uneven.exp_avg": torch.randn(7, 5, generator=generator),
        "model.equal": torch.randn(6, 4, generator=generator),
        "optim.equal.step": torch.tensor(float(step)),
    }


def laid_out(whole: Tensors, processes: Processes) -> Tensors:
    """Each process's part: rows cut as `torch.chunk` does, the last processes may get none."""
    mesh = init_device_mesh("cpu", (processes.world_size,))
    state = {name: tensor.clone() for name, tensor in whole.items()}
    for name in CUT & set(whole):
        rows = whole[name].chunk(processes.world_size)
        own = rows[processes.rank] if processes.rank < len(rows) else whole[name][:0]
        shape, stride = whole[name].shape, whole[name].stride()
        state[name] = DTensor.from_local(own.clone(), mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
    return state


def nothing_more(folder: Path, saved: SavedCheckpoint) -> None:
    """A checkpoint with nothing derived from it."""


def manage(processes: Processes, folder: Path, finish: Any = nothing_more, **settings: Any) -> CheckpointManager:
    return CheckpointManager(RunDir(folder), CheckpointConfig(**settings), {"data": "d"}, processes, finish)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save(processes: Processes, folder: Path, step: int) -> None:
    """Saves, and changes the live tensors at once, as the next optimizer step does while the save is under way."""
    checkpoints, state = manage(processes, folder), laid_out(whole_tensors(step), processes)
    checkpoints.save(step, state, {"seen": step})
    for tensor in state.values():
        local(tensor).fill_(77)
    checkpoints.close()


def load(processes: Processes, folder: Path, step: int) -> tuple[Tensors, dict[str, Any]]:
    saved = manage(processes, folder).open(step)
    state = laid_out({name: torch.zeros_like(tensor) for name, tensor in whole_tensors(step).items()}, processes)
    saved.load(state)
    whole = {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in state.items()}
    return whole, saved.progress


def assert_equal(found: Tensors, wanted: Tensors) -> None:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def saved_on(pool: Pools, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Step 3 as written by so many processes."""
    folders = {size: tmp_path_factory.mktemp(f"on{size}") for size in (1, 2, 3, 4, 8)}
    for size, folder in folders.items():
        pool(size).run(save, folder, 3)
    return folders


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_what_some_processes_saved_any_number_loads(world_size: int, pool: Pools, saved_on: dict[int, Path]) -> None:
    for folder in saved_on.values():
        for whole, progress in pool(world_size).run(load, folder, 3):
            assert_equal(whole, whole_tensors(3))
            assert progress == {"seen": 3}


def test_it_is_read_from_its_folder_alone(saved_on: dict[int, Path]) -> None:
    """In this process, which is in no group."""
    for folder in saved_on.values():
        step_dir = RunDir(folder).step_dir(3)
        assert find_damage(step_dir) is None
        saved = SavedCheckpoint(step_dir)
        assert_equal({name: saved.read(name) for name in saved.names}, whole_tensors(3))
        assert saved.step == 3 and saved.shape("model.uneven") == (7, 5) and saved.dtype("model.bytes") == torch.uint8


def save_equal(processes: Processes, folder: Path) -> None:
    checkpoints = manage(processes, folder)
    checkpoints.save(1, {f"model.{index}": torch.full((100_000,), float(index)) for index in range(6)}, {})
    checkpoints.close()


@pytest.mark.parametrize("world_size", [2, 3])
def test_what_all_hold_alike_is_written_once_by_all_together(world_size: int, pool: Pools, tmp_path: Path) -> None:
    pool(world_size).run(save_equal, tmp_path)
    files = read_manifest(RunDir(tmp_path).step_dir(1))["files"]
    sizes = [entry["bytes"] for name, entry in files.items() if name.endswith(".distcp")]
    assert len(sizes) == world_size
    assert sum(sizes) < 1.1 * 6 * 400_000
    assert max(sizes) < 1.1 * 6 * 400_000 / world_size


def failure_of(act: Any) -> str:
    """What a PacktrainError of `act` says."""
    try:
        act()
    except PacktrainError as error:
        return str(error)
    return ""


def save_different(processes: Processes, folder: Path) -> str:
    checkpoints, state = manage(processes, folder), laid_out(whole_tensors(1), processes)
    state["model.equal"][3, 1] += 1e-6 * (processes.rank == 1)
    checkpoints.save(1, state, {})
    return failure_of(checkpoints.close)


def test_a_tensor_that_should_be_equal_everywhere_and_is_not_is_refused(pool: Pools, tmp_path: Path) -> None:
    for told in pool(3).run(save_different, tmp_path):
        assert "model.equal" in told and "rank 1" in told
    assert RunDir(tmp_path).steps() == []


@contextmanager
def files_stay_below(num_bytes: int) -> Iterator[None]:
    """A disk that is full for this process alone: the system refuses to write more into any file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_on_a_full_disk(processes: Processes, folder: Path) -> list[str]:
    checkpoints = manage(processes, folder)
    whole = {f"model.{index}": torch.full((100_000,), float(index)) for index in range(6)}
    checkpoints.save(1, whole, {})
    checkpoints.wait()
    with files_stay_below(300_000) if processes.rank == 1 else nullcontext():
        checkpoints.save(2, whole, {})
        told = [failure_of(checkpoints.wait)]
    checkpoints.save(3, whole, {})
    told.append(failure_of(checkpoints.close))
    return told


def test_a_rank_that_cannot_write_is_named_on_all_and_nothing_is_committed(pool: Pools, tmp_path: Path) -> None:
    for failed, later in pool(3).run(save_on_a_full_disk, tmp_path):
        assert "rank 1" in failed and "File too large" in failed
        assert "Traceback" not in failed and "rank 0" not in failed
        assert later == ""
    assert_only_whole_ones(tmp_path, [1, 3])


def save_with_finish_that_fails(processes: Processes, folder: Path) -> list[str]:
    def finish(place: Path, saved: SavedCheckpoint) -> None:
        assert processes.is_first
        (place / "derived").mkdir()
        (place / "derived" / "sum").write_text(str(saved.read("model.equal").double().sum().item()))
        if "step_00000002" in place.name:
            raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints, told = manage(processes, folder, finish), []
    for step in (1, 2, 3):
        checkpoints.save(step, laid_out(whole_tensors(step), processes), {})
        told.append(failure_of(checkpoints.wait))
    checkpoints.close()
    return told


def test_what_is_derived_is_part_of_the_checkpoint_and_its_failure_is_everybodys(pool: Pools, tmp_path: Path) -> None:
    for first, second, third in pool(2).run(save_with_finish_that_fails, tmp_path):
        assert first == third == ""
        assert "rank 0" in second and "No space left" in second
    assert_only_whole_ones(tmp_path, [1, 3])
    derived = RunDir(tmp_path).step_dir(3) / "derived" / "sum"
    assert "derived/sum" in read_manifest(derived.parents[1])["files"]
    assert float(derived.read_text()) == whole_tensors(3)["model.equal"].double().sum().item()


def assert_only_whole_ones(folder: Path, steps: list[int]) -> None:
    run = RunDir(folder)
    assert run.steps() == steps
    assert all(find_damage(run.step_dir(step)) is None for step in steps)
    assert sorted(run.checkpoints.iterdir()) == [run.step_dir(step) for step in steps]


def load_misfits(processes: Processes, folder: Path) -> list[str]:
    saved = manage(processes, folder).open(3)
    whole = whole_tensors(3)
    absent = laid_out({**whole, "model.absent": torch.zeros(3)}, processes)
    other_shape = laid_out({**whole, "model.equal": torch.zeros(6, 5)}, processes)
    return [failure_of(partial(saved.load, state)) for state in (absent, other_shape)]


def test_another_models_state_is_refused_by_name(pool: Pools, saved_on: dict[int, Path]) -> None:
    for absent, other_shape in pool(2).run(load_misfits, saved_on[3]):
        assert "model.absent" in absent and "Traceback" not in absent
        assert "model.equal" in other_shape and "6, 4" in other_shape and "6, 5" in other_shape


def use_retention(processes: Processes, folder: Path) -> list[Any]:
    checkpoints = manage(processes, folder, keep=2)
    for step in (1, 2, 3, 4):
        checkpoints.save(step, laid_out(whole_tensors(step), processes), {}, is_best=step == 1)
    checkpoints.save(4, laid_out(whole_tensors(4), processes), {}, is_best=True)  # evaluated after it was saved
    checkpoints.wait()
    seen: list[Any] = [checkpoints.best_step(), checkpoints.run_dir.steps(), checkpoints.newest_intact()]
    if processes.is_first:
        victim = next((checkpoints.run_dir.step_dir(4) / "dcp").glob("*.distcp"))
        victim.write_bytes(victim.read_bytes()[:-1])
    processes.barrier()
    seen.append(checkpoints.newest_intact())
    checkpoints.discard_after(3)
    seen.append(checkpoints.run_dir.steps())
    checkpoints.close()
    return seen


def test_all_ranks_agree_on_what_is_kept_best_and_intact(pool: Pools, tmp_path: Path) -> None:
    assert pool(3).run(use_retention, tmp_path) == [[4, [3, 4], 4, 3, [3]]] * 3


def save_until_killed(processes: Processes, folder: Path) -> None:
    (folder / f"pid_{processes.rank}").write_text(str(os.getpid()))
    try:
        checkpoints = manage(processes, folder / "run")
        for step in itertools.count(1):
            checkpoints.save(step, laid_out(whole_tensors(step), processes), {"seen": step})
    finally:
        os._exit(1)  # as a run that fails; a rank whose neighbours all live learns of it by that


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_rank_leaves_the_last_checkpoint_and_no_rank_that_waits(victim: int, tmp_path: Path) -> None:
    pool = Pool(3)  # its own: it does not survive
    run = RunDir(tmp_path / "run")

    def kill_in_a_save() -> None:
        while not (run.steps() and run.steps()[-1] >= 3 + victim and list(run.checkpoints.glob("*.unfinished"))):
            time.sleep(0.001)
        os.kill(int((tmp_path / f"pid_{victim}").read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill_in_a_save, daemon=True)
    killer.start()
    with pytest.raises(WorkerFailed) as failed:
        pool.run(save_until_killed, tmp_path)
    killer.join()
    assert f"rank {victim}: died with exit code -9" in str(failed.value)
    assert "was still at" not in str(failed.value)

    assert all(find_damage(run.step_dir(step)) is None for step in run.steps())
    newest = run.steps()[-1]
    assert newest >= 3 + victim
    saved = SavedCheckpoint(run.step_dir(newest))
    assert_equal({name: saved.read(name) for name in saved.names}, whole_tensors(newest))


def save_whole_model(processes: Processes, folder: Path, config: RunConfig) -> None:
    """A full fine-tune's checkpoint, rows cut over the processes."""
    model: Any = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    mesh = init_device_mesh("cpu", (processes.world_size,))
    state: Tensors = {}
    for name, parameter in model.named_parameters():
        rows = parameter.detach().chunk(processes.world_size)
        own = rows[processes.rank] if processes.rank < len(rows) else parameter.detach()[:0]
        shape, stride = parameter.shape, parameter.stride()
        placed = DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        state |= {f"model.{name}": placed, f"optim.{name}.exp_avg": placed}
    finish = finish_full(config, model.config, load_tokenizer(config.model))
    checkpoints = manage(processes, folder, finish)
    checkpoints.save(1, state, {})
    checkpoints.close()


def test_a_model_comes_out_the_same_whichever_processes_saved_it(pool: Pools, toy_recipe: Any, tmp_path: Path) -> None:
    config = toy_recipe()
    for size in (1, 2, 3):
        pool(size).run(save_whole_model, tmp_path / f"run{size}", config)
        consolidate(RunDir(tmp_path / f"run{size}").step_dir(1), tmp_path / f"model{size}")
    files = {(tmp_path / f"model{size}" / "model.safetensors").read_bytes() for size in (1, 2, 3)}
    assert len(files) == 1
    base, found = (load_file(f / "model.safetensors") for f in (Path(config.model.path), tmp_path / "model3"))
    assert_equal(found, base)
