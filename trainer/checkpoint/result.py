"""What a folder holds: a run's adapter or model, a lone PEFT adapter, or a whole model. Imports no torch."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.checkpoint.layout import MANIFEST, RunDir, find_damage, hash_file, newest_manifest, read_manifest
from trainer.config import RunConfig
from trainer.errors import PacktrainError, UserError
from trainer.recipe import load_recipe

logger = logging.getLogger(__name__)
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TRAINING = ("step", "base", "data", "sources")  # of a checkpoint's manifest, and of what is made of it


@dataclass(frozen=True)
class Result:
    """What a folder turned out to hold.

    Attributes:
        kind: ``adapter`` (PEFT files that need their base) or ``model`` (a transformers folder).
        folder: where those files lie.
        config: the recipe they were trained with, when it is known.
        run_dir: the run they came from, when they lie in one.
        base: identity of the base recorded while training (`BaseIdentity` as a dict), when there is one.
    """

    kind: Literal["adapter", "model"]
    folder: Path
    config: RunConfig | None = None
    run_dir: RunDir | None = None
    base: dict[str, Any] | None = None


def find_result(folder: Path) -> Result:
    """Finds what to load or merge in a run dir, an adapter folder or a model folder.

    Of a run dir: its final adapter or model, else the best checkpoint's adapter, else the newest one's.

    Raises:
        UserError: nothing of the kind is there.
    """
    if not folder.is_dir():
        raise UserError(str(folder), "no such folder", "a run dir, an adapter folder or a model folder")
    if is_run(folder):
        return _result_of_run(RunDir(folder))
    if (folder / ADAPTER_CONFIG).exists():
        run_dir = enclosing_run(folder)
        config = load_recipe(run_dir.recipe) if run_dir else None
        return Result("adapter", folder, config, run_dir, _recorded_base(run_dir))
    if (folder / "adapter" / ADAPTER_CONFIG).exists():  # a checkpoint
        return find_result(folder / "adapter")
    if (folder / "config.json").exists():
        return Result("model", folder, _recipe_of_model(folder), enclosing_run(folder))
    inside = sorted(path.name for path in folder.iterdir() if path.is_dir() and is_run(path))
    raise UserError(
        str(folder),
        "neither a run (recipe.yaml and checkpoints/), an adapter (adapter_config.json) nor a model (config.json)",
        fix=f"there are runs in it, such as {folder / inside[0]}; all of them: {folder}/*"
        if inside
        else "name the --run-dir of a training, or a folder that transformers or PEFT wrote",
    )


def find_finished(folder: Path) -> Result:
    """What to hand on of a run or a folder: the merged model where a run has one, else its model or adapter.

    Raises:
        UserError: nothing of the kind is there, the run is not done, or its merged model is of another adapter.
        PacktrainError: a file is not as its manifest says.
    """
    is_merged = is_run(folder) and RunDir(folder).merged.is_dir()
    if is_run(folder):
        _check_done(RunDir(folder))
    result = find_result(RunDir(folder).merged if is_merged else folder)
    has_manifest = is_merged or (result.folder / MANIFEST).exists()  # what other programs wrote has none
    if has_manifest and (damage := find_damage(result.folder)):
        fix = "write it again: `packtrain merge` what was merged, `packtrain train` what a run ends with"
        raise PacktrainError(f"{damage}\n  fix: delete {result.folder} and {fix}")
    if is_merged:
        _check_merged_from_own(RunDir(folder))
    return result


def _check_done(run: RunDir) -> None:
    state = run.read_state().get("state", "not recorded")
    if state != "done":
        fix = f"let `packtrain train` finish it, or `packtrain merge {run.path} --out DIR` what is saved, and name DIR"
        raise UserError(str(run.path), f"the run's state is {state}", "a run that is done", fix)


def merged_onto(run: RunDir, adapter: Path) -> str | None:
    """What `merged/` was merged onto, if it was from the very adapter in this folder; else None."""
    record = read_manifest(run.merged)
    files = {name: hash_file(adapter / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}
    return record.get("merged_onto") if record.get("adapter", {}).get("files") == files else None


def _check_merged_from_own(run: RunDir) -> None:
    if (run.adapter / ADAPTER_WEIGHTS).exists() and merged_onto(run, run.adapter) is None:
        fix = f"delete {run.merged} and `packtrain merge {run.path}`"
        raise UserError(str(run.merged), "merged from another adapter than the run has now", "the run's own", fix)


def training_of(result: Result) -> dict[str, Any]:
    """What is recorded of the training behind a result: step, base, data and sources, as far as they are known."""
    for folder in (result.folder, result.folder.parent):  # its own manifest, or the one of the checkpoint it lies in
        with contextlib.suppress(PacktrainError):
            return training_in(read_manifest(folder))
    return training_in(newest_manifest(result.run_dir)) if result.run_dir else {}


def training_in(manifest: dict[str, Any]) -> dict[str, Any]:
    """The part of a manifest that says how its files were trained."""
    return {key: manifest[key] for key in TRAINING if key in manifest}


def enclosing_run(folder: Path) -> RunDir | None:
    """The run that `folder` (an adapter, a model, a checkpoint's adapter) lies in, if it lies in one."""
    for parent in list(folder.resolve().parents)[:3]:
        if is_run(parent):
            return RunDir(parent)
    return None


def is_run(folder: Path) -> bool:
    """Whether a training made `folder`; a recipe alone may be the user's own file."""
    run = RunDir(folder)
    return run.recipe.exists() and (run.state.exists() or run.checkpoints.is_dir())


def _result_of_run(run_dir: RunDir) -> Result:
    config = load_recipe(run_dir.recipe)
    if config.adapter is None:
        if not (run_dir.model / "config.json").exists():
            raise UserError(
                str(run_dir.path), "the run has no finished model yet", fix="let `packtrain train` finish it"
            )
        return Result("model", run_dir.model, config, run_dir)
    for adapter in _adapters_of_run(run_dir):
        if (adapter / ADAPTER_CONFIG).exists():
            return Result("adapter", adapter, config, run_dir, _recorded_base(run_dir))
    raise UserError(
        str(run_dir.path), "the run has no adapter and no checkpoint yet", fix="let `packtrain train` save one"
    )


def _adapters_of_run(run_dir: RunDir) -> Iterator[Path]:
    yield run_dir.adapter
    best = [run_dir.checkpoints / run_dir.best_name()] if run_dir.best_name() else []
    for checkpoint in [*best, *(run_dir.step_dir(step) for step in reversed(run_dir.steps()))]:
        if damage := find_damage(checkpoint):
            logger.warning("%s. Trying another checkpoint", damage)
        else:
            yield checkpoint / "adapter"


def check_adapter(folder: Path) -> None:
    """Compares an adapter's weights with the manifest beside them, or of the checkpoint they lie in, if there is one.

    A flipped bit in them would be merged, and the merge be proven to be of this very adapter. Its config is another
    matter: a base that moved is named there by hand.

    Raises:
        PacktrainError: the bytes are not those that were written.
    """
    weights = folder / ADAPTER_WEIGHTS
    for home, prefix in ((folder, ""), (folder.parent, f"{folder.name}/")):
        if not (home / MANIFEST).exists():
            continue
        expected = read_manifest(home)["files"].get(prefix + ADAPTER_WEIGHTS)
        if expected and hash_file(weights) != expected["blake3"]:
            raise PacktrainError(
                f"{weights} does not have the hash its manifest says\n"
                f"  fix: copy it again; in a run, delete {folder}, and the run's best checkpoint counts"
            )


def _recorded_base(run_dir: RunDir | None) -> dict[str, Any] | None:
    """The base's identity from the newest checkpoint."""
    return newest_manifest(run_dir).get("base") if run_dir else None


def _recipe_of_model(folder: Path) -> RunConfig | None:
    """The recipe that a merged model's manifest, or the run around the folder, records."""
    with contextlib.suppress(PacktrainError, ValueError):  # no manifest, or another program's
        return RunConfig.model_validate(read_manifest(folder).get("recipe"))
    run_dir = enclosing_run(folder)
    return load_recipe(run_dir.recipe) if run_dir else None
