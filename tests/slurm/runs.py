"""Runs that tests submit to a real SLURM, and what they look at."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import Cluster

from trainer.checkpoint.layout import RunDir

ENDED = {"done", "failed", "cancelled"}
STEPS = 300
SAVE_EVERY = 20


class Submitted:
    """A run dir that `packtrain submit` filled, and the cluster it runs on."""

    def __init__(self, cluster: Cluster, path: Path) -> None:
        self.cluster, self.path, self.run = cluster, path, RunDir(path)

    @property
    def job(self) -> dict[str, Any]:
        return json.loads((self.path / "job.json").read_text())

    @property
    def job_id(self) -> str:
        return self.job["job_id"]

    @property
    def state(self) -> str:
        return self.run.read_state().get("state", "")

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Lines of attempts.jsonl: ``start``, ``end`` or ``submit``."""
        return [line for line in _lines(self.path / "attempts.jsonl") if line["event"] == kind]

    def steps(self) -> dict[int, float]:
        """Loss by step, as metrics.jsonl has it; a step that is there twice fails."""
        found = [(line["step"], line["loss"]) for line in _lines(self.run.metrics) if line["kind"] == "step"]
        assert len(dict(found)) == len(found), "a step was recorded twice"
        return dict(found)

    def last_step(self) -> int:
        """Tolerates a last line that is being written."""
        return max((line["step"] for line in _lines(self.run.metrics) if line["kind"] == "step"), default=0)

    def output(self) -> str:
        """What all tasks and the batch shell have said."""
        files = sorted((self.path / "submissions").glob("*/script/*.out"))
        return "\n".join(f"== {file.name}\n{file.read_text(errors='replace')}" for file in files)

    def wait_for(self, what: Callable[[], object], timeout: float, name: str) -> None:
        """Waits; what the job said is part of the failure."""
        try:
            self.cluster.wait_until(what, timeout, name)
        except TimeoutError as error:
            shown = self.cluster.run("squeue", check=False).stdout
            attempts = (self.path / "attempts.jsonl").read_text() if (self.path / "attempts.jsonl").exists() else ""
            state = self.run.read_state()
            pytest.fail(f"{error}\n{shown}\n{state}\n{attempts}\n{self.output()[-6000:]}")

    def wait_for_step(self, step: int, timeout: float = 90) -> None:
        self.wait_for(lambda: self.last_step() >= step, timeout, f"step {step}, is at {self.last_step()}")

    def wait_for_end(self, timeout: float = 240, state: str = "done") -> None:
        """Until the job has left the queue for good, in `state`."""
        self.wait_for(lambda: self.state in ENDED and not self.is_queued(), timeout, "the run's end")
        assert self.state == state, f"{self.run.read_state()}\n{self.output()[-6000:]}"

    def is_queued(self) -> bool:
        return bool(self.cluster.run("squeue", "-h", "-j", self.job_id, check=False).stdout.strip())

    def kill_rank(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Sends a signal to one process of the run; nodes' processes are processes of this machine."""
        found = [pid for pid, environ in self.processes() if environ.get("SLURM_PROCID") == str(rank)]
        assert len(found) == 1, found
        os.kill(found[0], number)

    def processes(self) -> list[tuple[int, dict[str, str]]]:
        """The trainer's processes, with their environments."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if not entry.name.isdigit() or f"--run-dir\0{self.path}\0" not in (entry / "cmdline").read_text():
                    continue
                lines = (entry / "environ").read_text(errors="replace").split("\0")
            except OSError:
                continue
            environ = dict(line.partition("=")[::2] for line in lines)
            found.append((int(entry.name), environ))
        return found

    def saved_steps(self) -> list[int]:
        return self.run.steps()


class Submitter:
    """`packtrain submit` in this process, against a cluster."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any]) -> None:
        self.folder, self.monkeypatch, self.recipe = folder, monkeypatch, recipe

    def __call__(self, cluster: Cluster, *options: str, name: str = "run", **sections: Any) -> Submitted:
        """Queues the toy recipe with `sections` merged over it."""
        from launch.cli import main

        home = self.folder / name
        with self.on(cluster):
            status = main(["submit", str(self.write(name, **sections)), "--run-dir", str(home), *options])
        assert status == 0
        return Submitted(cluster, home)

    @contextmanager
    def on(self, cluster: Cluster) -> Iterator[None]:
        """SLURM's commands of this process go to `cluster`."""
        with self.monkeypatch.context() as patch:
            for variable in set(os.environ) | set(cluster.environ):
                if variable.startswith(("SLURM_", "SBATCH_")) or variable == "PATH":
                    if variable in cluster.environ:
                        patch.setenv(variable, cluster.environ[variable])
                    else:
                        patch.delenv(variable, raising=False)
            yield

    def write(self, name: str, **sections: Any) -> Path:
        merged = dict(self.recipe)
        for key, section in sections.items():
            merged[key] = {**merged.get(key, {}), **section} if isinstance(section, dict) else section
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(merged), encoding="utf-8")
        return path


def toy(model: Path, rows: Path) -> dict[str, Any]:
    """A LoRA run of some seconds on the CPU, one task on each of two nodes."""
    return {
        "model": {"path": str(model), "dtype": "float32"},
        "adapter": {"r": 4},
        "data": {
            "train": [{"path": str(rows), "format": "messages"}],
            "split": {"validation": 0.1},
            "pack_length": 128,
        },
        "optim": {"lr": 1.0e-3},
        "train": {
            "max_steps": STEPS,
            "global_batch": {"rows": 4},
            "micro_batch": 1,
            "recompute": "none",
            "device": "cpu",
            "log_every": 50,
        },
        "eval": {"every_steps": 100},
        "checkpoint": {"every_steps": SAVE_EVERY, "keep": 2, "keep_best": False},
        "tracking": {"to": []},
        "slurm": {"nodes": 2, "gpus_per_node": 1, "time": "30", "stop_seconds": 30, "cpu_partition": "cpu"},
    }


def assert_uninterrupted(run: Submitted, reference: dict[int, float]) -> None:
    """Every step was done once, on the samples and with the loss of a run that nothing interrupted."""
    found = run.steps()
    assert found.keys() == reference.keys()
    wrong = {step: (found[step], loss) for step, loss in reference.items() if abs(found[step] - loss) > 1e-4 * loss}
    assert not wrong


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
