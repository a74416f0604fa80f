"""`packtrain submit` on a real SLURM: what is queued, what is refused, and what no longer matters once it is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from runs import Submitted, Submitter, assert_uninterrupted

from launch.cli import main

ROOT = Path(__file__).parents[2]
SHORT = {"train": {"max_steps": 10}, "eval": {"every_steps": 10}}


def test_source_recipe_and_folder_are_deleted_after_submit(
    cluster: Cluster, submit: Submitter, reference: dict[int, float]
) -> None:
    """The job waits for a node, and finds nothing of where it was submitted."""
    source = submit.folder / "source"
    for package in ("launch", "slurm", "trainer"):
        shutil.copytree(ROOT / package, source / package)
    recipe = submit.write("recipe")
    blocker = cluster.submit("sleep 300", "--nodes=4", "--exclusive")
    cluster.wait_for(blocker, "RUNNING", 20)
    command = [sys.executable, "-P", "-m", "launch.cli", "submit", str(recipe), "--run-dir", "../run"]
    environ = {**cluster.environ, "PYTHONPATH": str(source), "PACKTRAIN_CACHE": os.environ["PACKTRAIN_CACHE"]}
    subprocess.run(command, cwd=source, env=environ, check=True)
    run = Submitted(cluster, submit.folder / "run")
    shutil.rmtree(source)
    recipe.unlink()
    cluster.run("scancel", blocker)
    run.wait_for_end()
    assert_uninterrupted(run, reference)


def test_a_path_with_spaces_and_quotes(cluster: Cluster, submit: Submitter) -> None:
    run = submit(cluster, name="""a run's "name" $HOME `id` & ü""", **SHORT)
    run.wait_for_end()
    assert len(run.steps()) == 10


def test_two_jobs_on_one_node_keep_their_own_gpus_and_ports(cluster: Cluster, submit: Submitter) -> None:
    section = {"slurm": {"nodes": 1, "gpus_per_node": 2, "sbatch": {"nodelist": "n3"}, "setup": ["sleep 3"]}}
    runs = [submit(cluster, name=name, **SHORT, **section) for name in ("one", "two")]
    gpus = []
    for run in runs:
        run.wait_for(lambda run=run: len(run.processes()) >= 2, 60, "its processes")
        gpus.append({environ["CUDA_VISIBLE_DEVICES"] for _, environ in run.processes()})
    assert all(len(seen) == 1 for seen in gpus)
    assert gpus[0] != gpus[1]
    for run in runs:
        run.wait_for_end()
    starts, ends = ([run.events(kind)[0]["time"] for run in runs] for kind in ("start", "end"))
    assert max(starts) <= min(ends)  # they ran at one time


def test_a_sweep_and_again_what_failed(cluster: Cluster, submit: Submitter) -> None:
    vary = ("--array", "optim.lr=1e-3,1e-4", "--array", "adapter.r=2,4", "--nodes", "1")
    sweep = submit(cluster, *vary, "--then", "report", name="sweep", **SHORT)
    names = [f"optim.lr={lr},adapter.r={r}" for lr in ("1e-3", "1e-4") for r in (2, 4)]
    assert [run["run_dir"] for run in json.loads((sweep.path / "sweep.json").read_text())["runs"]] == names
    runs = [Submitted(cluster, sweep.path / name) for name in names]
    assert len({run.job_id.partition("_")[0] for run in runs}) == 1
    assert [run.job_id.partition("_")[2] for run in runs] == ["0", "1", "2", "3"]
    for run in runs:
        run.wait_for_end()
    assert {run.job["then"][0]["command"] for run in runs} == {"report"}
    assert "r: 2" in runs[0].run.recipe.read_text()
    finals = {name: list(run.steps().values())[-1] for name, run in zip(names, runs, strict=True)}
    assert len(set(finals.values())) == 4  # four different runs

    state = runs[2].run.state
    state.write_text(state.read_text().replace("done", "failed"))
    again = submit(cluster, *vary, name="sweep", **SHORT)
    assert Submitted(cluster, again.path / names[2]).job_id != runs[0].job_id.partition("_")[0] + "_2"
    assert "_" not in runs[2].job_id  # one run is no array
    runs[2].wait_for_end()
    assert [len(run.events("submit")) for run in runs] == [1, 1, 2, 1]


def test_a_sweep_of_nothing_left(cluster: Cluster, submit: Submitter, capsys: pytest.CaptureFixture[str]) -> None:
    vary = ("--array", "optim.lr=1e-3,1e-4", "--nodes", "1")
    sweep = submit(cluster, *vary, name="sweep", **SHORT)
    submit(cluster, *vary, name="sweep", **SHORT)  # all are queued
    assert "every run is done or queued" in capsys.readouterr().out
    assert not (sweep.path / "submissions" / "0002").exists()


def test_what_is_queued_is_not_queued_twice(
    cluster: Cluster, submit: Submitter, capsys: pytest.CaptureFixture[str]
) -> None:
    run = submit(cluster, **SHORT)
    with submit.on(cluster):
        assert main(["submit", str(submit.write("run", **SHORT)), "--run-dir", str(run.path)]) == 2
    assert f"job {run.job_id} has this run" in capsys.readouterr().err
    run.wait_for_end()


def test_a_run_that_is_done_is_not_queued_again(
    cluster: Cluster, submit: Submitter, capsys: pytest.CaptureFixture[str]
) -> None:
    run = submit(cluster, "--nodes", "1", **SHORT)
    run.wait_for_end()
    submit(cluster, "--nodes", "1", **SHORT)
    assert "this run is done; nothing to submit" in capsys.readouterr().out
    assert len(run.events("submit")) == 1


def test_a_folder_of_others_is_left_as_it_is(
    cluster: Cluster, submit: Submitter, capsys: pytest.CaptureFixture[str]
) -> None:
    team = submit.folder / "team"
    team.mkdir(mode=0o2775)
    (team / "results.csv").touch()
    with submit.on(cluster):
        assert main(["submit", str(submit.write("recipe")), "--run-dir", str(team)]) == 2
    assert "results.csv" in capsys.readouterr().err
    assert [path.name for path in team.iterdir()] == ["results.csv"]


def test_dry_run_is_quick_and_queues_nothing(cluster: Cluster, submit: Submitter) -> None:
    recipe = submit.write("recipe", slurm={"nodes": 2, "gpus_per_node": 4, "time": "1-06:00:00"})
    command = [sys.executable, "-m", "launch.cli", "submit", str(recipe), "--dry-run"]
    seconds = []
    for _ in range(3):  # the machine may be busy
        started = time.monotonic()
        found = subprocess.run(
            command, cwd=submit.folder, env={**cluster.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        seconds.append(time.monotonic() - started)
    assert min(seconds) < 2
    assert found.returncode == 0, found.stderr
    assert "#SBATCH --gpus-per-node=4\n" in found.stdout
    assert "= 240.0 GPU-hours" in found.stdout
    assert "to start at" in found.stdout  # SLURM's verdict
    assert sorted(path.name for path in submit.folder.iterdir()) == ["recipe.yaml"]
    assert cluster.jobs() == [] or all(job["JobState"] != "PENDING" for job in cluster.jobs())


HOSTILE: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "no such partition": ({"partition": "gpus"}, [], "gpu, urgent, cpu"),
    "more GPUs than a node has": ({}, ["--gpus-per-node", "5"], "at most 4"),
    "more nodes than there are": ({}, ["--nodes", "5"], "at most 4"),
    "more cores than a node has": ({"cpus_per_gpu": 17}, [], "16 cores"),
    "a kind of GPU that is not there": ({"gpu_type": "a100"}, [], "no type"),
    "half a node": ({}, ["--nodes", "1.5"], "slurm.nodes"),
    "a setup with an open quote": ({"setup": ["echo 'open"]}, [], "no valid shell"),
    "no time": ({"time": "soon"}, [], "04:00:00"),
    "a partition with a line of its own": ({"partition": "gpu\n#SBATCH --uid=0"}, [], "on one line"),
    "an option that is submit's": ({"sbatch": {"signal": "KILL"}}, [], "sets signal"),
    "an option that sbatch has not": ({"sbatch": {"colour": "red"}}, [], "unrecognized option"),
    "a name that is none": ({"env": {"A B": "c"}}, [], "env"),
    "what SLURM itself refuses": ({"sbatch": {"nodelist": "n9"}}, [], "SLURM would refuse the job"),
    "a node that is not there": ({"exclude": ["n9"]}, [], "n1, n2"),
    "a field that is none": ({"partitoin": "gpu"}, [], "did you mean slurm.partition"),
    "a command that cannot follow": ({}, ["--then", "merge,rm -rf /"], "merge, verify"),
    "a verification of nothing": ({}, ["--then", "verify"], "merge,verify"),
    "a sweep over SLURM": ({}, ["--array", "slurm.nodes=1,2"], "the same"),
    "a sweep without values": ({}, ["--array", "optim.lr"], "field=value"),
    "a field twice": ({}, ["--nodes", "1", "--slurm.nodes", "2"], "twice"),
}


@pytest.mark.parametrize(("section", "options", "said"), HOSTILE.values(), ids=HOSTILE)
def test_bad_input_is_refused_before_anything_is_queued(
    section: dict[str, Any],
    options: list[str],
    said: str,
    cluster: Cluster,
    submit: Submitter,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {job["JobId"] for job in cluster.jobs()}
    recipe = submit.write("recipe", slurm=section)
    with submit.on(cluster):
        status = main(["submit", str(recipe), "--run-dir", str(submit.folder / "run"), *options])
    assert status == 2
    assert said in capsys.readouterr().err
    assert not (submit.folder / "run").exists()
    assert {job["JobId"] for job in cluster.jobs()} == before


@pytest.mark.parametrize("name", ["per%cent", "new\nline", "colon:s", "back\\slash"])
def test_a_path_that_job_scripts_cannot_carry_is_refused(
    name: str, cluster: Cluster, submit: Submitter, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = submit.write("recipe")
    with submit.on(cluster):
        assert main(["submit", str(recipe), "--run-dir", str(submit.folder / name)]) == 2
    assert "--run-dir" in capsys.readouterr().err
    assert not (submit.folder / name).exists()
