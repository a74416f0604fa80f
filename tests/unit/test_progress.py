"""What a user sees while training: plain lines in a pipe, a bar on a real (pseudo) terminal."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import struct
import subprocess
import sys
import termios
from typing import Any

import pytest

from trainer.metrics.progress import Progress


def record(step: int, **values: Any) -> dict[str, Any]:
    """The widest numbers a step can have."""
    numbers = {"loss": 12.3456, "lr": 2e-4, "tokens_per_second": 178_960.4, "gpu_memory_gib": 113.72, "mfu": 0.4523}
    return {"kind": "step", "step": step, **numbers, **values}


def test_plain_lines_every_log_every_steps(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="trainer.metrics.progress")
    now = [0.0]
    with Progress(total_steps=25, start_step=3, log_every=10, clock=lambda: now[0]) as progress:
        for step in range(4, 26):
            now[0] += 90
            progress.step(record(step))
    assert [message.split("/")[0] for message in caplog.messages] == ["step 4", "step 10", "step 20", "step 25"]
    assert caplog.messages[1] == "step 10/25 loss 12.3456 lr 2.0e-04 179k tok/s 113.7 GiB MFU 45% eta 0:22:30"


def test_lines_fit_80_columns(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="trainer.metrics.progress")
    now = [0.0]
    with Progress(total_steps=10_000, start_step=9_989, clock=lambda: now[0]) as progress:
        now[0] = 3_000
        progress.step(record(9_990))
    assert "eta 8:20:00" in caplog.text
    assert max(map(len, caplog.messages)) <= 80


def test_what_is_not_known_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="trainer.metrics.progress")
    with Progress(total_steps=2, clock=lambda: 0.0) as progress:
        progress.step(record(1, loss=None, mfu=None, gpu_memory_gib=None, tokens_per_second=87.2))
        progress.evaluation({"kind": "eval", "step": 1, "loss": 0.98765, "perplexity": 2.68492})
        progress.evaluation({"kind": "eval", "step": 1, "loss": None, "perplexity": None})
        progress.note("saved step_00000001")
    assert caplog.messages == [
        "step 1/2 loss - lr 2.0e-04 87 tok/s eta 0:00:00",
        "step 1: validation loss 0.9877, perplexity 2.685",
        "step 1: validation loss -, perplexity -",
        "saved step_00000001",
    ]


ON_TERMINAL = """
import logging, sys
from trainer.metrics.progress import Progress
logging.basicConfig(level=logging.INFO, format="%(message)s")
with Progress(total_steps=10_000, start_step=9_989) as progress:
    for step in range(9_990, 10_001):
        progress.step({"step": step, "loss": 12.3456, "lr": 2e-4, "tokens_per_second": 178960.0,
                       "gpu_memory_gib": 113.72, "mfu": 0.4523})
        if step == 9_995:
            progress.evaluation({"step": step, "loss": 0.5, "perplexity": 1.6487})
            logging.getLogger("anything").warning("[red]disk[/] is nearly full")
logging.getLogger("anything").info("after the bar")
"""


def test_bar_on_a_terminal_fits_and_lets_log_lines_pass_above() -> None:
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    hidden = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    with subprocess.Popen(
        [sys.executable, "-c", ON_TERMINAL],
        stderr=follower,
        stdout=subprocess.PIPE,
        env={**environment, "TERM": "xterm"},
    ) as process:
        os.close(follower)
        shown = read_all(leader)
    assert process.returncode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    lines = [line for line in re.split(r"[\r\n]+", text) if line]
    assert max(map(len, lines)) <= 80
    last_bar = next(line for line in reversed(lines) if line.startswith("10000/10000"))
    for part in ("━", "loss 12.3456", "lr 2.0e-04", "179k tok/s", "113.7 GiB", "MFU 45%", "eta 0:00:00"):
        assert part in last_bar, part
    for line in ("step 9995: validation loss 0.5000, perplexity 1.649", "[red]disk[/] is nearly full", "after the bar"):
        assert line in [shown_line.rstrip() for shown_line in lines], line


def read_all(descriptor: int) -> bytes:
    """Reads a terminal until its other side is closed, which Linux reports as an error."""
    content = b""
    while True:
        try:
            part = os.read(descriptor, 65536)
        except OSError:
            return content
        if not part:
            return content
        content += part
