"""`packtrain train`: a whole run on this host."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from trainer.recipe import load_recipe


def train(
    recipe: Path,
    *,
    run_dir: Path | None = None,
    overrides: Annotated[dict[str, Any] | None, Parameter(parse=False)] = None,
) -> None:
    """Train a recipe on this host. Continues by itself where the run dir's newest intact checkpoint left off.

    Args:
        recipe: a YAML file.
        run_dir: where the run is kept; default: runs/ and the recipe's name.
        overrides: dotted field -> value, laid over the recipe.
    """
    config = load_recipe(recipe, overrides)
    from trainer.run import train as run  # imports torch, which a wrong recipe need not wait for

    run(config, run_dir or Path("runs") / recipe.stem)
