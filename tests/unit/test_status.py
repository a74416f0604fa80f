"""`packtrain status`: where runs stand, by their folders and by what SLURM says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from run_dirs import NOW, end, make_run, start
from slurm_commands import NO_ACCOUNTING, NO_CONTROLLER, Commands, squeue_line

from launch import cli
from slurm.history import find_submitted, read_blamed, read_history
from slurm.progress import read_progress
from slurm.status import duration
from trainer.checkpoint.layout import RunDir

ROOT = Path(__file__).parents[2]
HEAVY = ["torch", "transformers", "datasets", "accelerate", "submitit", "pydantic"]


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    made = Commands(tmp_path / "bin")
    made.add("sacct", status=1, stderr=NO_ACCOUNTING)
    made.add("squeue")
    monkeypatch.setenv("PATH", str(made.folder))
    monkeypatch.chdir(tmp_path)
    return made


def job(commands: Commands, *jobs: dict[str, str]) -> None:
    commands.add("squeue", "".join(squeue_line({"JobArrayID": "12", **one}) for one in jobs))


def ask(capsys: pytest.CaptureFixture[str], *folders: Path | str) -> dict[str, Any]:
    """The JSON document of these folders, whatever was printed before."""
    capsys.readouterr()
    assert cli.main(["status", *map(str, folders), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def ask_run(capsys: pytest.CaptureFixture[str], folder: Path) -> dict[str, Any]:
    (run,) = ask(capsys, folder)["runs"]
    return run


RUNNING = {"State": "RUNNING", "NodeList": "n[1-2]", "TimeUsed": "50:00", "StartTime": str(int(NOW - 3000))}
WAITING = {"State": "PENDING", "Reason": "Resources", "StartTime": str(int(NOW + 600))}
FIRST = [start(3000)]


@pytest.fixture(autouse=True)
def _the_time_that_files_are_written_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the tests before these took; and a terminal of unknown width."""
    monkeypatch.setattr(time, "time", lambda: NOW)
    monkeypatch.delenv("COLUMNS", raising=False)


REQUEUED = [start(3000), end(1000, "preempted", 300, "requeue")]


@pytest.mark.parametrize(
    ("in_slurm", "made", "state", "detail"),
    [
        (WAITING, {}, "waiting", "Resources, expected to start"),
        ({"State": "PENDING", "Reason": "Priority"}, {}, "waiting", "Priority"),
        (RUNNING, {"attempts": FIRST}, "starting", ""),
        (RUNNING, {"attempts": FIRST, "state": "running"}, "running", ""),
        (RUNNING, {"attempts": FIRST, "state": "running", "reason": "trained; saving"}, "running", "trained; saving"),
        (WAITING | {"Reason": "BeginTime"}, {"attempts": REQUEUED, "state": "preempted"}, "requeued", "BeginTime, exp"),
        (RUNNING, {"attempts": REQUEUED, "state": "preempted"}, "stopping", "job 12 is RUNNING"),
        ({"State": "COMPLETING"}, {"attempts": FIRST, "state": "preempted"}, "stopping", "job 12 is COMPLETING"),
        (RUNNING, {"attempts": [*REQUEUED, start(900)], "state": "preempted"}, "starting", ""),
        # its node died, and SLURM queued it again: what the run dir says is of the start before
        (WAITING, {"attempts": FIRST, "state": "running"}, "requeued", "Resources"),
        # a machine was at fault, and the job waits for another one
        (WAITING, {"attempts": REQUEUED, "state": "failed"}, "requeued", "Resources"),
        ({"State": "NODE_FAIL"}, {"attempts": FIRST, "state": "running"}, "lost", "job 12 ended as NODE_FAIL; submit"),
        ({"State": "FAILED"}, {"attempts": FIRST}, "lost", "job 12 ended as FAILED"),
        (None, {"attempts": FIRST, "state": "running"}, "lost", "job 12: SLURM does not know it any more"),
        ({"State": "COMPLETED"}, {"attempts": FIRST, "state": "done"}, "done", ""),
        (None, {"state": "done"}, "done", ""),
        (RUNNING, {"attempts": FIRST, "state": "done"}, "done", ""),
        ({"State": "FAILED"}, {"attempts": FIRST, "state": "failed", "reason": "NaN"}, "failed", "NaN"),
        ({"State": "FAILED"}, {"attempts": FIRST, "state": "cancelled", "reason": "scancel"}, "cancelled", "scancel"),
    ],
)
def test_one_state_of_two_witnesses(
    in_slurm: dict[str, str] | None,
    made: dict[str, Any],
    state: str,
    detail: str,
    commands: Commands,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = make_run(tmp_path / "run", **made)
    job(commands, *([in_slurm] if in_slurm else []))
    run = ask_run(capsys, run_dir)
    assert run["state"] == state
    assert run["detail"].startswith(detail) and bool(run["detail"]) == bool(detail)


@pytest.mark.parametrize(
    ("in_slurm", "made", "state"),
    [
        (RUNNING, {"attempts": FIRST, "state": "running"}, "cancelling"),
        (WAITING, {"attempts": REQUEUED, "state": "preempted"}, "cancelling"),
        ({"State": "CANCELLED"}, {}, "cancelled"),
        (None, {"attempts": FIRST, "state": "preempted"}, "cancelled"),
        ({"State": "COMPLETED"}, {"state": "done"}, "done"),
    ],
)
def test_the_mark_of_cancel(
    in_slurm: dict[str, str] | None,
    made: dict[str, Any],
    state: str,
    commands: Commands,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = make_run(tmp_path / "run", **made)
    (run_dir / "cancelled").write_text("{}")
    job(commands, *([in_slurm] if in_slurm else []))
    assert ask_run(capsys, run_dir)["state"] == state


def test_a_running_run_in_numbers(commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attempts = [start(10000), end(6400, "preempted", 200, "requeue"), start(3600, restart=1, nodes="n[3-4]", step=200)]
    run_dir = make_run(
        tmp_path / "run", attempts=attempts, state="running", steps=400, saved=300, best_loss=1.5, evals={350: 1.8}
    )
    job(commands, RUNNING | {"NodeList": "n[3-4]"})
    run = ask_run(capsys, run_dir)
    assert (run["step"], run["total_steps"], run["saved_step"]) == (400, 1000, 300)
    assert (run["loss"], run["validation_loss"], run["best_validation_loss"]) == (2.0025, 1.8, 1.5)
    assert run["tokens_per_second"] == 17123.4
    assert run["eta_seconds"] == pytest.approx(600 * 2.1)  # 2 s a step, and an evaluation of 10 s in the last 100
    assert (run["restarts"], run["max_restarts"], run["nodes"]) == (1, 100, "n[3-4]")
    assert run["gpu_hours"] == pytest.approx(8 * (3600 + 3600) / 3600, rel=0.01)
    assert [attempt["nodes"] for attempt in run["attempts"]] == ["n[1-2]", "n[3-4]"]
    assert run["warnings"] == []


def test_a_run_that_waits_again_uses_no_gpus_and_has_no_eta(
    commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = make_run(tmp_path / "run", attempts=REQUEUED, state="preempted", steps=300, saved=300)
    job(commands, WAITING)
    run = ask_run(capsys, run_dir)
    assert (run["eta_seconds"], run["nodes"]) == (None, "")
    assert run["gpu_hours"] == pytest.approx(8 * 2000 / 3600, rel=0.01)


def test_a_start_that_died_with_its_node_counts_until_its_last_sign_of_life(
    commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attempts = [start(90000), start(3600, restart=1)]
    run_dir = make_run(tmp_path / "run", attempts=attempts, state="running", steps=10, saved=5)
    manifest = run_dir / "checkpoints/step_00000005/manifest.json"
    os.utime(manifest, (NOW - 90000 + 1800, NOW - 90000 + 1800))
    job(commands, RUNNING)
    assert ask_run(capsys, run_dir)["gpu_hours"] == pytest.approx(8 * 1.5, rel=0.01)


def test_a_job_that_ended_without_a_word_counts_as_long_as_slurm_says(
    commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = make_run(tmp_path / "run", attempts=[start(9000)], state="running")
    commands.add("sacct", f"12|NODE_FAIL|n[1-2]|1800|{NOW - 8990:.0f}|240\n")
    run = ask_run(capsys, run_dir)
    assert (run["state"], run["job"]["state"]) == ("lost", "NODE_FAIL")
    assert run["gpu_hours"] == pytest.approx(8 * 0.5, rel=0.01)


def test_quiet_runs(commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job(commands, RUNNING)
    quiet = make_run(tmp_path / "quiet", attempts=FIRST, state="running", steps=20, quiet=720)
    assert ask_run(capsys, quiet)["warnings"] == ["no step for 12 min"]
    loading = make_run(tmp_path / "loading", attempts=FIRST, state="running", started=NOW - 600)
    assert ask_run(capsys, loading)["warnings"] == []
    stuck = make_run(tmp_path / "stuck", attempts=FIRST, state="running", started=NOW - 7200)
    assert ask_run(capsys, stuck)["warnings"] == ["no step since its start 2 h 00 min ago"]
    resumed = make_run(tmp_path / "resumed", attempts=FIRST, state="running", steps=20, quiet=9999, started=NOW - 600)
    assert ask_run(capsys, resumed)["warnings"] == []


def test_what_never_starts_is_a_warning(commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run(tmp_path / "run", then=[("merge", "13")])
    never = {"State": "PENDING", "Reason": "PartitionTimeLimit"}
    job(commands, never, {"JobArrayID": "13", "State": "PENDING", "Reason": "DependencyNeverSatisfied"})
    run = ask_run(capsys, run_dir)
    assert run["warnings"] == [
        "waits for ever: slurm.time is above its partition's limit",
        "merge waits for ever: the job it follows failed",
    ]
    assert run["then"][0]["job"]["state"] == "PENDING"


def test_followers_and_nodes_at_fault(commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run(tmp_path / "run", state="done", attempts=REQUEUED, then=[("merge", "13"), ("verify", "14")])
    (run_dir / "blamed").write_text("n1\nn2\nn1\n")
    job(commands, {"JobArrayID": "13", "State": "FAILED"}, {"JobArrayID": "14", "State": "CANCELLED"})
    run = ask_run(capsys, run_dir)
    log = run_dir / "submissions/0001/script/13_0_log.out"
    assert run["warnings"] == ["no longer used: n1", f"merge ended as FAILED: {log}"]
    assert (run["blamed"], run["excluded"]) == ({"n1": 2, "n2": 1}, ["n1"])
    log.parent.mkdir(parents=True)
    log.write_text("why")
    assert cli.main(["status", str(run_dir)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"then merge job 13 FAILED, log {log}" in shown
    assert "n1 (2x), n2 (1x)" in shown


def test_without_slurm_the_run_dir_tells(
    commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.remove("squeue")
    commands.remove("sacct")
    running = make_run(tmp_path / "running", attempts=FIRST, state="running", steps=20, then=[("merge", "13")])
    run = ask_run(capsys, running)
    assert (run["state"], run["step"]) == ("running", 20)
    assert run["detail"] == "by the run dir alone"
    assert run["job"]["reason"] == "no squeue on this host; no sacct on this host"
    assert ask_run(capsys, make_run(tmp_path / "done", state="done"))["state"] == "done"
    new = make_run(tmp_path / "new")
    assert ask_run(capsys, new)["state"] == "unknown"
    for folders in ([running], [running, new]):
        assert cli.main(["status", *map(str, folders)]) == 0
        assert capsys.readouterr().out.count("! SLURM cannot be asked: no squeue on this host") == 1


def test_a_controller_that_is_down_is_told(
    commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.add("squeue", status=1, stderr=NO_CONTROLLER)
    run = ask_run(capsys, make_run(tmp_path / "run", attempts=FIRST, state="preempted"))
    assert run["state"] == "requeued" and "Unable to contact slurm controller" in run["job"]["reason"]


def test_a_job_of_another_cluster_is_not_taken_for_one_of_here(
    commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.add("scontrol", "Configuration data as of now\nClusterName             = here\n")
    job(commands, RUNNING, {"JobArrayID": "13", "State": "FAILED"})
    made: dict[str, Any] = {"attempts": FIRST, "then": [("merge", "13")], "cluster": "there"}
    running = make_run(tmp_path / "running", state="running", steps=20, **made)
    failed = make_run(tmp_path / "failed", state="failed", reason="NaN", **made)
    new = make_run(tmp_path / "new", cluster="there")
    gone = make_run(tmp_path / "gone", "999", state="running", attempts=FIRST, cluster="there")
    own = make_run(tmp_path / "own", attempts=FIRST, cluster="here")
    found = ask(capsys, running, failed, new, gone, own)["runs"]
    assert [(run["state"], run["detail"]) for run in found] == [
        ("running", "by the run dir alone"),
        ("failed", "NaN"),
        ("unknown", "by the run dir alone"),
        ("running", "by the run dir alone"),
        ("starting", ""),
    ]
    assert found[0]["warnings"] == [] and found[0]["step"] == 20
    assert len(commands.calls("scontrol")) == 1
    for folders in ([gone], [running, gone, own]):
        assert cli.main(["status", *map(str, folders)]) == 0
        shown = capsys.readouterr().out
        assert shown.count("! SLURM cannot be asked: submitted on cluster there, and this host's is here") == 1


def test_a_local_run(commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for said, state in {"running": "running", "preempted": "stopped", "done": "done", "failed": "failed"}.items():
        run = ask_run(capsys, make_run(tmp_path / said, None, state=said, steps=5))
        assert (run["state"], run["job"], run["gpu_hours"]) == (state, None, 0)
        assert cli.main(["status", str(tmp_path / said)]) == 0
    assert commands.calls("squeue") == []


def test_damaged_files_are_left_out(commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run(tmp_path / "run", attempts=FIRST, state="running", steps=20)
    for name in ("attempts.jsonl", "metrics.jsonl"):
        with open(run_dir / name, "ab") as file:
            file.write(b'\xff\n{"half": \n[]\n{"event":"start"}\n')
    (run_dir / "state.json").write_text("[")
    job(commands, RUNNING)
    run = ask_run(capsys, run_dir)
    assert (run["step"], run["state"], len(run["attempts"])) == (20, "starting", 1)
    (run_dir / "job.json").write_text("")
    assert ask_run(capsys, run_dir)["job"] is None


@pytest.mark.parametrize(
    ("line", "step", "loss"),
    [
        (b'{"kind":"step","step":21,"loss":"abc","tokens_per_second":"fast","seconds":[2]}\n', 21, None),
        (b'{"kind":"step","step":21,"loss":{"a":1},"tokens_per_second":null,"seconds":NaN}\n', 21, None),
        (b'{"kind":"eval","step":21,"loss":"low","seconds":null}\n', 20, 2.05),
        (b'{"kind":"event","step":21,"event":"start","num_steps":"many"}\n', 20, 2.05),
        (b'{"kind":"step","step":21,"lo', 20, 2.05),
    ],
)
def test_numbers_that_are_none_are_left_out(
    line: bytes, step: int, loss: float | None, commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = make_run(tmp_path / "run", attempts=FIRST, state="running", steps=20, evals={10: 1.5})
    with open(run_dir / "metrics.jsonl", "ab") as file:
        file.write(line)
    job(commands, RUNNING)
    run = ask_run(capsys, run_dir)
    assert (run["state"], run["step"], run["loss"]) == ("running", step, loss)
    assert (run["validation_loss"], run["best_validation_loss"]) == (1.5, 1.5)
    for folders in ([run_dir], [run_dir, make_run(tmp_path / "other", "13")]):
        assert cli.main(["status", *map(str, folders)]) == 0


# several runs and sweeps


def make_sweep(folder: Path) -> Path:
    """Four runs of an array: two done, one running, one waiting."""
    runs = []
    for task, (lr, r) in enumerate([("1e-4", 8), ("1e-4", 16), ("2e-4", 8), ("2e-4", 16)]):
        name = f"optim.lr={lr},adapter.r={r}"
        made: dict[str, Any] = {}
        if task < 2:
            made = {"state": "done", "steps": 50, "total_steps": 50, "evals": {10: 1.5 + task, 50: [1.6, 0.6][task]}}
            made["attempts"] = [start(3600), end(0, "done", 50, "finish", status=0)]
        elif task == 2:
            made = {"state": "running", "steps": 20, "total_steps": 50, "attempts": FIRST}
        make_run(folder / name, f"20_{task}", name="sweep", **made)
        runs.append({"run_dir": name, "values": {"optim.lr": lr, "adapter.r": str(r)}})
    (folder / "sweep.json").write_text(json.dumps({"fields": ["optim.lr", "adapter.r"], "runs": runs}))
    return folder


def test_a_sweep_is_a_table_with_the_best_first(
    commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = make_sweep(tmp_path / "runs" / "sweep")
    job(commands, {"JobArrayID": "20_2", **RUNNING}, {"JobArrayID": "20_3", **WAITING})
    (found,) = ask(capsys, sweep)["sweeps"]
    assert found["fields"] == ["optim.lr", "adapter.r"]
    assert found["states"] == {"done": 2, "running": 1, "waiting": 1}
    values = [(run["values"]["optim.lr"], run["values"]["adapter.r"], run["state"]) for run in found["runs"]]
    assert values == [
        ("1e-4", "16", "done"),
        ("1e-4", "8", "done"),
        ("2e-4", "8", "running"),
        ("2e-4", "16", "waiting"),
    ]
    assert [run["best_validation_loss"] for run in found["runs"]] == [0.6, 1.5, None, None]
    assert [run["validation_loss"] for run in found["runs"]] == [0.6, 1.6, None, None]
    assert found["gpu_hours"] == pytest.approx(8 * (1 + 1 + 3000 / 3600), rel=0.01)
    assert len(commands.calls("squeue")) == 1
    for columns in ("80", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        assert cli.main(["status", str(sweep)]) == 0
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= int(columns)
        table = shown.split("─\n")[1].splitlines()
        assert [line.split()[:3] for line in table[:2]] == [["1e-4", "16", "done"], ["1e-4", "8", "done"]]
    assert "4 runs: 2 done, 1 running, 1 waiting" in shown


def test_all_that_was_submitted_newest_first(
    commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    make_run(runs / "old", "1", submitted=NOW - 9e6, state="done")
    make_run(runs / "group" / "new[1]", "12", submitted=NOW - 10, attempts=FIRST, state="running", steps=20)
    make_run(runs / "local", None, state="done")
    make_sweep(runs / "sweep")
    (runs / ".hidden").mkdir()
    (runs / "empty").mkdir()
    job(commands, RUNNING, {"JobArrayID": "20_3", **WAITING})
    assert [folder.name for folder in find_submitted(Path("runs"))] == ["new[1]", "sweep", "old"]
    assert [run["run_dir"] for run in ask(capsys)["runs"]] == ["runs/group/new[1]", "runs/old"]
    for columns in ("80", "160"):
        monkeypatch.setenv("COLUMNS", columns)
        assert cli.main(["status"]) == 0
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= int(columns)
        assert ("n[1-2]" in shown) and "runs/sweep: a sweep, 4 runs: 2 done, 1 lost, 1 waiting" in shown
    rows = [line.split() for line in shown.splitlines() if line.startswith("runs/")]
    assert rows[0][:4] == ["runs/group/new[1]", "running", "20/1000", "2.0500"]
    assert [row[0] for row in rows[1:3]] == ["runs/sweep", "runs/old"]
    assert len(ask(capsys, "runs")["runs"]) == 2  # a folder of runs does as well


def test_of_many_runs_that_ended_alike_a_few_are_explained(
    commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(30):
        make_run(tmp_path / f"runs/{number}", f"{20 + number}", state="cancelled", reason="packtrain cancel")
    for number in range(5):
        make_run(tmp_path / f"runs/bad{number}", f"{60 + number}", state="failed", reason=f"NaN {number}")
    (tmp_path / "runs/29/blamed").write_text("n1\nn1\n")
    assert cli.main(["status"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if ": " in line]
    assert sum("packtrain cancel" in line for line in lines) == 5
    assert "and 25 more cancelled: packtrain status RUN_DIR says why" in lines
    assert [line.partition(": ")[2] for line in lines if "bad" in line] == [f"NaN {number}" for number in range(5)]
    assert any(line.endswith("no longer used: n1") for line in lines)  # what somebody should look at is always told


def test_in_a_pipe_a_row_stays_on_its_line(commands: Commands, tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / ("a-long-name" * 8), attempts=FIRST, state="running", steps=20)
    make_run(tmp_path / "runs" / "b", "13")
    job(commands, RUNNING)
    environ = {name: value for name, value in commands.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-P", "-m", "launch.cli", "status"]
    shown = subprocess.run(
        command, capture_output=True, text=True, env=environ | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path, check=True
    ).stdout
    row = next(line for line in shown.splitlines() if line.startswith("runs/a-long"))  # notes come below the table
    assert "20/1000" in row and "running" in row and "n[1-2]" in row


def test_nothing_there(commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"nothing submitted in {tmp_path}/runs or below: ") and "packtrain status FOLDER" in said
    assert ask(capsys) == {"runs": [], "sweeps": []}
    assert cli.main(["status", "nowhere"]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
    make_run(tmp_path / "folder/local", None, state="done")
    assert cli.main(["status", "folder"]) == 2
    assert f"{tmp_path}/folder: no run's folder, and nothing below was submitted" in capsys.readouterr().err


def test_one_run_with_all_its_starts(
    commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = [
        *(start(9000), end(8000, "preempted", 200, "requeue", "without n3")),
        start(7000, restart=1, nodes="n[4-5]", step=200),
        start(3000, restart=2, step=200),
    ]
    run_dir = make_run(tmp_path / "run[1]", attempts=attempts, state="running", steps=20, saved=200, evals={20: 1.5})
    job(commands, RUNNING)
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["status", str(run_dir)]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    words = " ".join(shown.split())
    assert "validation 1.5000 (best 1.5000)" in words and "restarts 2 of at most 100" in words
    assert "preempted -> requeue (without n3)" in words
    assert "n[4-5] 200 to ? no word: its node or its job was lost" in words
    assert "n[1-2] 200 to 200 runs" in words


# the parts


def test_history_counts_from_the_newest_submission(tmp_path: Path) -> None:
    folder = make_run(
        tmp_path / "run", attempts=[start(9), start(8, restart=1), {"event": "submit", "time": 1}, start(7)]
    )
    history = read_history(folder)
    assert (len(history.attempts), history.restarts) == (3, 0)
    assert read_history(tmp_path).attempts == [] and read_blamed(tmp_path) == {}


def test_a_long_metrics_file_is_read_in_a_moment(tmp_path: Path) -> None:
    run_dir = make_run(
        tmp_path / "run", steps=150_000, total_steps=200_000, saved=100_000, best_loss=0.5, evals={149_000: 0.7}
    )
    assert (run_dir / "metrics.jsonl").stat().st_size > 20e6
    began = time.process_time()
    progress = read_progress(RunDir(run_dir))
    assert time.process_time() - began < 0.5
    assert (progress.step, progress.total_steps) == (150_000, 200_000)
    assert (progress.validation_loss, progress.best_validation_loss) == (0.7, 0.5)


def test_a_run_of_before_total_steps_were_recorded(tmp_path: Path) -> None:
    progress = read_progress(RunDir(make_run(tmp_path / "run", steps=3, total_steps=None)))
    assert (progress.step, progress.total_steps, progress.eta_seconds) == (3, None, None)


def test_a_real_recorder_s_lines_are_understood(tmp_path: Path) -> None:
    from trainer.metrics.trackers import MetricsLog

    run = RunDir(tmp_path)
    with MetricsLog(run) as log:
        log.write({"kind": "event", "step": 0, "event": "start", "text": "t", "num_steps": 9})
        log.write({"kind": "step", "step": 1, "loss": float("nan"), "tokens_per_second": 5.0, "seconds": 1.0})
    progress = read_progress(run)
    assert (progress.step, progress.total_steps, progress.loss, progress.eta_seconds) == (1, 9, None, 8.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (99, "99 s"), (100, "2 min"), (3599, "1 h 00 min"), (11100, "3 h 05 min"), (187000, "2 d 03 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_it_answers_at_once_and_loads_nothing_heavy(commands: Commands, tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "run", attempts=FIRST, state="running", steps=1000)
    job(commands, RUNNING)
    code = f"""
import sys, time
began = time.process_time()  # of its own: others may use the machine too
from launch.cli import main
status = main(["status"])
print("TOOK", time.process_time() - began, status, [name for name in {HEAVY} if name in sys.modules])
"""
    environ = commands.environ | {"PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-c", code]
    times = []
    for _ in range(3):  # the first may compile
        shown = subprocess.run(run, capture_output=True, text=True, env=environ, cwd=tmp_path, check=True).stdout
        _, took, status, loaded = shown.splitlines()[-1].split(" ", 3)
        assert (status, loaded) == ("0", "[]")
        times.append(float(took))
    assert min(times) < 0.8


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("job.json", '{"job_id": "12"}'),
        ("job.json", '{"job_id": null, "submission": "/x"}'),
        ("job.json", '{"job_id": 12, "submission": "/x"}'),
        ("job.json", '{"job_id": "12", "submission": "/x", "then": [{}]}'),
        ("job.json", '{"job_id": "12", "submission": "/x", "submitted": "yesterday"}'),
        ("job.json", "[1]"),
        ("attempts.jsonl", '{"event":"start","time":1,"restart":"a"}\n'),
        ("attempts.jsonl", '{"event":"start","time":1,"job_id":"12"}\n{"event":"end","ti'),
        ("state.json", "garbage"),
        ("sweep.json", '{"fields": [], "runs": [1]}'),
        ("sweep.json", "garb"),
    ],
)
def test_what_something_else_has_written_is_no_end_of_status(
    name: str, text: str, commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = make_run(tmp_path / "runs" / "one", attempts=FIRST, state="running", steps=20)
    make_run(tmp_path / "runs" / "two", "13", attempts=FIRST, state="running", steps=20)
    job(commands, RUNNING)
    (run_dir / name).write_text(text)
    for arguments in ([run_dir], [tmp_path / "runs"]):
        assert cli.main(["status", *map(str, arguments)]) in (0, 2)
    assert "two" in capsys.readouterr().out
    assert cli.main(["logs", str(run_dir)]) in (0, 2)


def test_a_job_that_ended_before_a_word_asks_for_the_file_system(
    commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = make_run(tmp_path / "run")
    job(commands, {"State": "FAILED"})
    run = ask_run(capsys, run_dir)
    assert run["state"] == "lost"
    assert "share the file system" in run["detail"]
