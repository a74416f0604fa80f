"""The cluster itself, which the other tests here rest on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from cluster import Cluster


def test_it_is_up_in_20_seconds_and_leaves_nothing(_slurm: None) -> None:
    began = time.monotonic()
    with Cluster() as cluster:
        assert time.monotonic() - began < 20
        assert cluster.is_idle()
        cluster.submit("sleep 600 & disown; sleep 601", "--nodes=4")
        cluster.wait_until(lambda: {"sleep 600", "sleep 601"} <= set(cluster.processes("n1").values()), 20, "it runs")
        namespaces = _namespaces(cluster.processes())
        assert len(namespaces) > 15  # five nodes with three each, and what they share
        assert namespaces & _namespaces()  # else what is asserted below were always true
        assert cluster.link in os.listdir("/sys/class/net")
    assert not namespaces & _namespaces()
    assert cluster.link not in os.listdir("/sys/class/net")
    assert str(cluster.folder) not in Path("/proc/self/mounts").read_text()
    assert not cluster.folder.exists()


STARTER = """
import time
from cluster import Cluster
cluster = Cluster()
cluster.start()
cluster.submit("sleep 600")
print(cluster.folder, cluster.link, *cluster.processes(), flush=True)
time.sleep(600)
"""


def test_it_leaves_nothing_when_its_starter_is_killed(_slurm: None) -> None:
    command = [sys.executable, "-c", STARTER]
    starter = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent)
    assert starter.stdout
    folder, link, *processes = starter.stdout.readline().split()
    namespaces = _namespaces(processes)
    assert len(namespaces) > 15
    assert Path(folder).exists()
    assert link in os.listdir("/sys/class/net")
    starter.kill()
    starter.wait()
    deadline = time.monotonic() + 10
    while namespaces & _namespaces() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not namespaces & _namespaces()
    assert not Path(folder).exists()
    assert str(folder) not in Path("/proc/self/mounts").read_text()
    while link in os.listdir("/sys/class/net") and time.monotonic() < deadline:  # the kernel removes it a bit later
        time.sleep(0.1)
    assert link not in os.listdir("/sys/class/net")


def test_jobs_that_share_a_node_have_gpus_of_their_own(cluster: Cluster, tmp_path: Path) -> None:
    script = f"echo $(hostname) $CUDA_VISIBLE_DEVICES >> {tmp_path}/out; sleep 600"
    for _ in range(3):
        cluster.submit(script, "--gpus-per-node=2", "--nodelist=n2")
    cluster.wait_until(lambda: _read(tmp_path / "out").count("\n") == 2, 20, "two jobs run")
    assert sorted(_read(tmp_path / "out").splitlines()) == ["n2 0,1", "n2 2,3"]
    assert sorted(job["JobState"] for job in cluster.jobs()) == ["PENDING", "RUNNING", "RUNNING"]


TALK = """
import os, socket, time
if os.environ["SLURM_PROCID"] == "0":
    server = socket.create_server(("", 29500))
    peer, address = server.accept()
    print(socket.gethostname(), "heard", peer.recv(100).decode(), "from", socket.gethostbyaddr(address[0])[0])
else:
    for attempt in range(100):
        try:
            peer = socket.create_connection((os.environ["MASTER_ADDR"], 29500))
            break
        except ConnectionRefusedError:
            time.sleep(0.1)
    peer.sendall(socket.gethostname().encode())
"""


def test_nodes_talk_by_name(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "talk.py").write_text(TALK)
    job = cluster.submit(
        f"MASTER_ADDR=n1 srun {sys.executable} {tmp_path}/talk.py",
        *("--nodelist=n[1-2]", "--ntasks-per-node=1", f"--output={tmp_path}/out"),
    )
    cluster.wait_for(job, "COMPLETED", 30)
    assert _read(tmp_path / "out") == "n1 heard n2 from n2\n"


@pytest.mark.parametrize("fault", ["cut link", "killed slurmd"])
def test_a_lost_nodes_job_is_requeued(cluster: Cluster, tmp_path: Path, fault: str) -> None:
    job = cluster.submit(f"echo start $SLURM_RESTART_COUNT >> {tmp_path}/out; sleep 600", "--nodelist=n3")
    cluster.wait_for(job, "RUNNING", 20)
    (cluster.cut_link if fault == "cut link" else cluster.kill_slurmd)("n3")
    assert cluster.wait_for(job, "PENDING", 90)["Restarts"] == "1"
    assert "sleep 600" in cluster.processes("n3").values()  # nobody there hears of it
    (cluster.mend_link if fault == "cut link" else cluster.start_slurmd)("n3")
    cluster.wait_until(lambda: _read(tmp_path / "out") == "start\nstart 1\n", 30, "it starts again")


def test_reset_brings_all_nodes_back_and_ends_what_jobs_left(cluster: Cluster) -> None:
    cluster.submit("setsid sleep 600 & sleep infinity", "--nodelist=n2")
    cluster.submit("sleep 600", "--nodelist=n1")
    for node in ("n1", "n2"):
        cluster.wait_until(lambda node=node: "sleep 600" in cluster.processes(node).values(), 20, f"{node} has a job")
    cluster.kill_slurmd("n1")
    cluster.cut_link("n3")
    cluster.reset()
    assert cluster.is_idle()
    for node in cluster.nodes:
        cluster.wait_until(
            lambda node=node: _commands(cluster, node) == ["sleep infinity", "slurmd"], 5, f"{node} is clean"
        )
    assert sorted(cluster.run("srun", "--nodes=4", "hostname").stdout.split()) == list(cluster.nodes)


@pytest.mark.parametrize("kind, heard", [("cluster", "USR2"), ("plain_cluster", "TERM")])
def test_urgent_preempts(request: pytest.FixtureRequest, tmp_path: Path, kind: str, heard: str) -> None:
    cluster: Cluster = request.getfixturevalue(kind)
    traps = [f"trap 'echo {name} >> {tmp_path}/out' {name}" for name in ("USR2", "TERM")]
    task = "; ".join([*traps, f"touch {tmp_path}/ready", "while true; do sleep 0.2; done"])
    (tmp_path / "task.sh").write_text(task)
    options = ("--nodelist=n1", "--exclusive", "--time=60")
    job = cluster.submit(f"srun sh {tmp_path}/task.sh", "--signal=USR2@60", *options)
    cluster.wait_until((tmp_path / "ready").exists, 20, "the task runs")
    cluster.submit("sleep 600", "--partition=urgent", *options)
    cluster.wait_until(lambda: _read(tmp_path / "out"), 20, "a signal came")
    assert _read(tmp_path / "out").split()[0] == heard
    assert cluster.job(job)["JobState"] == "RUNNING"  # for its grace time


def test_sacct_reports_and_hides(cluster: Cluster) -> None:
    job = cluster.submit("exit 3", "--nodelist=n4", "--job-name=two words")
    found = cluster.wait_for(job, "FAILED", 20)
    assert (found["ExitCode"], found["JobName"]) == ("3:0", "two words")
    query = ("sacct", "-X", "-n", "-P", "-j", job, "-o", "JobName,State,ExitCode,NodeList")
    # its name comes last: slurmdbd hears of a job's start some seconds after its end
    cluster.wait_until(lambda: cluster.run(*query).stdout == "two words|FAILED|3:0|n4\n", 20, "sacct reports it")
    with cluster.hide_sacct():
        assert cluster.run("sh", "-c", "squeue -h").returncode == 0
        assert cluster.run("sh", "-c", "sacct", check=False).returncode == 127
    assert cluster.run("sh", "-c", "sacct").returncode == 0


def test_without_accounting_sacct_fails(plain_cluster: Cluster) -> None:
    answer = plain_cluster.run("sacct", check=False)
    assert (answer.returncode, answer.stderr.strip()) == (1, "Slurm accounting storage is disabled")


def test_two_clusters_keep_apart(cluster: Cluster, plain_cluster: Cluster) -> None:
    job = cluster.submit("sleep 600", "--nodelist=n1", "--job-name=here")
    cluster.wait_until(lambda: "sleep 600" in cluster.processes("n1").values(), 20, "the job runs")
    assert "sleep 600" not in plain_cluster.processes().values()
    assert not [found for found in plain_cluster.jobs() if found["JobName"] == "here"]
    plain_cluster.cut_link("n1")
    plain_cluster.run("scancel", "--user=root")
    assert cluster.run("srun", "--overlap", f"--jobid={job}", "hostname").stdout == "n1\n"


def _commands(cluster: Cluster, node: str) -> list[str]:
    return sorted(cluster.processes(node).values())


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _namespaces(processes: Iterable[int | str] | None = None) -> set[str]:
    """The network, PID, mount and UTS namespaces of these processes (of all, without an argument) but not our own."""
    found: set[str] = set()
    for process in os.listdir("/proc") if processes is None else processes:
        for kind in ("net", "pid", "mnt", "uts"):
            try:
                found.add(os.readlink(f"/proc/{process}/ns/{kind}"))
            except OSError:
                break  # no process, or ended meanwhile
    return found - {os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "pid", "mnt", "uts")}
