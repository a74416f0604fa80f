"""Where everything of a run lies, and how files get there whole. Imports no torch.

A run dir::

    recipe.yaml                 resolved recipe; nothing later rereads the original
    metrics.jsonl               one line a step, evaluation, sample or event
    state.json                  running, done, failed, preempted, cancelled; step; reason; time; blamed (a host)
    checkpoints/step_00000100/  dcp/, adapter/ (as at the end) or serving/, and manifest.json, written last
    best                        name of the best checkpoint's folder
    adapter/ or model/          the result: all that it was trained with but the adapter's base, and manifest.json
    merged/                     base and adapter as one model; merged-NAME: others, which no training touches
    logs/rank_0.log  tensorboard/  report.html
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from blake3 import blake3

from trainer.errors import PacktrainError

MANIFEST = "manifest.json"
UNFINISHED = ".unfinished"
STEP_NAME = re.compile(r"step_(\d{8})")
State = Literal["running", "done", "failed", "preempted", "cancelled"]


@dataclass(frozen=True)
class RunDir:
    """Paths inside one run's folder."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def state(self) -> Path:
        return self.path / "state.json"

    @property
    def job(self) -> Path:
        """There where the run was submitted; `slurm` writes it."""
        return self.path / "job.json"

    @property
    def out_of_memory(self) -> Path:
        """There where a GPU's memory ran out: the sizes that the next start has to stay below."""
        return self.path / "out_of_memory.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def merged(self) -> Path:
        return self.path / "merged"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def write_state(self, state: State, step: int, reason: str = "", **extra: Any) -> None:
        """Records where the run stands; whoever watches it reads this file, not an exit status.

        Args:
            extra: facts of this start (when, by which process), kept while it is running.
        """
        before = self.read_state() if state == "running" else {}
        kept = before if before.get("state") == "running" else {}
        # With the time no two records are alike: a job sees whether its own run has said something.
        record = {**kept, "state": state, "step": step, "reason": reason, "time": time.time(), **extra}
        write_atomically(self.state, json.dumps(record, indent=1) + "\n")

    def read_state(self) -> dict[str, Any]:
        """The last recorded state; empty before the first, and of a file that somebody else has written."""
        try:
            return dict(json.loads(self.state.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return {}

    def best_name(self) -> str:
        """Name of the best checkpoint's folder; empty where none was noted."""
        return self.best.read_text(encoding="utf-8", errors="replace").strip() if self.best.is_file() else ""

    def best_step(self) -> int | None:
        """Step of the checkpoint ``best`` points at, if it is there."""
        match = STEP_NAME.fullmatch(self.best_name())
        step = int(match[1]) if match else None
        return step if step in self.steps() else None

    def steps(self) -> list[int]:
        """Steps with a committed checkpoint (its manifest is there), oldest first."""
        if not self.checkpoints.is_dir():
            return []
        found = [STEP_NAME.fullmatch(entry.name) for entry in self.checkpoints.iterdir()]
        return sorted(int(m[1]) for m in found if m and (self.checkpoints / m[0] / MANIFEST).exists())

    def step_dir(self, step: int) -> Path:
        """Folder of the checkpoint of `step`, committed or not."""
        return self.checkpoints / f"step_{step:08d}"


def write_atomically(path: Path, text: str) -> None:
    """Replaces `path` by `text`: a reader or a crash sees the old text or the new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with named(path), open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """What the system refuses inside says which file it was for: of a write it does not say so itself."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def sync(path: Path) -> None:
    """Makes a file's bytes, or renames and new files inside a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """blake3 of a file's bytes, in hex. Multi-threaded and memory-mapped."""
    hasher = blake3(max_threads=blake3.AUTO)
    hasher.update_mmap(path)
    return hasher.hexdigest()


def unfinished(final: Path) -> Path:
    """Where `final` is filled until it is complete."""
    return final.with_name(final.name + UNFINISHED)


def begin_folder(final: Path) -> Path:
    """An empty folder to fill, named `final` + `UNFINISHED`, for `commit_folder`."""
    temporary = unfinished(final)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def commit_folder(temporary: Path, final: Path) -> None:
    """Syncs everything in `temporary` and renames it to `final`, which must not exist."""
    for entry in [*temporary.rglob("*"), temporary]:
        sync(entry)
    os.rename(temporary, final)
    sync(final.parent)


def remove_folder(folder: Path) -> None:
    """Deletes a committed folder: a kill meanwhile leaves none that looks committed and lacks files."""
    leftover = unfinished(folder)
    shutil.rmtree(leftover, ignore_errors=True)
    os.rename(folder, leftover)
    shutil.rmtree(leftover)


def describe_file(path: Path) -> dict[str, Any]:
    """A manifest's entry of a file: size and hash."""
    return {"bytes": path.stat().st_size, "blake3": hash_file(path)}


def write_manifest(folder: Path, record: dict[str, Any], files: dict[str, dict[str, Any]] | None = None) -> None:
    """Writes ``manifest.json``: `record` plus size and blake3 of every other file in `folder`, but for unfinished ones.

    Args:
        files: entries that are known already, by the file's path in `folder`.
    """
    entries = dict(files or {})
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and path.name != MANIFEST and path.suffix != UNFINISHED and name not in entries:
            entries[name] = describe_file(path)
    write_atomically(folder / MANIFEST, json.dumps({**record, "files": entries}, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a committed folder.

    Raises:
        PacktrainError: there is none, or it is not one that `write_manifest` wrote.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict) or not manifest["files"]:
            raise ValueError("it lists no files")
        if damaged := [name for name, entry in manifest["files"].items() if not _is_entry(entry)]:
            raise ValueError(f"of {damaged[0]} it has no size and hash")
    except (OSError, ValueError) as error:
        raise PacktrainError(f"{folder / MANIFEST}: no readable manifest ({error})") from error
    return manifest


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("blake3"), str)


def newest_manifest(run: RunDir) -> dict[str, Any]:
    """Of the newest checkpoint whose manifest can be read; empty where there is none."""
    for step in reversed(run.steps()):
        with contextlib.suppress(PacktrainError):
            return read_manifest(run.step_dir(step))
    return {}


def find_damage(folder: Path, check: Callable[[], None] = lambda: None) -> str | None:
    """Compares every file of a committed folder with its manifest.

    Args:
        check: called before each file; what it raises ends the comparison.

    Returns:
        What is wrong with the first file that differs, or None when all bytes are as written.
    """
    try:
        manifest = read_manifest(folder)
    except PacktrainError as error:
        return str(error)
    found = find_file_damage({folder / name: expected for name, expected in manifest["files"].items()}, check)
    return f"{found[0]} {found[1]}" if found else None


def find_file_damage(
    files: Mapping[Path, dict[str, Any]], check: Callable[[], None] = lambda: None
) -> tuple[Path, str] | None:
    """The first of some files that is not as its manifest's entry says, and what is wrong with it.

    All sizes are compared before the first byte is read.
    """
    for path, expected in files.items():
        if not path.exists():
            return path, "is missing"
        if path.stat().st_size != expected["bytes"]:
            return path, f"has {path.stat().st_size} bytes, its manifest says {expected['bytes']}"
    for path, expected in files.items():
        check()
        if hash_file(path) != expected["blake3"]:
            return path, "does not have the hash its manifest says"
    return None
