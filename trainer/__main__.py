"""Worker entry: ``python -m trainer RECIPE [--run-dir DIR] [--optim.lr 1e-4 ...]``, also under torchrun and srun."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from trainer.errors import PacktrainError, explain_os_error
from trainer.recipe import load_recipe, split_overrides


def main() -> int:
    """Returns the exit status: 0 done, 1 failed, 2 wrong input, 75 stopped in order to be resumed."""
    parser = argparse.ArgumentParser(prog="python -m trainer", description="Train a recipe.", allow_abbrev=False)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--run-dir", type=Path, help="where the run is kept; default: runs/<recipe's name>")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        overrides, tokens = split_overrides(sys.argv[1:])
        arguments = parser.parse_args(tokens)
        config = load_recipe(arguments.recipe, overrides)
        from trainer.run import train

        train(config, arguments.run_dir or Path("runs") / arguments.recipe.stem)
    except (PacktrainError, OSError) as failure:
        error = explain_os_error(failure) if isinstance(failure, OSError) else failure
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
