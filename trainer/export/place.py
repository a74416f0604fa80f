"""Where a model may come to lie. Asked before any work, so that neither it nor a run is lost. Imports no torch."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from trainer.checkpoint.layout import UNFINISHED, RunDir, hash_file, read_manifest
from trainer.checkpoint.result import is_run
from trainer.errors import PacktrainError, UserError
from trainer.recipe import load_recipe

NEW = "a folder that does not exist yet"


def check_place(out: Path, source: Path) -> None:
    """Refuses an `out` that cannot become a folder, or where a run or somebody else's model lies.

    Args:
        source: folder of the adapter or checkpoint that the model is made from.

    Raises:
        UserError: it is there already, cannot be made, or lies inside a run or `source`.
    """
    _check_is_new(out, source)
    _check_can_be_made(out)
    for folder in out.resolve().parents:
        if is_run(folder):
            _check_in_run(out, RunDir(folder))
    check_apart(out, source)


def check_apart(out: Path, folder: Path) -> None:
    """Raises UserError where `out` lies inside `folder`, of which the model is made."""
    if out.resolve().is_relative_to(folder.resolve()):
        found = f"{out} lies inside {folder}, of which it is made"
        raise UserError("--out", found, f"{NEW}, outside of it", "name another")


def _check_is_new(out: Path, source: Path) -> None:
    if out.is_symlink() and not out.exists():
        raise UserError("--out", f"{out} is a link to {out.readlink()}, which is not there", NEW, "remove the link")
    if out.exists():
        found, fix = _describe(out, source)
        raise UserError("--out", found, NEW, fix)
    if out.name.endswith(UNFINISHED):
        found = f"{out} has the name of an unfinished folder"
        raise UserError("--out", found, f"a name that does not end with {UNFINISHED}", "name another")


def _describe(out: Path, source: Path) -> tuple[str, str]:
    """What is at `out`, and what to do."""
    with contextlib.suppress(PacktrainError, KeyError, TypeError, AttributeError):  # of another program
        record = read_manifest(out)
        if record["kind"] == "merged":
            files = record["adapter"]["files"].items()
            is_own = all((source / name).is_file() and hash_file(source / name) == known for name, known in files)
            is_proven = not record.keys().isdisjoint({"verified", "validation_loss"})
            found = f"{out} exists: merged from {'this' if is_own else 'another'} adapter onto the "
            found += f"{record['merged_onto']} base, {'verified' if is_proven else 'not verified'}"
            use = "use it, " if is_proven else f"prove it by `packtrain verify {out}` and use it, "
            return found, f"{use if is_own else ''}name another --out for one beside it, or remove it and merge anew"
    return f"{out} exists", "remove it or name another"


def _check_can_be_made(out: Path) -> None:
    parent = next(parent for parent in out.absolute().parents if os.path.lexists(parent))
    if not parent.is_dir():
        raise UserError("--out", f"{parent}, which {out} would lie in, is no folder", NEW, "name another")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError("--out", f"{parent} cannot be written", "a folder in one that you may write", "name another")


def _check_in_run(out: Path, run: RunDir) -> None:
    """A training writes and deletes in its run dir, and takes ``merged/`` for its adapter's."""
    place = out.resolve()
    is_adapters = load_recipe(run.recipe).adapter is not None
    is_free = place.name.startswith("merged-") or (place.name == run.merged.name and is_adapters)
    if place.parent != run.path or not is_free:
        places = [*([str(run.merged)] if is_adapters else []), f"{run.merged}-NAME", "a folder outside of the run"]
        found = f"{out} lies inside the run {run.path}, where a training writes and deletes"
        raise UserError("--out", found, f"{', '.join(places)}; none that exists", "name one of these")
