"""`packtrain logs`: the lines of a run's processes, from all their files, as they are and as they come."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from run_dirs import make_run, start
from slurm_commands import NO_ACCOUNTING, Commands, squeue_line

from launch import cli
from slurm.logs import RankLog, Tail, find_logs

ROOT = Path(__file__).parents[2]
STAMP = "2026-11-21 12:42:49,123 INFO trainer.loop: "


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    made = Commands(tmp_path / "bin")
    made.add("sacct", status=1, stderr=NO_ACCOUNTING)
    made.add("squeue", squeue_line({"JobArrayID": "12", "NodeList": "n[1-2]"}))
    monkeypatch.setenv("PATH", str(made.folder))
    return made


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = make_run(tmp_path / "run", attempts=[start(60)], state="running")
    (folder / "logs").mkdir()
    output(folder).parent.mkdir(parents=True)
    return folder


def output(run_dir: Path, rank: int = 0, job_id: str = "12") -> Path:
    return run_dir / "submissions/0001/script" / f"{job_id}_{rank}_log.out"


def log(run_dir: Path, rank: int = 0) -> Path:
    return run_dir / "logs" / f"rank_{rank}.log"


def write(path: Path, *lines: str, old: bool = False) -> None:
    with open(path, "a") as file:
        file.write("".join(line + "\n" for line in lines))
    if old:
        os.utime(path, (time.time() - 100, time.time() - 100))


def set_state(run_dir: Path, state: str) -> None:
    (run_dir / "state.json").write_text(json.dumps({"state": state, "step": 3, "reason": ""}))


def test_rank_0_and_its_job_each_line_once(
    commands: Commands, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(log(run_dir), *(f"{STAMP}step {step}" for step in range(1, 60)), f"{STAMP}saved", old=True)
    write(
        output(run_dir), "module loaded", *(f"step {step}" for step in range(1, 60)), "saved", "packtrain: queued again"
    )
    write(log(run_dir, 1), f"{STAMP}of rank 1")
    assert cli.main(["logs", str(run_dir), "--lines", "3"]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [
        *(f"==> {log(run_dir)} <==", f"{STAMP}step 58", f"{STAMP}step 59", f"{STAMP}saved", ""),
        *(f"==> {output(run_dir)} <==", "module loaded", "packtrain: queued again"),  # written last, so shown last
    ]
    assert shown.err == f"-- {run_dir} is running (job 12)\n"


@pytest.mark.parametrize("option", [[], ["--follow"]])
def test_jobs_that_follow_are_told_with_their_logs(
    option: list[str], commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "run", attempts=[start(60)], state="done", then=[("merge", "13"), ("verify", "14")])
    output(folder).parent.mkdir(parents=True)
    write(output(folder, job_id="13"), "merging")
    waits = squeue_line({"JobArrayID": "14", "State": "PENDING", "Reason": "Dependency"})
    commands.add("squeue", squeue_line({"JobArrayID": "13"}) + waits)
    assert cli.main(["logs", str(folder), "--lines=0", *option]) == 0
    told = capsys.readouterr().err.splitlines()[-2:]
    assert told == [
        f"-- then merge: job 13 RUNNING, log {output(folder, job_id='13')}",
        "-- then verify: job 14 PENDING (Dependency)",
    ]


def test_a_line_that_comes_twice_is_shown_twice(commands: Commands, run_dir: Path) -> None:
    write(log(run_dir), *[f"{STAMP}retry"] * 2)
    write(output(run_dir), "retry", "retry", "retry")
    found = RankLog()
    for path in find_logs(run_dir)[0]:
        found.add(path)
    assert sorted(line for _, line in found.last_lines(10)) == [f"{STAMP}retry", f"{STAMP}retry", "retry"]


def test_one_rank_and_all_ranks(commands: Commands, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in range(12):
        write(log(run_dir, rank), f"{STAMP}rank {rank}")
    write(output(run_dir, 3), "Traceback", old=True)
    assert cli.main(["logs", str(run_dir), "--rank", "3"]) == 0
    told = [f"==> {output(run_dir, 3)} <==", "Traceback", "", f"==> {log(run_dir, 3)} <==", f"{STAMP}rank 3"]
    assert capsys.readouterr().out.splitlines() == told
    assert cli.main(["logs", str(run_dir), "--rank", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{STAMP}rank 2"]
    assert cli.main(["logs", str(run_dir), "--rank", "all"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[:4] == [*(f"[{rank:>2}] {STAMP}rank {rank}" for rank in range(3)), ""]
    assert shown[4:9] == [told[0], "[ 3] Traceback", "", told[3], f"[ 3] {STAMP}rank 3"]  # the one that has two files
    assert shown[9:] == [f"[{rank:>2}] {STAMP}rank {rank}" for rank in range(4, 12)]


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        ("7", r"--rank: 7 has no log in .*\n  allowed: 0 to 3, 5, or all"),
        ("-1", "--rank: '-1'\n  allowed: a number from 0, or all"),
        ("x", "--rank: 'x'\n  allowed: a number from 0, or all"),
    ],
)
def test_a_rank_that_is_not_there(
    rank: str, message: str, commands: Commands, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for known in (0, 1, 2, 3, 5):
        write(log(run_dir, known), "x")
    assert cli.main(["logs", str(run_dir), f"--rank={rank}"]) == 2
    assert re.match(message, capsys.readouterr().err)


def test_a_waiting_job_has_nothing_to_show_and_says_why(
    commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "new")
    commands.add("squeue", squeue_line({"JobArrayID": "12", "State": "PENDING", "Reason": "Priority"}))
    assert cli.main(["logs", str(folder)]) == 0
    assert capsys.readouterr() == ("", f"-- {folder} is waiting (job 12): Priority\n")
    assert cli.main(["logs", str(folder), "--rank", "8"]) == 2  # 2 nodes with 4 tasks each
    assert "8 has no log" in capsys.readouterr().err


def test_a_task_of_an_array_has_its_own_files(commands: Commands, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "12_3")
    scripts = folder / "submissions/0001/script"
    scripts.mkdir(parents=True)
    for name in ("12_3_0_log.out", "12_3_1_log.out", "12_30_0_log.out", "12_0_log.out", "12_3_0_result.pkl"):
        (scripts / name).touch()
    found = find_logs(folder)
    assert {rank: [path.name for path in paths] for rank, paths in found.items()} == {
        0: ["12_3_0_log.out"],
        1: ["12_3_1_log.out"],
    }


def test_a_local_run_s_ranks(commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run", None, state="done")
    (folder / "logs").mkdir()
    write(folder / "logs/rank_1.out", "from its stderr", old=True)
    write(log(folder, 1), "x")
    assert cli.main(["logs", str(folder), "--rank", "1"]) == 0
    names = [f"==> {folder}/logs/rank_1.{suffix} <==" for suffix in ("out", "log")]
    assert capsys.readouterr() == (f"{names[0]}\nfrom its stderr\n\n{names[1]}\nx\n", "")


def test_what_is_no_run(commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep").mkdir()
    runs = [{"run_dir": f"r={r}", "values": {}} for r in (1, 2)]
    (tmp_path / "sweep/sweep.json").write_text(json.dumps({"fields": ["r"], "runs": runs}))
    assert cli.main(["logs", str(tmp_path / "sweep")]) == 2
    assert f"is a sweep of 2 runs\n  allowed: one of them: {tmp_path}/sweep/r=1, " in capsys.readouterr().err
    (tmp_path / "sweep/sweep.json").write_text(json.dumps({"fields": ["r"], "runs": runs[:1]}))
    assert cli.main(["logs", str(tmp_path / "sweep")]) == 2
    assert f"is a sweep of 1 run\n  allowed: one of them: {tmp_path}/sweep/r=1\n" in capsys.readouterr().err
    assert cli.main(["logs", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert cli.main(["logs", str(tmp_path)]) == 2
    assert "no run has written" in capsys.readouterr().err


# one file


def test_a_file_is_read_from_where_it_was_left(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("a\nb\nhal")
    tail = Tail(path)
    assert tail.last_lines() == ["a", "b"]
    assert tail.new_lines() == []
    with open(path, "a") as file:
        file.write("f\nc\nto be")
    assert tail.new_lines() == ["half", "c"]
    path.write_text("new\n")  # cut off and written anew
    assert tail.new_lines() == ["new"]
    other = tmp_path / "other"
    other.write_text("replaced, and longer than before\nend")
    os.replace(other, path)
    assert tail.new_lines() == ["replaced, and longer than before"]
    assert tail.new_lines(to_the_end=True) == ["end"]
    path.unlink()
    assert tail.new_lines() == []


def test_of_a_big_file_the_end_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("".join(f"line {number}\n" for number in range(500_000)))
    lines = Tail(path).last_lines()
    assert lines[-1] == "line 499999" and 10_000 < len(lines) < 200_000
    assert all(line.startswith("line ") for line in lines)


# following


class Follower:
    """`packtrain logs -f` in a process of its own."""

    def __init__(self, commands: Commands, *arguments: str) -> None:
        command = [sys.executable, "-P", "-u", "-m", "launch.cli", "logs", *arguments, "-f"]
        self.process = subprocess.Popen(
            command,
            env=commands.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a background shell's children ignore it
        )
        self.seen: list[str] = []
        self.timer = threading.Timer(60, self.process.kill)
        self.timer.start()

    def wait_for(self, text: str) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.seen.append(line.rstrip("\n"))
            if text in line:
                return
        raise AssertionError(f"no {text!r} in {self.seen}")

    def finish(self) -> int:
        output, _ = self.process.communicate(timeout=30)
        self.seen += output.splitlines()
        return self.process.returncode


@pytest.fixture
def follow(commands: Commands) -> Iterator[list[Follower]]:
    started: list[Follower] = []
    yield started
    for one in started:
        one.timer.cancel()
        one.process.kill()
        one.process.communicate()


def test_following_over_a_restart_until_the_end(commands: Commands, run_dir: Path, follow: list[Follower]) -> None:
    write(log(run_dir), f"{STAMP}step 1")
    follow.append(one := Follower(commands, str(run_dir)))
    one.wait_for("step 1")
    write(output(run_dir), "step 2")
    write(log(run_dir), f"{STAMP}step 2")
    write(run_dir / "logs/rank_1.log", "of another rank")
    one.wait_for("step 2")
    commands.add("squeue", squeue_line({"JobArrayID": "12", "State": "PENDING", "Reason": "BeginTime"}))
    set_state(run_dir, "preempted")
    one.wait_for("is requeued (job 12): BeginTime")
    log(run_dir).unlink()
    write(log(run_dir), f"{STAMP}step 3")  # another file of the same name
    one.wait_for("step 3")
    write(output(run_dir), "half a line")
    with open(output(run_dir), "a") as file:
        file.write("the end")
    set_state(run_dir, "done")
    commands.add("squeue", squeue_line({"JobArrayID": "12", "State": "COMPLETED"}))
    assert one.finish() == 0
    lines = [line for line in one.seen if line and not line.startswith(("--", "==>"))]
    assert one.seen[0] == f"{STAMP}step 1"
    assert [line.removeprefix(STAMP) for line in lines] == ["step 1", "step 2", "step 3", "half a line", "the end"]
    assert one.seen[one.seen.index("half a line") - 1] == f"==> {output(run_dir)} <=="
    assert [line for line in one.seen if "is done" in line]


def test_ranks_that_log_in_turn_need_no_headings(commands: Commands, run_dir: Path, follow: list[Follower]) -> None:
    for rank in (0, 1):
        write(log(run_dir, rank), "begins")
    follow.append(one := Follower(commands, str(run_dir), "--rank", "all"))
    one.wait_for("[1] begins")
    for step in (1, 2):
        for rank in (0, 1):
            write(log(run_dir, rank), f"step {step}")
            one.wait_for(f"[{rank}] step {step}")
    write(output(run_dir, 1), "Traceback")
    one.wait_for("[1] Traceback")
    write(log(run_dir, 0), "step 3")
    one.wait_for("[0] step 3")
    set_state(run_dir, "done")
    commands.add("squeue")
    assert one.finish() == 0
    steps = [f"[{rank}] {text}" for text in ("begins", "step 1", "step 2") for rank in (0, 1)]
    wanted = [*steps, "", f"==> {output(run_dir, 1)} <==", "[1] Traceback", "[0] step 3"]
    assert [line for line in one.seen if not line.startswith("--")] == wanted


def test_files_that_come_later_are_followed(commands: Commands, tmp_path: Path, follow: list[Follower]) -> None:
    folder = make_run(tmp_path / "new")
    commands.add("squeue", squeue_line({"JobArrayID": "12", "State": "PENDING", "Reason": "Priority"}))
    follow.append(one := Follower(commands, str(folder), "--rank", "all"))
    one.wait_for("is waiting (job 12): Priority")
    (folder / "logs").mkdir()
    write(log(folder, 0), "first")
    write(log(folder, 1), "second")
    one.wait_for("[1] second")
    assert "[0] first" in one.seen
    one.process.send_signal(signal.SIGINT)
    assert one.finish() == 130
    assert "Traceback" not in "\n".join(one.seen)


def test_following_what_is_over_ends_at_once(commands: Commands, run_dir: Path, follow: list[Follower]) -> None:
    write(log(run_dir), "all there is")
    set_state(run_dir, "failed")
    commands.add("squeue")
    follow.append(one := Follower(commands, str(run_dir)))
    assert one.finish() == 0
    assert one.seen == ["all there is", f"-- {run_dir} is failed (job 12)"]


def test_without_slurm_the_run_dir_says_when_it_is_over(
    commands: Commands, run_dir: Path, follow: list[Follower]
) -> None:
    commands.remove("squeue")
    commands.remove("sacct")
    write(log(run_dir), "line")
    follow.append(one := Follower(commands, str(run_dir)))
    one.wait_for("is running")
    set_state(run_dir, "done")
    assert one.finish() == 0
