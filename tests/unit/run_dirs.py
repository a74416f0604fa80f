"""Run dirs as submissions and their jobs leave them, without any run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NOW = time.time()


def make_run(
    folder: Path,
    job_id: str | None = "12",
    *,
    state: str = "",
    reason: str = "",
    started: float = NOW - 3000,
    steps: int = 0,
    total_steps: int | None = 1000,
    saved: int = 0,
    best_loss: float | None = None,
    evals: dict[int, float] | None = None,
    quiet: float = 1.0,
    attempts: Iterable[dict[str, Any]] = (),
    then: Iterable[tuple[str, str]] = (),
    **submission: Any,
) -> Path:
    """A run dir. Each step took 2 s; metrics.jsonl was written `quiet` seconds ago.

    Args:
        job_id: None: not submitted.
        saved: step of a checkpoint.
        evals: validation loss by step.
    """
    folder.mkdir(parents=True)
    if job_id is not None:
        job = {
            "job_id": job_id,
            "name": folder.name,
            "submission": str(folder / "submissions" / "0001"),
            "submitted": NOW - 4000,
            "nodes": 2,
            "gpus_per_node": 4,
            "tasks_per_node": 4,
            "time_minutes": 240,
            "partition": None,
            "max_restarts": 100,
            "then": [
                {
                    "command": command,
                    "job_id": follower,
                    "log": str(folder / "submissions" / "0001" / "script" / f"{follower}_0_log.out"),
                }
                for command, follower in then
            ],
        }
        (folder / "job.json").write_text(json.dumps(job | submission))
        write_lines(folder / "attempts.jsonl", [{"event": "submit", "time": int(NOW - 4000)}, *attempts])
    if state:
        record = {"state": state, "step": saved, "reason": reason, "started": started}
        (folder / "state.json").write_text(json.dumps(record))
    if saved:
        files = {"dcp/.metadata": {"bytes": 1, "blake3": "0"}}
        manifest = {"files": files, "progress": {"loop": {"best_loss": best_loss}}}
        checkpoint = folder / "checkpoints" / f"step_{saved:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    if steps:
        _write_metrics(folder / "metrics.jsonl", steps, total_steps, evals or {}, quiet)
    return folder


def start(ago: float, job_id: str = "12", restart: int = 0, nodes: str = "n[1-2]", step: int = 0) -> dict[str, Any]:
    """A line of attempts.jsonl."""
    time = int(NOW - ago)
    return {"event": "start", "time": time, "job_id": job_id, "restart": restart, "nodes": nodes, "step": step}


def end(ago: float, state: str, step: int, action: str, why: str = "", status: int = 75) -> dict[str, Any]:
    """A line of attempts.jsonl."""
    time = int(NOW - ago)
    return {"event": "end", "time": time, "status": status, "state": state, "step": step, "action": action, "why": why}


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record, separators=(",", ":")) + "\n" for record in records))


def _write_metrics(path: Path, steps: int, total: int | None, evals: dict[int, float], quiet: float) -> None:
    numbers = {} if total is None else {"num_steps": total}
    records: list[dict[str, Any]] = [{"kind": "event", "step": 0, "event": "start", "text": "lora", **numbers}]
    for step in range(1, steps + 1):
        records.append(
            {
                "kind": "step",
                "step": step,
                "loss": 2.0 + 1 / step,
                "lr": 1e-4,
                "grad_norm": 0.5,
                "tokens": 65536,
                "trained_tokens": 50000,
                "tokens_per_second": 17123.4,
                "mfu": None,
                "gpu_memory_gib": None,
                "seconds": 2.0,
            }
        )
        if step in evals:
            loss = evals[step]
            records.append({"kind": "eval", "step": step, "loss": loss, "perplexity": 9.0, "seconds": 10.0})
    write_lines(path, records)
    os.utime(path, (NOW - quiet, NOW - quiet))
