"""What a run shows while it trains: a bar on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

logger = logging.getLogger(__name__)

ETA_WINDOW = 100  # steps; evaluations among them count, as they do in the time that remains


class Progress:
    """Follows the steps of a run.

    On a terminal a bar is redrawn in place and log lines scroll above it; elsewhere a line is logged every `log_every`
    steps. Evaluations and notes are log lines (level INFO) in both. A line and the bar fit 80 columns.

    Args:
        total_steps: of the whole run.
        start_step: steps done before this process began.
        log_every: steps between plain lines; the first and the last step always get one.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        log_every: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._first, self._log_every, self._clock = total_steps, start_step + 1, log_every, clock
        self._times: deque[tuple[int, float]] = deque([(start_step, clock())], maxlen=ETA_WINDOW)
        self._bar = _Bar(total_steps, start_step) if sys.stderr.isatty() else None

    def step(self, record: Mapping[str, Any]) -> None:
        """Shows a "step" record of metrics.jsonl; what it lacks or has as None is left out."""
        step = record["step"]
        self._times.append((step, self._clock()))
        text = " ".join([*_numbers(record), f"eta {self._eta(step)}"])
        if self._bar:
            self._bar.update(step, text)
        elif step % self._log_every == 0 or step in (self._first, self._total):
            logger.info("step %d/%d %s", step, self._total, text)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Shows an "eval" record of metrics.jsonl."""
        loss, perplexity = _number(record.get("loss"), ".4f"), _number(record.get("perplexity"), ".4g")
        logger.info("step %d: validation loss %s, perplexity %s", record["step"], loss, perplexity)

    def note(self, text: str) -> None:
        """Shows something that happened."""
        logger.info(text)

    def close(self) -> None:
        """Leaves the bar as it stands and gives the terminal back. May be called twice."""
        if self._bar:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _eta(self, step: int) -> str:
        first_step, first_time = self._times[0]
        if step <= first_step:
            return "-"
        seconds = (self._times[-1][1] - first_time) / (step - first_step) * (self._total - step)
        return str(timedelta(seconds=round(seconds))).replace(" days, ", "d").replace(" day, ", "d")


def _numbers(record: Mapping[str, Any]) -> list[str]:
    """A step's numbers, shortest useful form first to last in importance."""
    texts = [f"loss {_number(record.get('loss'), '.4f')}"]
    if record.get("lr") is not None:
        texts.append(f"lr {record['lr']:.1e}")
    if record.get("tokens_per_second") is not None:
        texts.append(f"{_thousands(record['tokens_per_second'])} tok/s")
    if record.get("gpu_memory_gib") is not None:
        texts.append(f"{record['gpu_memory_gib']:.1f} GiB")
    if record.get("mfu") is not None:
        texts.append(f"MFU {record['mfu']:.0%}")
    return texts


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _thousands(value: float) -> str:
    """At most five characters: 87, 1,234, 17.9k, 1.2M."""
    if value < 9_999.5:
        return f"{value:,.0f}"
    for divisor, unit in ((1e3, "k"), (1e6, "M")):
        if value < 99.95 * divisor:
            return f"{value / divisor:.1f}{unit}"
        if value < 999.5 * divisor:
            return f"{value / divisor:.0f}{unit}"
    return f"{value / 1e9:.1f}G"


class _Bar:
    """The bar itself. While it stands, log lines written to stderr go through it, else they would cut into it."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        self._progress = RichProgress(
            TextColumn("{task.completed}/{task.total}", style="bold"),
            BarColumn(bar_width=None),
            TextColumn("{task.description}", markup=False),
            console=Console(stderr=True),
            expand=True,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task("", total=total_steps, completed=start_step)
        self._stderr = sys.stderr
        self._progress.start()  # from here on sys.stderr is rich's, which prints above the bar
        _move_log_handlers(self._stderr, sys.stderr)

    def update(self, step: int, text: str) -> None:
        self._progress.update(self._task, completed=step, description=text)

    def close(self) -> None:
        _move_log_handlers(sys.stderr, self._stderr)
        self._progress.stop()


def _move_log_handlers(source: TextIO, target: TextIO) -> None:
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is source:
            handler.setStream(target)
