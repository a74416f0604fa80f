"""The code, recipes and environment of the moment of submission, in a folder of the run that nobody edits."""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import glob
import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3

from trainer.checkpoint.layout import write_atomically
from trainer.config import RunConfig, Source
from trainer.errors import UserError
from trainer.recipe import dump_recipe

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("launch", "slurm", "trainer")
RECORDED = (
    *("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "deepspeed", "submitit"),
    *("safetensors", "tokenizers", "numpy", "vllm"),
)


def next_submission(home: Path) -> Path:
    """The folder of the next submission of a run or a sweep: ``submissions/0001`` and so on."""
    taken = [int(entry.name) for entry in (home / "submissions").glob("[0-9]*") if entry.name.isdigit()]
    return home / "submissions" / f"{max(taken, default=0) + 1:04d}"


def make_submission(folder: Path) -> Path:
    """Makes the folder of a submission.

    Raises:
        UserError: somebody else has submitted since `folder` was chosen.
    """
    try:
        folder.mkdir()
    except FileExistsError as error:
        raise UserError(str(folder), "is being submitted by another process", fix="see packtrain status") from error
    return folder


@contextlib.contextmanager
def submitting(home: Path) -> Iterator[None]:
    """Inside, nobody else submits this run or sweep; only its owner may enter `home`, which need not be there yet.

    Raises:
        UserError: somebody does.
    """
    (home / "submissions").mkdir(parents=True, exist_ok=True)
    home.chmod(0o700)
    with open(home / "submissions" / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(str(home), "is being submitted by another process", fix="see packtrain status") from error
        except OSError:  # a file system without locks
            pass
        yield


def check_not_submitting(home: Path) -> None:
    """Raises UserError where somebody else is submitting this run or sweep."""
    if (home / "submissions" / ".lock").exists():
        with submitting(home):
            pass


def take_snapshot(submission: Path, configs: Sequence[RunConfig], run_dirs: Sequence[Path]) -> None:
    """Writes what the job needs into `submission`, one recipe and run dir for each task of an array."""
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, submission / "code" / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
        )
    for index, config in enumerate(configs):
        frozen = _keep_template(config, submission.parent)
        write_atomically(submission / "recipes" / f"{index}.yaml", dump_recipe(frozen))
    write_atomically(submission / "runs", "".join(f"{run_dir}\n" for run_dir in run_dirs))
    write_atomically(submission / "environment.json", json.dumps(_environment(), indent=1) + "\n")


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Local files by their whole path: a job starts in another folder."""
    data = config.data
    split = data.split.model_copy(
        update={
            name: [_absolute_source(source) for source in found]
            for name in ("validation", "test")
            if isinstance(found := getattr(data.split, name), list)
        }
    )
    changed_data = {
        "train": [_absolute_source(source) for source in data.train],
        "split": split,
        "template": _absolute(data.template) if data.template.endswith(".jinja") else data.template,
    }
    changed_model = {"path": _absolute(config.model.path)}
    if config.model.tokenizer:
        changed_model["tokenizer"] = _absolute(config.model.tokenizer)
    return config.model_copy(
        update={"data": data.model_copy(update=changed_data), "model": config.model.model_copy(update=changed_model)}
    )


def _absolute_source(source: Source) -> Source:
    path = os.path.abspath(os.path.expanduser(source.path)) if glob.has_magic(source.path) else _absolute(source.path)
    return source.model_copy(update={"path": path})


def _absolute(path: str) -> str:
    """Of what exists here; else it is a hub id."""
    found = Path(path).expanduser()
    return os.path.abspath(found) if found.exists() else path


def _keep_template(config: RunConfig, folder: Path) -> RunConfig:
    """Copies a Jinja file beside the submissions, named by its content, so that a resubmitted run finds the same."""
    if not config.data.template.endswith(".jinja"):
        return config
    content = Path(config.data.template).read_bytes()
    copy = folder / f"template-{blake3(content).hexdigest()[:16]}.jinja"
    if not copy.exists():
        write_atomically(copy, content.decode())
    return config.model_copy(update={"data": config.data.model_copy(update={"template": str(copy)})})


def _environment() -> dict[str, Any]:
    versions = {}
    for name in RECORDED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "submitted": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "by": getpass.getuser(),
        "host": socket.gethostname(),
        "from": os.getcwd(),
        "command": sys.argv,
        "python": sys.version.split()[0],
        "executable": sys.executable,
        "code": str(ROOT),
        "commit": _git("rev-parse", "HEAD"),
        "edited": [line[3:] for line in _git("status", "--porcelain", "--", *PACKAGES).splitlines()],
        "packages": versions,
        "variables": {
            name: value
            for name, value in os.environ.items()
            if re.match(r"(HF|NCCL|CUDA|PACKTRAIN)_", name) and "TOKEN" not in name
        },
    }


def _git(*arguments: str) -> str:
    """Empty where this is no clone."""
    try:
        found = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
