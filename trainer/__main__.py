"""Worker entry: ``python -m trainer RECIPE [--run-dir DIR] [--optim.lr 1e-4 ...]``, alone or under a launcher.

torchrun, accelerate launch, srun and `packtrain train` each start it once a process.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from pathlib import Path

from trainer.checkpoint.layout import RunDir
from trainer.errors import EXIT_DONE, PacktrainError, Preempted, explain_os_error
from trainer.importing import importing
from trainer.launcher_settings import adopt_launcher
from trainer.launchers import World, host_name, read_world
from trainer.recipe import load_recipe, split_overrides

INTERRUPTED = 128 + signal.SIGINT
# These end all processes as soon as one ends.
EAGER_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID")
SECONDS_TO_SPEAK = 10.0


def main() -> int:
    """Returns the exit status: 0 done, 1 failed, 2 wrong input, 75 stopped in order to be resumed, 130 interrupted."""
    try:
        return _train()
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a further one ends what still winds up, without a traceback


def _train() -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer", description="Train a recipe.", allow_abbrev=False)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--run-dir", type=Path, help="where the run is kept; default: runs/<recipe's name>")
    parser.add_argument("--data-fingerprint", help="train on no other data; `packtrain submit` gives that of its own")
    world, run_dir = World(), None
    try:
        world = read_world(os.environ)
        _log(world)
        overrides, tokens = split_overrides(sys.argv[1:])
        arguments = parser.parse_args(tokens)
        config = adopt_launcher(load_recipe(arguments.recipe, overrides), os.environ, world)
        run_dir = arguments.run_dir or Path("runs") / arguments.recipe.stem
        with importing():
            from trainer.run import train
        train(config, run_dir, world, arguments.data_fingerprint)
    except (PacktrainError, OSError) as failure:
        error = explain_os_error(failure) if isinstance(failure, OSError) else failure
        if not error.told:
            _tell(error, world, run_dir)
        return error.exit_status
    return EXIT_DONE


def _log(world: World) -> None:
    """To stderr goes what rank 0 has to say, from libraries warnings only; run.py gives every rank a file."""
    if world.rank == 0:
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
    else:
        logging.basicConfig(level=logging.WARNING, handlers=[logging.NullHandler()])
        logging.captureWarnings(True)
    logging.getLogger("trainer").setLevel(logging.INFO)


def _tell(error: PacktrainError, world: World, run_dir: Path | None) -> None:
    """Rank 0 speaks. The others write to their log: the watchdog has rank 0 say what is wrong with one of them.

    Before there are logs nobody watches: then those speak that are still there when rank 0 would have spoken.
    """
    if world.rank == 0:
        print(error, file=sys.stderr)
        return
    log = RunDir(run_dir).logs / f"rank_{world.rank}.log" if run_dir else None
    is_logged = log is not None and log.parent.is_dir()
    if log and is_logged:
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{error}\n")
    stops_in_order = isinstance(error, Preempted)  # all have, together
    if any(name in os.environ for name in EAGER_LAUNCHERS) and not stops_in_order:
        time.sleep(SECONDS_TO_SPEAK * (1 if world.local_rank == 0 else 1.5))  # or rank 0 is ended before it speaks
    if not is_logged:
        print(f"rank {world.rank} on {host_name(os.environ)}: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
