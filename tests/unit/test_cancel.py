"""`packtrain cancel`: what is told to SLURM, in which order, and what the run dir says afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_dirs import end, make_run, start
from slurm_commands import NO_ACCOUNTING, NO_CONTROLLER, NO_SUCH_JOB, Commands, squeue_line

from launch import cli
from slurm import cancel as cancelling
from slurm.cancel import cancel
from slurm.status import read_statuses

# squeue tells jobs from a file for each, and has steps where that job's file says RUNNING.
SQUEUE = """
cd {folder}
case "$*" in
*--steps*) for job in *.steps; do [ -e "$job" ] && cat "$job"; done; exit 0 ;;
esac
for job in *.job; do [ -e "$job" ] && cat "$job"; done
exit 0
"""
# scancel with a signal: {on_signal}; without: the job is gone at once.
SCANCEL = """
cd {folder}
for run in {runs}; do [ -e "$run/cancelled" ] || {{ echo no mark >> unmarked; }}; done
case "$*" in
*--signal=TERM*) {on_signal} ;;
*) for job in $*; do cat "$job.cancelled" > "$job.job"; done ;;
esac
"""


class Lab:
    """A SLURM that remembers what became of its jobs."""

    def __init__(self, commands: Commands, folder: Path) -> None:
        self.commands, self.folder = commands, folder
        folder.mkdir()
        commands.add("squeue", shell=SQUEUE.format(folder=folder))

    def job(self, job_id: str, state: str, with_tasks: bool = False) -> None:
        self.write(job_id, "job", {"State": state})
        self.write(job_id, "cancelled", {"State": "CANCELLED"})
        self.write(job_id, "ended", {"State": "FAILED"})
        if with_tasks:
            (self.folder / f"{job_id}.steps").write_text(f"{job_id}.0\n{job_id}.batch\n{job_id}.extern\n")
        else:
            (self.folder / f"{job_id}.steps").write_text(f"{job_id}.batch\n")

    def write(self, job_id: str, name: str, fields: dict[str, str]) -> None:
        (self.folder / f"{job_id}.{name}").write_text(squeue_line({"JobArrayID": job_id, **fields}))

    def scancel(self, *runs: Path, on_signal: str = "true") -> None:
        marked = " ".join(map(str, runs)) or "/nowhere"
        shell = SCANCEL.format(folder=self.folder, runs=marked, on_signal=on_signal)
        self.commands.add("scancel", shell=shell)

    @property
    def calls(self) -> list[str]:
        return self.commands.calls("scancel")

    @property
    def marked_first(self) -> bool:
        return not (self.folder / "unmarked").exists()


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    commands = Commands(tmp_path / "bin")
    commands.add("sacct", status=1, stderr=NO_ACCOUNTING)
    monkeypatch.setenv("PATH", str(commands.folder))
    return Lab(commands, tmp_path / "lab")


def state(run_dir: Path) -> str:
    (status,) = read_statuses([run_dir])
    return status.state  # type: ignore[union-attr]


def test_a_running_job_s_tasks_are_asked_to_save(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run(tmp_path / "run", attempts=[start(60)], state="running", saved=20)
    lab.job("12", "RUNNING", with_tasks=True)
    # As its batch shell does, when the tasks have saved and left.
    says = json.dumps({"state": "cancelled", "step": 20, "reason": "packtrain cancel"})
    lab.scancel(run_dir, on_signal=f"echo '{says}' > {run_dir}/state.json; cat 12.ended > 12.job")
    assert cli.main(["cancel", str(run_dir)]) == 0
    assert lab.calls == ["--signal=TERM 12"] and lab.marked_first
    assert capsys.readouterr().out == f"{run_dir}: job 12 is cancelled; step 20 is saved\n"
    assert json.loads((run_dir / "cancelled").read_text())["time"] > 0
    assert state(run_dir) == "cancelled"


def test_saving_takes_longer_than_the_wait(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = make_run(tmp_path / "run", attempts=[start(60)], state="running", then=[("merge", "13")])
    lab.job("12", "RUNNING", with_tasks=True)
    lab.job("13", "PENDING")
    lab.scancel()
    monkeypatch.setattr(cancelling.cancel, "__defaults__", (False, 1.0))
    assert cli.main(["cancel", str(run_dir)]) == 0
    assert lab.calls == ["13", "--signal=TERM 12"]
    shown = capsys.readouterr().out
    assert f"{run_dir}: job 12 saves a checkpoint and stops; cancelled what would have followed: job 13\n" in shown
    assert "--now does not wait for checkpoints" in shown
    assert state(run_dir) == "cancelling"


def test_a_task_that_missed_the_signal_gets_it_again(lab: Lab, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", attempts=[start(60)], state="running")
    lab.job("12", "RUNNING", with_tasks=True)
    lab.scancel(on_signal="if [ -e heard ]; then cat 12.ended > 12.job; fi; echo > heard")
    (found,) = cancel(run_dir, seconds=6.0)
    assert lab.calls == ["--signal=TERM 12"] * 2 and found.is_over


def test_a_waiting_job_and_what_follows_it_are_cancelled_at_once(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attempts = [start(3000), end(1000, "failed", 300, "requeue")]
    run_dir = make_run(tmp_path / "run", attempts=attempts, state="failed", saved=300, then=[("merge", "13")])
    lab.job("12", "PENDING")
    lab.job("13", "PENDING")
    lab.scancel(run_dir)
    assert cli.main(["cancel", str(run_dir)]) == 0
    assert lab.calls == ["13", "12"] and lab.marked_first
    said = capsys.readouterr().out
    followed = "cancelled what would have followed: job 13"
    assert said == f"{run_dir}: job 12 waited, and is cancelled; step 300 is saved; {followed}\n"
    record = json.loads((run_dir / "state.json").read_text())
    assert (record["state"], record["step"], record["reason"]) == ("cancelled", 300, "packtrain cancel")
    assert state(run_dir) == "cancelled"


def test_before_srun_there_is_nobody_to_ask(lab: Lab, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", attempts=[start(5)])
    lab.job("12", "RUNNING")  # slurm.setup still runs
    lab.scancel(run_dir)
    (found,) = cancel(run_dir)
    assert lab.calls == ["12"] and found.is_over and not found.was_asked
    assert state(run_dir) == "cancelled"


def test_now_does_not_wait_for_a_checkpoint(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run(tmp_path / "run", attempts=[start(60)], state="running")
    lab.job("12", "RUNNING", with_tasks=True)
    lab.scancel(run_dir)
    assert cli.main(["cancel", str(run_dir), "--now"]) == 0
    assert lab.calls == ["12"] and lab.marked_first
    assert capsys.readouterr().out == f"{run_dir}: job 12 is cancelled; it has no checkpoint\n"
    assert json.loads((run_dir / "state.json").read_text())["state"] == "cancelled"


@pytest.mark.parametrize(("option", "says"), [([], "it saves a checkpoint and stops"), (["--now"], "is being ended")])
def test_what_is_said_while_a_job_ends(
    option: list[str],
    says: str,
    lab: Lab,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_dir = make_run(tmp_path / "run", attempts=[start(60)], state="running")
    lab.job("12", "RUNNING", with_tasks=True)
    lab.commands.add("scancel")  # takes its time
    monkeypatch.setattr(cancelling.cancel, "__defaults__", (False, 0.5))
    assert cli.main(["cancel", str(run_dir), *option]) == 0
    cancel_says = capsys.readouterr().out
    assert cli.main(["status", str(run_dir)]) == 0
    status_says = capsys.readouterr().out
    assert says in status_says
    assert [" saves " in said for said in (cancel_says, status_says)] == [not option] * 2


def test_another_clusters_job_of_the_same_number_is_left_alone(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = make_run(tmp_path / "run", attempts=[start(60)], state="running", cluster="there")
    lab.job("12", "RUNNING", with_tasks=True)
    lab.commands.add("scontrol", "ClusterName = here\n")
    lab.scancel()
    assert cli.main(["cancel", str(run_dir)]) == 2
    assert "submitted on cluster there, and this host's is here" in capsys.readouterr().err
    assert not lab.calls and not (run_dir / "cancelled").exists()


def test_a_job_that_is_queued_again_meanwhile_is_cancelled_there(lab: Lab, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", attempts=[start(60)], state="running")
    lab.job("12", "RUNNING", with_tasks=True)
    lab.write("12", "again", {"State": "PENDING", "Reason": "BeginTime"})
    lab.scancel(run_dir, on_signal="cat 12.again > 12.job")
    (found,) = cancel(run_dir)
    assert lab.calls == ["--signal=TERM 12", "12"] and found.is_over


def test_a_sweep_s_runs_that_are_not_over(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = tmp_path / "sweep"
    states = {"12_0": "COMPLETED", "12_1": "RUNNING", "12_2": "PENDING"}
    for (job_id, in_slurm), said in zip(states.items(), ("done", "running", ""), strict=True):
        make_run(sweep / job_id, job_id, state=said)
        lab.job(job_id, in_slurm, with_tasks=in_slurm == "RUNNING")
    runs = [{"run_dir": job_id, "values": {}} for job_id in states]
    (sweep / "sweep.json").write_text(json.dumps({"fields": [], "runs": runs}))
    lab.scancel(sweep / "12_1", sweep / "12_2", on_signal="cat 12_1.ended > 12_1.job")
    assert cli.main(["cancel", str(sweep)]) == 0
    assert sorted(lab.calls) == ["--signal=TERM 12_1", "12_2"] and lab.marked_first
    assert not (sweep / "12_0/cancelled").exists()
    assert json.loads((sweep / "12_0/state.json").read_text())["state"] == "done"
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_only_what_follows_a_done_run_is_left(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run(tmp_path / "run", state="done", then=[("merge", "13"), ("verify", "14")])
    for job_id, in_slurm in {"12": "COMPLETED", "13": "RUNNING", "14": "PENDING"}.items():
        lab.job(job_id, in_slurm)
    lab.scancel()
    assert cli.main(["cancel", str(run_dir)]) == 0
    assert lab.calls == ["13 14"] and not (run_dir / "cancelled").exists()
    assert "was over; cancelled what would have followed it: job 13, 14" in capsys.readouterr().out
    assert state(run_dir) == "done"


def test_a_run_that_ends_by_itself_stays_done(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run(tmp_path / "run", attempts=[start(60)], state="running")
    lab.job("12", "RUNNING", with_tasks=True)
    says = json.dumps({"state": "done", "step": 20, "reason": ""})
    lab.scancel(run_dir, on_signal=f"echo '{says}' > {run_dir}/state.json; cat 12.ended > 12.job")
    assert cli.main(["cancel", str(run_dir)]) == 0
    assert "job 12 was done in this moment" in capsys.readouterr().out
    assert state(run_dir) == "done"


@pytest.mark.parametrize(
    ("made", "in_slurm", "message"),
    [
        ({"state": "done"}, "COMPLETED", "nothing to cancel: job 12 ended as COMPLETED"),
        ({"state": "failed"}, None, "nothing to cancel: job 12 is gone"),
        ({"job_id": None, "state": "running"}, None, "nothing was submitted here"),
    ],
)
def test_nothing_to_cancel(
    made: dict[str, str],
    in_slurm: str | None,
    message: str,
    lab: Lab,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = make_run(tmp_path / "run", **made)  # type: ignore[arg-type]
    if in_slurm:
        lab.job("12", in_slurm)
    else:
        lab.commands.add("squeue", status=1, stderr=NO_SUCH_JOB)
    lab.scancel()
    assert cli.main(["cancel", str(run_dir)]) == 2
    assert message in capsys.readouterr().err
    assert not lab.calls and not (run_dir / "cancelled").exists()


def test_no_such_folder_and_no_slurm(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cancel", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
    run_dir = make_run(tmp_path / "run")
    assert cli.main(["cancel", str(run_dir)]) == 2  # scancel was never added
    assert "scancel: no such command: SLURM is not on this host" in capsys.readouterr().err
    assert not (run_dir / "cancelled").exists()


def test_a_controller_that_is_down_leaves_the_mark(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = make_run(tmp_path / "run", attempts=[start(60)], state="running")
    lab.commands.add("squeue", status=1, stderr=NO_CONTROLLER)
    lab.commands.add("scancel", status=1, stderr=NO_CONTROLLER)
    assert cli.main(["cancel", str(run_dir)]) == 1
    shown = capsys.readouterr().err
    assert "Unable to contact slurm controller" in shown and "the mark is set: no further start" in shown
    assert (run_dir / "cancelled").exists()


def test_a_job_that_ended_in_between_is_no_error(lab: Lab, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    lab.job("12", "PENDING")
    shell = f"cd {lab.folder}; cat 12.ended > 12.job"
    stderr = "scancel: error: Kill job error on job id 12: Job/step already completing or completed"
    lab.commands.add("scancel", shell=shell, status=1, stderr=stderr)
    (found,) = cancel(run_dir)
    assert found.is_over
