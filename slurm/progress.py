"""How far a run is, by the first and the last lines of its metrics.jsonl, however long that is. Imports no torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint.layout import RunDir, newest_manifest

HEAD_BYTES = 1 << 16  # the start event is among the first lines
TAIL_BYTES = (1 << 17, 1 << 22)  # some 500 steps; where the last evaluation is not among them, more
MOST_STEPS = 100  # that a time per step is taken from
LEAST_QUIET_SECONDS, QUIET_STEPS = 300.0, 10  # a run is quiet for so long, and for so many of its longest steps


@dataclass(frozen=True)
class Progress:
    """Where a run stands. What it has not come to yet, or never measures, is None.

    Attributes:
        step: last optimizer step done, saved or not.
        loss, tokens_per_second: of that step.
        validation_loss: of the last evaluation.
        best_validation_loss: the lowest one.
        seconds_per_step: lately, with evaluations and checkpoints.
        longest_step: the longest of these steps or evaluations, in seconds.
        written: when the file was last written, seconds since 1970.
    """

    step: int = 0
    total_steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    validation_loss: float | None = None
    best_validation_loss: float | None = None
    seconds_per_step: float | None = None
    longest_step: float = 0.0
    written: float | None = None

    @property
    def eta_seconds(self) -> float | None:
        """Seconds that the remaining steps take."""
        if self.total_steps is None or self.seconds_per_step is None:
            return None
        return max(0, self.total_steps - self.step) * self.seconds_per_step

    def quiet_seconds(self, now: float) -> float | None:
        """How long nothing was written, where that is longer than the run's own pace explains."""
        if self.written is None:
            return None
        quiet = now - self.written
        return quiet if quiet > max(LEAST_QUIET_SECONDS, QUIET_STEPS * self.longest_step) else None


def read_progress(run: RunDir) -> Progress:
    """Reads little of a big file."""
    try:
        status = os.stat(run.metrics)
    except OSError:
        return Progress()
    records: list[dict[str, Any]] = []
    for size in TAIL_BYTES:
        records = list(_records(run.metrics, max(0, status.st_size - size), size))
        if status.st_size <= size or any(record["kind"] == "eval" for record in records):
            break
    steps = [record for record in records if record["kind"] == "step"]
    losses = [_number(record, "loss") for record in records if record["kind"] == "eval"]
    evals = [loss for loss in losses if loss is not None]
    last = steps[-1] if steps else {}
    best = [loss for loss in (*evals, _saved_best(run) if evals else None) if loss is not None]
    return Progress(
        step=last.get("step", 0),
        total_steps=_total_steps(run.metrics),
        loss=_number(last, "loss"),
        tokens_per_second=_number(last, "tokens_per_second"),
        validation_loss=evals[-1] if evals else None,
        best_validation_loss=min(best, default=None),
        seconds_per_step=_seconds_per_step(records),
        longest_step=max((_number(one, "seconds") or 0.0 for one in records if one["kind"] != "event"), default=0.0),
        written=status.st_mtime,
    )


def _records(path: Path, start: int, size: int) -> Iterator[dict[str, Any]]:
    """The whole lines in a part of the file; damaged ones are left out."""
    with open(path, "rb") as file:
        file.seek(start)
        if start:
            file.readline()
        for line in file.read(size).splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and "kind" in record and isinstance(record.get("step"), int):
                yield record


def _total_steps(path: Path) -> int | None:
    starts = [record for record in _records(path, 0, HEAD_BYTES) if record.get("event") == "start"]
    number = _number(starts[-1], "num_steps") if starts else None
    return None if number is None else int(number)


def _saved_best(run: RunDir) -> float | None:
    """As the newest checkpoint remembers it: evaluations before the lines that were read count too."""
    return _number(newest_manifest(run).get("progress", {}).get("loop", {}), "best_loss")


def _seconds_per_step(records: list[dict[str, Any]]) -> float | None:
    """Evaluations and waits for checkpoints among the last steps count, as they do in the time that remains."""
    num_steps, seconds = 0, 0.0
    for record in reversed(records):
        num_steps += record["kind"] == "step"
        if num_steps > MOST_STEPS:
            break
        seconds += _number(record, "seconds") or 0.0
    num_steps = min(num_steps, MOST_STEPS)
    return seconds / num_steps if num_steps else None


def _number(record: dict[str, Any], name: str) -> float | None:
    """None also where something else was written."""
    value = record.get(name)
    return value if isinstance(value, int | float) and math.isfinite(value) else None
