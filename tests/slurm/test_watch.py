"""status, logs, cancel and doctor against a real SLURM, with jobs of a few lines of shell."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from runs import Submitter

from launch import cli
from launch.cluster_checks import ClusterChecks
from slurm.cluster import expand_hosts, read_cluster, run_slurm
from slurm.queue import JobState, job_states

ROOT = Path(__file__).parents[2]
# A batch shell as submit's: it waits for its tasks, and says how they ended.
BATCH = """
log() { echo "{\\"event\\":\\"$1\\",\\"time\\":$(date +%s),\\"job_id\\":\\"$SLURM_JOB_ID\\",$2}" >> attempts.jsonl; }
log start "\\"restart\\":${SLURM_RESTART_COUNT:-0},\\"nodes\\":\\"$SLURM_JOB_NODELIST\\",\\"step\\":0"
SETUP
srun --output=submissions/0001/script/%j_%t_log.out --open-mode=append --kill-on-bad-exit=1 bash 'TASK'
status=$?
echo "the batch shell saw $status"
state=done
[ $status -eq 0 ] || state=failed
[ ! -e cancelled ] || state=cancelled
echo "{\\"state\\": \\"$state\\", \\"step\\": 7, \\"reason\\": \\"\\"}" > state.json
log end "\\"status\\":$status,\\"state\\":\\"$state\\",\\"step\\":7,\\"action\\":\\"finish\\",\\"why\\":\\"\\""
[ $state = done ]
"""
# A task as the trainer: on SIGTERM it saves and leaves with 75.
TASK = """
trap 'echo "rank $SLURM_PROCID saves"; sleep 1; echo saved > saved.$SLURM_PROCID; exit 75' TERM
echo '{"state": "running", "step": 0, "reason": "", "started": '$(date +%s)'}' > .state.$SLURM_PROCID
mv .state.$SLURM_PROCID state.json
echo "rank $SLURM_PROCID of $SLURM_NTASKS"
for step in $(seq STEPS); do echo "rank $SLURM_PROCID step $step"; sleep 0.2; done
"""


class Job:
    """A run dir and its job."""

    def __init__(self, cluster: Cluster, path: Path, *options: str, setup: str = "", steps: int = 3000) -> None:
        self.cluster, self.path = cluster, path
        scripts = path / "submissions/0001/script"
        scripts.mkdir(parents=True)
        (path / "task.sh").write_text(TASK.replace("STEPS", str(steps)))
        script = BATCH.replace("TASK", str(path / "task.sh")).replace("SETUP", setup)
        output = f"--output={scripts}/%j_0_log.out"
        self.job_id = cluster.submit(script, output, f"--chdir={path}", "--open-mode=append", *options)
        self.write({})

    def write(self, more: dict[str, Any]) -> None:
        job = {"job_id": self.job_id, "name": "run", "submission": str(self.path / "submissions/0001")}
        job |= {"submitted": time.time(), "nodes": 2, "gpus_per_node": 1, "tasks_per_node": 1, "time_minutes": 5}
        (self.path / "job.json").write_text(json.dumps(job | {"max_restarts": 9, "then": []} | more))

    def wait_until_it_trains(self) -> None:
        self.cluster.wait_until(lambda: "step 1" in self.output(1), 30, "both tasks run")

    def output(self, rank: int = 0) -> str:
        path = self.path / f"submissions/0001/script/{self.job_id}_{rank}_log.out"
        return path.read_text() if path.exists() else ""

    def said(self) -> dict[str, Any]:
        return json.loads((self.path / "state.json").read_text())


TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--time=5")


@pytest.fixture(params=["accounting", "plain"])
def lab(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster with accounting, and one as SLURM is by default; this process's commands ask it."""
    found: Cluster = request.getfixturevalue("cluster" if request.param == "accounting" else "plain_cluster")
    use(found, monkeypatch)
    yield found


def use(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environ[name])


def ask(job_id: str) -> JobState:
    return job_states([job_id])[job_id]


def status(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main(["status", str(run_dir), "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    return run


# queue and cluster


def test_a_job_s_life(lab: Cluster) -> None:
    held = lab.submit("sleep 600", "--hold", "--time=1-02")
    job_id = lab.submit("sleep 600", "--nodes=2", "--time=30")
    lab.wait_for(job_id, "RUNNING", 20)
    time.sleep(1.1)
    states = job_states([held, job_id, "999999"])
    assert (states[held].state, states[held].reason, states[held].time_limit) == ("PENDING", "JobHeldUser", 1560)
    assert states[held].is_waiting and states[held].start is None
    running = states[job_id]
    assert (running.state, running.restarts, running.time_limit) == ("RUNNING", 0, 30)
    assert set(expand_hosts(running.nodes)) <= set(lab.nodes) and len(expand_hosts(running.nodes)) == 2
    assert 1 <= running.elapsed < 60 and running.start and abs(time.time() - running.elapsed - running.start) < 5
    assert states["999999"].is_gone and states["999999"].state == "UNKNOWN"
    assert ask("999999").is_gone  # squeue fails where it is asked for this one alone
    lab.run("scontrol", "requeue", job_id)
    lab.wait_for(job_id, "PENDING", 20)
    again = ask(job_id)
    assert (again.is_waiting, again.restarts, again.nodes) == (True, 1, "")
    lab.run("scancel", job_id)
    lab.wait_for(job_id, "CANCELLED", 20)
    assert ask(job_id).is_gone


def test_how_jobs_ended(lab: Cluster) -> None:
    endings = {
        lab.submit("true"): "COMPLETED",
        lab.submit("exit 3"): "FAILED",
    }
    lab.wait_until(lambda: all(ask(job_id).is_gone for job_id in endings), 30, "both have ended")
    assert {job_id: ask(job_id).state for job_id in endings} == endings


def test_an_array_s_tasks(lab: Cluster) -> None:
    array = lab.submit("sleep 600", "--array=0-5%2", "--nodes=1")
    lab.wait_until(lambda: ask(f"{array}_1").state == "RUNNING", 20, "two tasks run")
    lab.run("scancel", f"{array}_0")
    lab.wait_until(lambda: ask(f"{array}_0").is_gone, 20, "one is cancelled")
    lab.wait_until(lambda: ask(f"{array}_2").state == "RUNNING", 20, "the next one runs")
    states = job_states([array, f"{array}_0", f"{array}_1", f"{array}_5", f"{array}_6"])
    whole, *tasks = states.values()
    assert whole.is_alive
    assert [task.state for task in tasks] == ["CANCELLED", "RUNNING", "PENDING", "UNKNOWN"]


def test_without_squeue_others_are_asked(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id, ended = cluster.submit("sleep 600", "--nodes=1", "--time=30"), cluster.submit("true")
    cluster.wait_for(job_id, "RUNNING", 20)
    cluster.wait_for(ended, "COMPLETED", 20)
    monkeypatch.setenv("SLURM_CONF", cluster.environ["SLURM_CONF"])
    for command in ("sacct", "scontrol"):
        only = tmp_path / command
        only.mkdir()
        found = shutil.which(command, path=cluster.environ["PATH"])
        assert found
        (only / command).symlink_to(found)
        monkeypatch.setenv("PATH", str(only))
        # The database is told with some delay.
        cluster.wait_until(lambda: ask(ended).state == "COMPLETED", 20, f"{command} knows the end")
        cluster.wait_until(lambda: ask(job_id).state == "RUNNING", 20, f"{command} knows the start")
        running = ask(job_id)
        assert (running.time_limit, len(expand_hosts(running.nodes))) == (30, 1)
        assert running.start and abs(running.start - time.time()) < 120


def test_facts_of_the_cluster(lab: Cluster) -> None:
    facts = read_cluster()
    assert facts.default and facts.default.name == "gpu"
    gpu, cpu = facts.partitions["gpu"], facts.partitions["cpu"]
    assert (gpu.num_nodes, gpu.gpus_per_node, gpu.max_minutes, gpu.memory_mib, gpu.is_up) == (4, 4, None, 16000, True)
    assert (cpu.gpus_per_node, cpu.is_default) == (0, False)
    assert sorted(facts.nodes) == sorted([*lab.nodes, lab.cpu_node])
    listed = "n[1-3],c1"
    assert expand_hosts(listed) == run_slurm("scontrol", "show", "hostnames", listed).split()


# the commands


def test_status_and_logs_of_a_run(lab: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(lab, tmp_path / "a run", *TWO_NODES)
    job.wait_until_it_trains()
    run = status(job.path, capsys)
    assert (run["state"], run["job"]["state"], run["restarts"]) == ("running", "RUNNING", 0)
    assert len(expand_hosts(run["nodes"])) == 2 and 0 < run["gpu_hours"] < 0.1
    assert cli.main(["logs", str(job.path), "--rank", "all"]) == 0
    shown = capsys.readouterr()
    assert "[0] rank 0 of 2" in shown.out and "[1] rank 1 of 2" in shown.out
    assert f"is running (job {job.job_id})" in shown.err
    lab.run("scontrol", "requeue", job.job_id)
    lab.wait_for(job.job_id, "PENDING", 20)
    assert status(job.path, capsys)["state"] == "requeued"


def test_following_until_the_end(lab: Cluster, tmp_path: Path) -> None:
    job = Job(lab, tmp_path / "run", *TWO_NODES, "--begin=now+3", steps=5)
    command = [sys.executable, "-P", "-m", "launch.cli", "logs", str(job.path), "-f"]
    environ = {**lab.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=90)
    assert found.returncode == 0, found
    lines = found.stdout.splitlines()
    assert lines == ["rank 0 of 2", *(f"rank 0 step {step}" for step in range(1, 6)), "the batch shell saw 0"]
    told = [line.partition(f"{job.path} is ")[2].split()[0] for line in found.stderr.splitlines()]
    assert (told[0], told[-1]) == ("waiting", "done")


def test_cancel_lets_the_tasks_save(lab: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(lab, tmp_path / "run", *TWO_NODES)
    follower = lab.submit("true", f"--dependency=afterok:{job.job_id}")
    job.write({"then": [{"command": "merge", "job_id": follower}]})
    job.wait_until_it_trains()
    assert cli.main(["cancel", str(job.path)]) == 0
    assert f"job {job.job_id} is cancelled" in capsys.readouterr().out
    assert sorted(path.name for path in job.path.glob("saved.*")) == ["saved.0", "saved.1"]
    assert "the batch shell saw 75" in job.output()  # it had not been signalled itself
    assert (job.said()["state"], status(job.path, capsys)["state"]) == ("cancelled", "cancelled")
    assert ask(follower).state == "CANCELLED"
    assert cli.main(["cancel", str(job.path)]) == 2
    assert "nothing to cancel" in capsys.readouterr().err


def test_cancel_of_a_job_that_waits(lab: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(lab, tmp_path / "run", *TWO_NODES, "--hold")
    assert status(job.path, capsys)["warnings"] == ["waits for ever: it is held: scontrol release"]
    assert cli.main(["cancel", str(job.path)]) == 0
    assert "waited, and is cancelled; it has no checkpoint" in capsys.readouterr().out
    assert job.said()["state"] == "cancelled" and ask(job.job_id).state == "CANCELLED"


def test_cancel_before_the_tasks_have_started(lab: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(lab, tmp_path / "run", *TWO_NODES, setup="sleep 600")
    lab.wait_until((job.path / "attempts.jsonl").exists, 30, "its shell runs")
    assert cli.main(["cancel", str(job.path)]) == 0
    lab.wait_until(lambda: ask(job.job_id).is_gone, 30, "it has ended")
    assert status(job.path, capsys)["state"] == "cancelled"


def test_cancel_now_waits_for_no_checkpoint(lab: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(lab, tmp_path / "run", *TWO_NODES)
    job.wait_until_it_trains()
    assert cli.main(["cancel", str(job.path), "--now"]) == 0
    lab.wait_until(lambda: ask(job.job_id).is_gone, 30, "it has ended")
    assert status(job.path, capsys)["state"] == "cancelled"


def test_cancel_of_one_task_of_an_array(lab: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(lab, tmp_path / "run", *TWO_NODES, "--array=0-1", setup="[ $SLURM_ARRAY_TASK_ID = 1 ] || exec sleep 600")
    other, job.job_id = f"{job.job_id}_0", f"{job.job_id}_1"
    job.write({})
    lab.wait_until(lambda: (job.path / "state.json").exists() and ask(other).state == "RUNNING", 30, "both run")
    assert cli.main(["cancel", str(job.path)]) == 0
    assert len(list(job.path.glob("saved.*"))) == 2
    assert ask(job.job_id).is_gone and ask(other).state == "RUNNING"


def test_a_training_is_watched_and_cancelled(
    cluster: Cluster, submit: Submitter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = submit(cluster, train={"max_steps": 100_000}, eval={"every_steps": 5})
    use(cluster, monkeypatch)
    run.wait_for_step(12)
    found = status(run.path, capsys)
    assert (found["state"], found["total_steps"], found["restarts"]) == ("running", 100_000, 0)
    assert found["step"] >= 12 and found["validation_loss"] and found["tokens_per_second"] and found["eta_seconds"]
    assert found["gpu_hours"] > 0 and len(expand_hosts(found["nodes"])) == 2
    assert cli.main(["logs", str(run.path), "--rank", "all", "--lines", "500"]) == 0
    shown = capsys.readouterr().out
    assert "[0] " in shown and "[1] " in shown
    assert len([line for line in shown.splitlines() if "step 5: validation loss" in line]) == 1
    assert cli.main(["cancel", str(run.path)]) == 0
    assert f"job {run.job_id} " in capsys.readouterr().out
    run.wait_for_end(state="cancelled")
    found = status(run.path, capsys)
    assert (found["state"], found["attempts"][-1]["state"]) == ("cancelled", "cancelled")
    assert found["saved_step"] == found["step"] >= 12  # saved where it stopped


def test_doctor_s_view_of_the_cluster(lab: Cluster, tmp_path: Path) -> None:
    profile = tmp_path / "cluster.yaml"
    profile.write_text("partition: gpu\ngpus_per_node: 4\n")
    checks = ClusterChecks(profile)
    look = [checks.check_commands, checks.check_profile, checks.check_partition, checks.check_submit]
    look += [checks.check_requeue]
    assert [check.status for one in look for check in one()] == ["ok"] * 5
    (accounting,) = checks.check_accounting()
    assert accounting.status == ("ok" if lab.accounting else "not here")
    (preemption,) = checks.check_preemption()
    signal = "USR2 and TERM" if lab.preempt_send_user_signal else "TERM (no preempt_send_user_signal)"
    assert preemption.found.startswith(f"partition_prio, REQUEUE: {signal}, then ")
    assert f"gpu {lab.grace} s" in preemption.found


def test_a_cluster_that_is_down(plain_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(plain_cluster, monkeypatch)
    conf = Path(plain_cluster.environ["SLURM_CONF"]).read_text()
    (tmp_path / "slurm.conf").write_text(conf + "SlurmctldPort=1\nMessageTimeout=2\n")
    (tmp_path / "gres.conf").write_text("")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    began = time.monotonic()
    state = ask("1")
    assert time.monotonic() - began < 25
    assert not state.is_gone and "squeue" in state.reason
