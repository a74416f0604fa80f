"""What SLURM says of jobs, with all its commands, with some and with none."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

import pytest
from slurm_commands import NO_ACCOUNTING, NO_CONTROLLER, NO_SUCH_JOB, Commands, squeue_line

from slurm import cluster
from slurm.queue import ENDED, WAITING, JobState, job_states, parse_sacct, parse_scontrol

SCONTROL_LINE = (
    "JobId=8 ArrayJobId=2 ArrayTaskId=1 JobName=a b'c UserId=root(0) GroupId=root(0) MCS_label=N/A Priority=4294901758 "
    "Nice=0 Account=root QOS=normal JobState=PENDING Reason=BeginTime Dependency=(null) Requeue=1 Restarts=1 "
    "BatchFlag=1 Reboot=0 ExitCode=0:0 RunTime=00:00:00 TimeLimit=1-00:00:00 TimeMin=N/A SubmitTime=1795264544 "
    "EligibleTime=1795264550 StartTime=1795264969 EndTime=1795351369 Partition=main NodeList= "
    "SchedNodeList=node0 NumNodes=1 Command=/tmp/lab/j.sh WorkDir=/tmp/lab StdOut=/tmp/lab/slurm-2_1.out Power= \n"
)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    made = Commands(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(made.folder))
    return made


def test_one_call_for_all(commands: Commands) -> None:
    running = {"JobArrayID": "1", "NodeList": "node[0-1]", "TimeUsed": "1-02:03:04", "StartTime": "1795264369"}
    waiting = {"JobArrayID": "2_1", "State": "PENDING", "Reason": "Resources", "StartTime": "1795264974"}
    commands.add(
        "squeue",
        squeue_line({**running, "TimeLimit": "2-00:00:00", "RestartCnt": "3"})
        + squeue_line(waiting)
        + squeue_line({"JobArrayID": "3", "State": "PENDING", "Reason": "Priority", "StartTime": "N/A"}),
    )
    commands.add("sacct", status=1, stderr=NO_ACCOUNTING)
    states = job_states(["1", "2_1", "3", "1"])
    one = JobState("1", "RUNNING", "", "node[0-1]", 93784, 1795264369.0, 2880, 3)
    assert states["1"] == one and one.is_alive and not one.is_waiting and not one.is_gone
    two = states["2_1"]
    assert (two.state, two.reason, two.start, two.time_limit) == ("PENDING", "Resources", 1795264974.0, 240)
    assert two.is_waiting and two.is_alive
    assert states["3"].start is None
    assert len(commands.calls("squeue")) == 1 and "--jobs=1,2_1,3 " in commands.calls("squeue")[0]
    assert commands.calls("sacct") == []


def test_arrays_as_a_whole_and_by_task(commands: Commands) -> None:
    lines = [{"JobArrayID": f"12_{task}", "State": state} for task, state in enumerate(["COMPLETED", "RUNNING"])]
    lines += [{"JobArrayID": "12_[2-5,9%2]", "State": "PENDING", "Reason": "JobArrayTaskLimit"}]
    commands.add("squeue", "".join(map(squeue_line, lines)))
    states = job_states(["12", "12_0", "12_1", "12_4", "12_9", "12_7", "1"])
    found = {job_id: state.state for job_id, state in states.items()}
    assert found == {
        "12": "PENDING",  # the last of those that are alive
        "12_0": "COMPLETED",
        "12_1": "RUNNING",
        "12_4": "PENDING",
        "12_9": "PENDING",
        "12_7": "UNKNOWN",
        "1": "UNKNOWN",
    }
    assert states["12"].is_alive and states["12_0"].is_gone and states["12_4"].job_id == "12_4"


def test_forgotten_jobs_are_asked_of_sacct(commands: Commands) -> None:
    commands.add("squeue", squeue_line({"JobArrayID": "1"}))
    # sacct --noheader --parsable2 --allocations --format=JobID,State,NodeList,ElapsedRaw,Start,Timelimit
    commands.add(
        "sacct",
        "2_0|CANCELLED by 1000|node2|175|1795264369|1-00:00:00\n"
        "2_1|REQUEUED|node3|175|1795264369|1-00:00:00\n"
        "2_1|NODE_FAIL|node3|10|1795264544|1-00:00:00\n"
        "5|OUT_OF_MEMORY|node[0-3]|7|Unknown|UNLIMITED\n",
    )
    states = job_states(["1", "2_0", "2_1", "5", "6"])
    assert [states[job_id].state for job_id in ("1", "2_0", "2_1", "5", "6")] == [
        *("RUNNING", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY", "UNKNOWN")
    ]
    assert states["2_0"] == JobState("2_0", "CANCELLED", "", "node2", 175, 1795264369.0, 1440)
    assert (states["5"].start, states["5"].time_limit) == (None, None)
    assert states["6"].is_gone and states["6"].reason == "SLURM does not know it any more"
    (call,) = commands.calls("sacct")
    assert "--jobs=2_0,2_1,5,6 " in call


def test_a_job_that_only_the_database_takes_for_running_is_gone(commands: Commands) -> None:
    commands.add("squeue", "")
    commands.add("sacct", "7|RUNNING|node2|99999|1795264369|UNLIMITED\n")
    assert job_states(["7"])["7"].is_gone


def test_squeue_has_forgotten_a_single_job(commands: Commands) -> None:
    commands.add("squeue", status=1, stderr=NO_SUCH_JOB)
    commands.add("sacct", "7|COMPLETED|node2|3|1795264369|10\n")
    assert job_states(["7"])["7"].state == "COMPLETED"


@pytest.mark.parametrize("sacct", ["missing", "disabled", "unreachable", "hanging"])
def test_without_accounting(sacct: str, commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    commands.add("squeue", squeue_line({"JobArrayID": "1", "State": "COMPLETING"}))
    if sacct == "disabled":
        commands.add("sacct", status=1, stderr=NO_ACCOUNTING)
    elif sacct == "unreachable":
        commands.add("sacct", status=1, stderr="sacct: error: Problem talking to the database: Connection refused")
    elif sacct == "hanging":
        monkeypatch.setattr(cluster.run_slurm, "__kwdefaults__", {"timeout": 0.3, "environ": None})
        commands.add("sacct", shell="exec sleep 60")
    states = job_states(["1", "2"])
    assert states["1"].is_alive
    assert (states["2"].state, states["2"].is_gone) == ("UNKNOWN", True)


def test_a_controller_that_is_down_is_told_and_asked_once(commands: Commands) -> None:
    commands.add("squeue", status=1, stderr=NO_CONTROLLER)
    commands.add("sacct", "1|RUNNING|node2|30|1795264369|10\n")
    commands.add("scontrol", status=1, stderr=NO_CONTROLLER)
    states = job_states(["1", "2"])
    assert states["1"].is_alive  # by all that is known
    two = states["2"]
    assert (two.state, two.answered, two.is_gone, two.is_alive) == ("UNKNOWN", False, False, False)
    assert two.reason.startswith(
        "squeue ended with status 1: slurm_load_jobs error: Unable to contact slurm controller"
    )
    assert commands.calls("scontrol") == []


def test_a_controller_that_hangs_is_given_up(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.run_slurm, "__kwdefaults__", {"timeout": 0.3, "environ": None})
    commands.add("squeue", shell="exec sleep 60")
    began = time.monotonic()
    (state,) = job_states(["1"]).values()
    assert time.monotonic() - began < 5
    assert "squeue did not answer: nothing within 0.3 s" in state.reason and not state.is_gone


def test_scontrol_where_squeue_is_missing(commands: Commands) -> None:
    commands.add("scontrol", SCONTROL_LINE)
    state = job_states(["2_1"])["2_1"]
    assert state == JobState("2_1", "PENDING", "BeginTime", "", 0, 1795264969.0, 1440, 1)


def test_without_slurm_nothing_is_known_and_nothing_raised(commands: Commands) -> None:
    (state,) = job_states(["1"]).values()
    assert state == JobState("1", reason="no squeue on this host; no sacct on this host", answered=False)
    assert job_states([]) == {}


def test_what_is_no_job_id_is_never_asked(commands: Commands) -> None:
    commands.add("squeue", squeue_line({"JobArrayID": "1"}))
    states = job_states(["1", "2; rm -rf /", ""])
    assert [states["1"].is_alive, states[""].is_alive] == [True, False]
    assert "rm -rf" not in commands.calls("squeue")[0]


def test_garbage_is_no_job(commands: Commands) -> None:
    commands.add("squeue", "CLUSTER: one\n\nsome warning of a site's wrapper that is rather long, longer than an id\n")
    commands.add("sacct", "no|columns\n")
    assert job_states(["1"])["1"].state == "UNKNOWN"
    assert parse_sacct("") == parse_scontrol("slurm_load_jobs error\n") == []


def test_local_times_of_commands_that_do_not_take_our_format(commands: Commands) -> None:
    commands.add("squeue", squeue_line({"JobArrayID": "1", "StartTime": "2026-11-21T12:42:49"}))
    assert job_states(["1"])["1"].start == datetime(2026, 11, 21, 12, 42, 49).timestamp()


def test_no_state_both_waits_and_is_over() -> None:
    assert not WAITING & ENDED
