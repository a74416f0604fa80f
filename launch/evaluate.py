"""`packtrain evaluate`: what models are worth on the same rows, in one table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from launch.tables import as_texts, new_console, new_table
from slurm.history import read_sweep
from trainer.errors import UserError

if TYPE_CHECKING:
    from trainer.evaluate import Evaluation, Score

Fields = dict[str, list[Any]]  # recipe field -> its value for each model


def evaluate(
    *folders: Path,
    split: Literal["train", "validation", "test"] = "validation",
    recipe: Path | None = None,
    exact_match: bool = True,
    max_rows: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
) -> None:
    """Loss, perplexity, accuracy, exact match and F1 on a split: a line a model, below it a line for each data set.

    Several models are compared, with the recipe fields in which they differ. All are looked at before the first is
    loaded, and have to be asked the same rows.

    Args:
        folders: run dirs, sweeps, merged or plain models, or adapter folders; a recipe stands for its base before
            training, quantised as it says.
        split: which rows.
        recipe: names the data; default: the recipe each model was trained with.
        exact_match: also answer the split's prompts greedily and compare.
        max_rows: answer only the first so many prompts of each data set.
        json_file: write the figures there too, a list with an object a model.
    """
    from trainer.evaluate import evaluate as measure
    from trainer.evaluate import find_candidates, varied_fields

    candidates = find_candidates(_expand(folders), recipe, split)
    varied = varied_fields(candidates)
    found: list[Evaluation] = []
    try:
        for candidate in candidates:
            found.append(measure(candidate, split, exact_match, max_rows))
    finally:  # the last may fail hours after the first
        if json_file and found:
            _write(json_file, found, varied)
        if found:
            _print_table(found, varied)


def _expand(paths: Sequence[Path]) -> list[Path]:
    """The models to evaluate: of a sweep its runs, and of what a shell makes of ``SWEEP/*`` too."""
    models: list[Path] = []
    for path in paths:
        if runs := _runs_of(path):
            models += runs
        elif path in _runs_of(path.parent) or not _runs_of(path.parent):
            models.append(path)
    if not models:
        raise UserError("DIR", "no model is named", "run dirs, sweeps, model or adapter folders, or recipes")
    return list(dict.fromkeys(models))


def _runs_of(sweep: Path) -> list[Path]:
    return [sweep / run["run_dir"] for run in read_sweep(sweep).get("runs", [])]


def _write(file: Path, found: Sequence[Evaluation], varied: Fields) -> None:
    records = [
        {
            "folder": str(one.path),
            "split": one.split,
            "fields": {name: values[index] for name, values in varied.items()},
            **asdict(one.total),
            "base_gib": one.base_gib,
            "sources": [{"source": source, **asdict(score)} for source, score in one.sources.items()],
        }
        for index, one in enumerate(found)
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def _print_table(found: Sequence[Evaluation], varied: Fields) -> None:
    table = new_table(f"{found[0].split} rows of")
    for name in varied:
        table.add_column(name.replace(".", ".\n"), no_wrap=True)
    on_rows = ("loss", "perplexity", "token\naccuracy", "rows", "trained\ntokens")
    on_answers = ("exact\nmatch", "F1", "prompts\nanswered")
    for name in (*on_rows, *on_answers, "base\nGiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for index, one in enumerate(found):
        fields = [_shown(values[index]) for values in varied.values()]
        table.add_row(*as_texts([str(one.path), *fields, *_cells(one.total), f"{one.base_gib:.2f}"]))
        for source, score in one.sources.items():
            table.add_row(*as_texts([f"  {source}", *("" for _ in fields), *_cells(score), ""]))
    new_console().print(table)


def _cells(score: Score) -> list[str]:
    return [
        f"{score.loss:.4f}",
        f"{score.perplexity:.3f}",
        f"{score.token_accuracy:.3f}",
        f"{score.rows:,}",
        f"{score.tokens:,}",
        *("-" if share is None else f"{share:.3f}" for share in (score.exact_match, score.f1)),
        f"{score.answered:,}",
    ]


def _shown(value: Any) -> str:
    from trainer.recipe_yaml import dump_inline

    return "none" if value is None else dump_inline(value)
