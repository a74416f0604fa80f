"""metrics.jsonl through crashes and resumes; TensorBoard and wandb as their own readers see them."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from trainer.checkpoint.layout import RunDir, write_atomically
from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.metrics.trackers import MetricsLog, Trackers, check_trackers, read_metrics


def config_with(*trackers: str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": "toy"},
            "data": {"train": [{"path": "rows.jsonl", "format": "messages"}]},
            "tracking": {"to": list(trackers), "project": "packtrain-tests"},
        }
    )


def step(number: int, **values: Any) -> dict[str, Any]:
    return {"kind": "step", "step": number, **values}


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def test_every_line_is_json_and_nan_is_null(run_dir: RunDir) -> None:
    with MetricsLog(run_dir) as log:
        log.write(step(1, loss=math.nan, grad_norm=math.inf, lr=1e-4, nested={"values": [1.0, -math.inf]}))
        lines = run_dir.metrics.read_text().splitlines()  # while the log is still open

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(lines[0], parse_constant=refuse) == {
        **step(1, loss=None, grad_norm=None, lr=1e-4),
        "nested": {"values": [1.0, None]},
    }


def test_resume_drops_what_is_past_its_step_and_keeps_events(run_dir: RunDir) -> None:
    with MetricsLog(run_dir) as log:
        for number in range(1, 6):
            log.write(step(number, loss=float(number)))
            log.write({"kind": "eval", "step": number, "loss": 1.0})
            log.write({"kind": "sample", "step": number, "prompt": "p", "answer": "a"})
        log.write({"kind": "event", "step": 5, "event": "preempted", "text": "time limit"})
    with MetricsLog(run_dir) as log:
        log.truncate_after(3)
        log.write(step(4, loss=40.0))
    kept = [(r["kind"], r["step"]) for r in read_metrics(run_dir.metrics)]
    expected = [(kind, number) for number in (1, 2, 3) for kind in ("step", "eval", "sample")]
    assert kept == [*expected, ("event", 5), ("step", 4)]
    assert [p.name for p in run_dir.path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("half", ['{"kind": "step", "st', '{"kind": "step", "step": 3, "text": "\\ud83d', "\x00\x00"])
def test_half_written_last_line_is_cut_and_the_log_goes_on(run_dir: RunDir, half: str) -> None:
    with MetricsLog(run_dir) as log:
        log.write(step(1))
        log.write(step(2))
    with open(run_dir.metrics, "a") as file:
        file.write(half)
    with MetricsLog(run_dir) as log:
        log.write(step(3))
    assert [json.loads(line)["step"] for line in run_dir.metrics.read_text().splitlines()] == [1, 2, 3]


def test_damaged_line_in_the_middle_is_named(run_dir: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    write_atomically(run_dir.metrics, f"{json.dumps(step(1))}\ngarbage\n[3]\n{json.dumps(step(2))}\n")
    assert [r["step"] for r in read_metrics(run_dir.metrics)] == [1, 2]
    assert "line 2 is damaged" in caplog.text and "line 3 is damaged" in caplog.text


def test_lines_survive_kill_minus_nine(run_dir: RunDir) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from trainer.checkpoint.layout import RunDir; from trainer.metrics.trackers import MetricsLog\n"
        "log = MetricsLog(RunDir(Path(sys.argv[1])))\n"
        "for step in range(1, 51): log.write({'kind': 'step', 'step': step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    process = subprocess.run([sys.executable, "-c", code, str(run_dir.path)], check=False)
    assert process.returncode == -signal.SIGKILL
    assert [r["step"] for r in read_metrics(run_dir.metrics)] == list(range(1, 51))


def read_tensorboard(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def test_tensorboard_shows_one_curve_after_a_resume(run_dir: RunDir) -> None:
    write_atomically(run_dir.recipe, "model:\n  path: toy\n")
    with Trackers(config_with("tensorboard"), run_dir) as trackers:
        for number in range(1, 6):
            trackers.log({"train/loss": 10.0 + number, "train/mfu": None}, number)
    time.sleep(1.0)  # TensorBoard reads files by the second of their names; no start comes in that of another
    with Trackers(config_with("tensorboard"), run_dir, resumed_step=3) as trackers:
        for number in (4, 5, 6):
            trackers.log({"train/loss": 20.0 + number}, number)
        trackers.log_text("sample: say <b>", "# no heading\n<b>", 6)
    read = read_tensorboard(run_dir.tensorboard)
    assert read.Tags()["scalars"] == ["train/loss"]
    assert [(e.step, e.value) for e in read.Scalars("train/loss")] == [
        *((number, 10.0 + number) for number in (1, 2, 3)),
        *((number, 20.0 + number) for number in (4, 5, 6)),
    ]
    texts = {tag: read.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in read.Tags()["tensors"]}
    assert texts["recipe/text_summary"] == "    model:\n      path: toy"
    assert texts["sample: say <b>/text_summary"] == "    # no heading\n    <b>"


def test_trackers_start_no_process_group_under_a_launcher(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests/unit'); from pathlib import Path\n"
        "import torch.distributed as dist; from test_trackers import config_with\n"
        "from trainer.checkpoint.layout import RunDir; from trainer.metrics.trackers import Trackers\n"
        "with Trackers(config_with('tensorboard'), RunDir(Path(sys.argv[1]))) as t: t.log({'a': 1.0}, 1)\n"
        "import os; assert os.environ['LOCAL_RANK'] == '0' and not dist.is_initialized()"
    )
    launcher = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "LOCAL_RANK": "0",
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env={**os.environ, **launcher}, cwd=root, check=True, timeout=60
    )
    assert read_tensorboard(tmp_path / "tensorboard").Scalars("a")[0].value == 1.0


def test_no_trackers_write_nothing(run_dir: RunDir) -> None:
    with Trackers(config_with(), run_dir) as trackers:
        trackers.log({"a": 1.0}, 1)
        trackers.log_text("b", "c", 1)
    assert not run_dir.path.exists()


@pytest.mark.parametrize("leftover", [False, True])
def test_missing_wandb_is_said_before_training(
    run_dir: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leftover: bool
) -> None:
    if leftover:  # the folder that wandb leaves in the working directory looks like a package to Python
        (tmp_path / "wandb").mkdir()
        monkeypatch.delitem(sys.modules, "wandb", raising=False)
        monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if "site-packages" not in p)])
    else:
        monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"tracking\.to: wandb.*not installed\n.*pip install wandb"):
        check_trackers(config_with("tensorboard", "wandb").tracking)
    with pytest.raises(UserError, match="pip install wandb"):
        Trackers(config_with("tensorboard", "wandb"), run_dir)
    assert not run_dir.path.exists()


def test_wandb_offline_records_and_a_resumed_run_keeps_its_id(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed (extra: trackers)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_dir.path.mkdir()
    for resumed_step in (0, 2):
        with Trackers(config_with("wandb"), run_dir, resumed_step) as trackers:
            trackers.log({"train/loss": 1.25, "train/mfu": None}, resumed_step + 1)
            trackers.log_text("sample: Why <b>?\nSay/so.", "because", resumed_step + 1)
    run_id = (run_dir.path / "wandb" / "run_id").read_text()
    recorded = sorted((run_dir.path / "wandb").glob(f"offline-run-*-{run_id}*/run-{run_id}.wandb"))
    assert len(recorded) == 2 and all(path.stat().st_size > 0 for path in recorded)
