"""`packtrain train`: a whole run on this host."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.importing import importing
from trainer.launcher_settings import adopt_launcher
from trainer.launchers import count_gpus, read_world
from trainer.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]


def train(
    recipe: Path,
    *,
    run_dir: Path | None = None,
    gpus: int | None = None,
    overrides: Annotated[dict[str, Any] | None, Parameter(parse=False)] = None,
) -> None:
    """Train a recipe on this host. Continues by itself where the run dir's newest intact checkpoint left off.

    Args:
        recipe: a YAML file.
        run_dir: where the run is kept; default: runs/ and the recipe's name.
        gpus: number of GPUs, one process each; default: all that are visible. Where there are none, so many processes
            on the CPU.
        overrides: dotted field -> value, laid over the recipe.
    """
    world = read_world(os.environ)
    if world.world_size > 1:
        raise UserError(
            "packtrain train",
            f"started {world.world_size} times by a launcher, and each would start a run of its own",
            "one start on this host",
            "packtrain train --gpus N without the launcher, or under it: python -m trainer RECIPE",
        )
    config = adopt_launcher(load_recipe(recipe, overrides), os.environ, world)
    run_dir = run_dir or Path("runs") / recipe.stem
    num_gpus = count_gpus(os.environ) if config.train.device == "auto" else 0
    num_processes = choose_num_processes(config, gpus, num_gpus)
    if num_processes > 1:
        _run_several(recipe, run_dir, overrides or {}, num_processes)
        return
    with importing():
        from trainer.run import train as run  # imports torch, which a wrong recipe need not wait for

    run(config, run_dir)


def choose_num_processes(config: RunConfig, asked: int | None, num_gpus: int) -> int:
    """One process a GPU: as many as asked for, else all.

    Raises:
        UserError: more than there are, or several for a strategy of one.
    """
    single = config.strategy.kind == "single"
    if asked is None:
        return 1 if single else max(1, num_gpus)
    if asked < 1 or (num_gpus and asked > num_gpus):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        because = f" (CUDA_VISIBLE_DEVICES={visible})" if visible is not None else ""
        raise UserError(
            "--gpus",
            f"{asked}; this host has {num_gpus}{because}",
            f"1 to {num_gpus}" if num_gpus else "a number of processes on the CPU, from 1",
        )
    if single and asked > 1:
        raise UserError(
            "--gpus",
            f"{asked}, and strategy.kind is single",
            "1 for single",
            "--gpus 1, or --strategy.kind auto",
        )
    return asked


def _run_several(recipe: Path, run_dir: Path, overrides: dict[str, Any], num_processes: int) -> None:
    from launch.local import run_processes
    from trainer.checkpoint.layout import RunDir

    # The children run the code that this process runs, whatever lies in the current folder.
    command = [sys.executable, "-P", "-m", "trainer", str(recipe), "--run-dir", str(run_dir)]
    command += [f"--{field}={value}" for field, value in overrides.items()]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    run = RunDir(run_dir)
    noted = _modified_at(run.out_of_memory)

    def memory_ran_out() -> bool:
        """In the start that has just ended; a second time the run fails."""
        nonlocal noted
        before, noted = noted, _modified_at(run.out_of_memory)
        return noted != before

    status = run_processes(command, num_processes, os.environ | {"PYTHONPATH": path}, run.logs, memory_ran_out)
    if status:
        sys.exit(status)  # rank 0 has said why


def _modified_at(file: Path) -> int:
    return file.stat().st_mtime_ns if file.exists() else 0
