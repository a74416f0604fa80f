"""What a folder holds: a run's adapter or model, a lone PEFT adapter, or a whole model. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from trainer.checkpoint.layout import (
    MANIFEST,
    RunDir,
    find_damage,
    find_file_damage,
    hash_file,
    newest_manifest,
    read_manifest,
)
from trainer.config import AdapterConfig, RunConfig
from trainer.errors import PacktrainError, UserError
from trainer.recipe import load_recipe

logger = logging.getLogger(__name__)
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TRAINING = ("step", "base", "data", "sources")  # of a checkpoint's manifest, and of what is made of it
MANY_BYTES = 2**30  # so many take a while to be read


@dataclass(frozen=True)
class Result:
    """What a folder turned out to hold.

    Attributes:
        kind: ``adapter`` (PEFT files that need their base) or ``model`` (a transformers folder).
        folder: where those files lie.
        config: the recipe they were trained with, when it is known.
        run_dir: the run they came from, when they lie in one.
        base: identity of the base recorded while training (`BaseIdentity` as a dict), when there is one.
        checkpoint: which of its checkpoints a run's adapter is taken from, in words; empty of a final one.
    """

    kind: Literal["adapter", "model"]
    folder: Path
    config: RunConfig | None = None
    run_dir: RunDir | None = None
    base: dict[str, Any] | None = None
    checkpoint: str = ""

    @property
    def adapter_recipe(self) -> AdapterConfig | None:
        """What an adapter was trained as, when it is known."""
        return self.config.adapter if self.config else None


def find_result(folder: Path) -> Result:
    """Finds what to load or merge in a run dir, an adapter folder or a model folder.

    Of a run dir: its final adapter or model, else the best checkpoint's adapter, else the newest one's. What an adapter
    was trained with is what its own manifest says, wherever it was copied to; else its checkpoint's and its run's.

    Raises:
        UserError: nothing of the kind is there.
        PacktrainError: an adapter's manifest cannot be read.
    """
    if not folder.is_dir():
        raise UserError(str(folder), "no such folder", "a run dir, an adapter folder or a model folder")
    if is_run(folder):
        return _result_of_run(RunDir(folder))
    if (folder / ADAPTER_CONFIG).exists():
        return _result_of_adapter(folder, enclosing_run(folder))
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
        UserError: nothing of the kind is there, the run is not done, its merged model is of another adapter, or a file
            is not as its manifest says.
    """
    is_merged = is_run(folder) and RunDir(folder).merged.is_dir()
    if is_run(folder):
        _check_done(RunDir(folder))
    result = find_result(RunDir(folder).merged if is_merged else folder)
    if is_merged and not (result.folder / MANIFEST).exists():
        fix = f"delete {result.folder} and `packtrain merge {folder}`"
        raise UserError(str(result.folder / MANIFEST), "no such file", "the hashes of what was merged", fix)
    check_files(result)
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
    with contextlib.suppress(PacktrainError):
        return training_in(read_manifest(result.folder))
    record = _record_of_checkpoint(result.folder) or (newest_manifest(result.run_dir) if result.run_dir else {})
    return training_in(record)


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
        check_own(run_dir, run_dir.model)
        return Result("model", run_dir.model, config, run_dir)
    for adapter, checkpoint in _adapters_of_run(run_dir):
        if (adapter / ADAPTER_CONFIG).exists():
            check_own(run_dir, adapter)
            return replace(_result_of_adapter(adapter, run_dir), checkpoint=checkpoint)
    raise UserError(
        str(run_dir.path), "the run has no adapter and no checkpoint yet", fix="let `packtrain train` save one"
    )


def check_own(run: RunDir, result: Path) -> None:
    """Refuses an ``adapter/`` or ``model/`` that another training left in a run, or that was copied there from one.

    Raises:
        UserError: the run has the checkpoint of that step, and it holds other weights.
    """
    try:
        made = read_manifest(result)
        checkpoint = run.step_dir(int(made["step"]))
        of_checkpoint = hashes_in(read_manifest(checkpoint))
    except (PacktrainError, KeyError, TypeError, ValueError):  # one of them says nothing of it
        return
    if not _is_made_from(made, of_checkpoint):
        found = f"made by another training than {checkpoint}, which is of the same step"
        fix = f"delete {result}, and `packtrain train` writes the run's own; to use this one, move it out of the run"
        raise UserError(str(result), found, "what the run itself trained", fix)


def hashes_in(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Of the files that a manifest lists: what tells one checkpoint from another."""
    return {name: entry["blake3"] for name, entry in manifest["files"].items()}


def _is_made_from(made: dict[str, Any], of_checkpoint: dict[str, str]) -> bool:
    if made.get("kind") == "model":
        return made.get("checkpoint", {}).get("files", of_checkpoint) == of_checkpoint
    own, weights = hashes_in(made).get(ADAPTER_WEIGHTS), of_checkpoint.get(f"adapter/{ADAPTER_WEIGHTS}")
    return own == weights or None in (own, weights)


def _result_of_adapter(folder: Path, run_dir: RunDir | None) -> Result:
    """By the adapter's own manifest; of one without by its checkpoint's, or its run's newest, and the run's recipe."""
    if (folder / MANIFEST).exists() and (record := read_manifest(folder)).get("kind") == "adapter":
        return Result("adapter", folder, _recipe_in(folder, record), run_dir, record.get("base"))
    config = load_recipe(run_dir.recipe) if run_dir else None
    base = (_record_of_checkpoint(folder) or (newest_manifest(run_dir) if run_dir else {})).get("base")
    if config is None and (quantization := (base or {}).get("quantization")):
        found = f"it was trained on a base in {quantization['type']}, and its recipe is not here"
        raise UserError(str(folder), found, "an adapter with its manifest, or in its run", "name it inside its run")
    return Result("adapter", folder, config, run_dir, base)


def _record_of_checkpoint(folder: Path) -> dict[str, Any]:
    """The manifest of the checkpoint that an adapter lies in; empty where it lies in none."""
    with contextlib.suppress(PacktrainError):
        record = read_manifest(folder.parent)
        return record if f"{folder.name}/{ADAPTER_WEIGHTS}" in record["files"] else {}
    return {}


def _recipe_in(folder: Path, record: dict[str, Any]) -> RunConfig:
    try:
        return RunConfig.model_validate(record.get("recipe"))
    except ValueError as error:
        reason = " ".join(str(error).split())[:300]
        fix = "use the version of packtrain that wrote it"
        raise PacktrainError(f"{folder / MANIFEST}: its recipe cannot be read: {reason}\n  fix: {fix}") from error


def _adapters_of_run(run_dir: RunDir) -> Iterator[tuple[Path, str]]:
    """The final adapter, and those of intact checkpoints with what they are, in words."""
    yield run_dir.adapter, ""
    best, names = run_dir.best_name(), [run_dir.step_dir(step).name for step in reversed(run_dir.steps())]
    for name in dict.fromkeys([*([best] if best else []), *names]):
        if damage := find_damage(run_dir.checkpoints / name):
            _warn_of(damage)
        else:
            which = "best" if name == best else "newest" if name == names[0] else "newest intact"
            state = run_dir.read_state().get("state", "in no recorded state")
            yield run_dir.checkpoints / name / "adapter", f"the {which} checkpoint, {name}, of a run that was {state}"


@cache
def _warn_of(damage: str) -> None:
    """Once: a command looks at a run several times."""
    logger.warning("%s. Trying another checkpoint", damage)


def check_files(result: Result) -> None:
    """Compares the files of a model or an adapter with the manifest beside them, or of the checkpoint they lie in.

    What other programs wrote has none. An adapter's config is another matter: a base that moved is named there by hand,
    and its other fields are compared with the recipe where it is read.

    Raises:
        UserError: the bytes are not those that were written.
    """
    if result.kind == "adapter":
        files = _files_of_adapter(result.folder)
        fix = f"copy it again; in a run, delete {result.folder}, and the run's best checkpoint counts"
    else:
        files = _files_of_model(result.folder)
        again = "`packtrain merge` what was merged, `packtrain train` what a run ends with"
        fix = f"copy it again, or delete {result.folder} and write it again: {again}"
    if (num_bytes := sum(entry["bytes"] for entry in files.values())) > MANY_BYTES:
        logger.info("comparing %.1f GiB in %s with the hashes of its manifest", num_bytes / 2**30, result.folder)
    if damage := find_file_damage(files):
        raise UserError(str(damage[0]), damage[1], fix=fix)


def _files_of_adapter(folder: Path) -> dict[Path, dict[str, Any]]:
    for home, prefix in ((folder, ""), (folder.parent, f"{folder.name}/")):
        if (home / MANIFEST).exists():
            entries = {name: e for name, e in read_manifest(home)["files"].items() if name.startswith(prefix)}
            if entries:
                return {home / name: e for name, e in entries.items() if Path(name).name != ADAPTER_CONFIG}
    return {}


def _is_foreign(manifest: Path) -> bool:
    """Whether another program wrote a file of that name; a broken one may be ours."""
    with contextlib.suppress(OSError, ValueError):
        record = json.loads(manifest.read_text(encoding="utf-8"))
        return isinstance(record, dict) and "kind" not in record
    return False


def _files_of_model(folder: Path) -> dict[Path, dict[str, Any]]:
    if not (folder / MANIFEST).exists() or _is_foreign(folder / MANIFEST):
        return {}
    return {folder / name: entry for name, entry in read_manifest(folder)["files"].items()}


def _recipe_of_model(folder: Path) -> RunConfig | None:
    """The recipe that a merged model's manifest, or the run around the folder, records."""
    with contextlib.suppress(PacktrainError, ValueError):  # no manifest, or another program's
        return RunConfig.model_validate(read_manifest(folder).get("recipe"))
    run_dir = enclosing_run(folder)
    return load_recipe(run_dir.recipe) if run_dir else None
