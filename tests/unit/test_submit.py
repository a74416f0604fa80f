"""`packtrain submit` with stand-ins for SLURM's commands: what it queues, notes, refuses; tests/slurm has real ones."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from slurm_commands import NO_ACCOUNTING, Commands, squeue_line

from launch import cli
from slurm.checks import check_then
from slurm.job import SUBMISSION
from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.recipe import load_recipe

# name, marked name, availability, limit, gres, CPUs, MiB, features, nodes
SINFO = "gpu|gpu*|up|infinite|gpu:4|16|64000|(null)|n[1-4]\n"
# Job ids count up from 101; each script is kept under its job's.
SBATCH = """
case "$*" in *--test-only*) echo "sbatch: Job 1 to start at now" >&2; exit 0 ;; esac
cd {folder}
printf x >> .count
read -r count < .count
id=$((100 + ${{#count}}))
printf "%s" "$(< "$1")" > $id.script
echo "Submitted batch job $id"
exit 0
"""


class Cluster:
    """SLURM's commands as `submit` calls them."""

    def __init__(self, commands: Commands) -> None:
        self.commands = commands
        commands.add("sinfo", SINFO)
        commands.add("srun")
        commands.add("squeue")
        commands.add("scancel")
        commands.add("scontrol", "ClusterName = lab\n")
        commands.add("sacct", status=1, stderr=NO_ACCOUNTING)
        commands.add("sbatch", shell=SBATCH.format(folder=commands.folder))

    def has(self, **states: str) -> None:
        """Jobs that SLURM knows: ``j101_0="RUNNING"``."""
        lines = [squeue_line({"JobArrayID": name[1:], "State": state}) for name, state in states.items()]
        self.commands.add("squeue", "".join(lines))

    def scripts(self) -> dict[str, str]:
        """What was queued, by job id."""
        return {path.stem: path.read_text() for path in sorted(self.commands.folder.glob("*.script"))}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    commands = Commands(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(commands.folder))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    return Cluster(commands)


@pytest.fixture
def recipe(toy_recipe_file: Callable[..., Path]) -> Path:
    return toy_recipe_file(adapter={"r": 4}, slurm={"gpus_per_node": 1})


def submit(recipe: Path, *options: str) -> int:
    return cli.main(["submit", str(recipe), "--run-dir", "run", *options])


def read_job(run_dir: str = "run") -> dict[str, Any]:
    return json.loads(Path(run_dir, "job.json").read_text())


def test_one_run_with_what_follows(cluster: Cluster, recipe: Path) -> None:
    assert submit(recipe, "--then", "merge,verify") == 0
    assert list(cluster.scripts()) == ["101", "102", "103"]
    job = read_job()
    assert (job["job_id"], job["cluster"]) == ("101", "lab")
    assert [(one["command"], one["job_id"]) for one in job["then"]] == [("merge", "102"), ("verify", "103")]


def test_what_is_at_stake(cluster: Cluster, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit(recipe, "--slurm.max_restarts", "1", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "at stake: 1 x 1 GPU for at most 4:00 h = 4.0 GPU-hours a start, at most 1 restart\n" in said


@pytest.mark.parametrize(
    "values", ["optim.lr=1e-4,2e-4,0.0001", "adapter.targets=[q_proj,v_proj],[q_proj, v_proj]", "eval.every_steps=5,+5"]
)
def test_one_value_written_in_two_ways_is_no_sweep(
    values: str, cluster: Cluster, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(recipe, "--array", values) == 2
    assert "are one and the same run\n  fix: keep one of them" in capsys.readouterr().err
    assert not Path("run").exists() and not cluster.scripts()


LRS = ("1e-4", "2e-4", "3e-4")
ARRAY = ("--array", "optim.lr=1e-4,2e-4,3e-4", "--then", "merge,verify")


def done(run_dir: str, *followed: str) -> None:
    """As a run's own job and those that follow leave it."""
    path = Path("run", run_dir)
    (path / "state.json").write_text('{"state": "done"}')
    events: list[dict[str, Any]] = [{"event": "start", "time": 1, "job_id": "x"}]
    events += [{"event": "followed", "time": 2, "command": command, "status": 0} for command in followed]
    events += [{"event": "followed", "time": 3, "command": "verify", "status": 1}]
    with open(path / "attempts.jsonl", "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(event) + "\n" for event in events))


def test_what_did_not_follow_done_runs_is_queued_by_the_same_command(
    cluster: Cluster, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a sweep that was cancelled: one run is done and merged, two are done, and all the rest is gone."""
    assert submit(recipe, *ARRAY) == 0
    for lr, followed in {"1e-4": ("merge",), "2e-4": (), "3e-4": ()}.items():
        done(f"optim.lr={lr}", *followed)
    cluster.has(j101_0="COMPLETED", j102_1="CANCELLED", j103_0="CANCELLED")
    assert submit(recipe, *ARRAY, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "optim.lr=1e-4 is done; verify is to follow\n2 runs are done; merge and verify are to follow\n" in said
    assert submit(recipe, *ARRAY) == 0
    scripts = cluster.scripts()
    assert list(scripts) == ["101", "102", "103", "104", "105", "106"]
    assert "dependency" not in scripts["104"] and "followed verify" in scripts["104"]
    assert "--array=0-1" in scripts["105"] and "followed merge" in scripts["105"] and "dependency" not in scripts["105"]
    assert "dependency=aftercorr:105" in scripts["106"] and "followed verify" in scripts["106"]
    then = {lr: [(one["command"], one["job_id"]) for one in read_job(f"run/optim.lr={lr}")["then"]] for lr in LRS}
    assert then == {
        "1e-4": [("merge", "102_0"), ("verify", "104")],
        "2e-4": [("merge", "105_0"), ("verify", "106_0")],
        "3e-4": [("merge", "105_1"), ("verify", "106_1")],
    }
    runs = [Path("run/submissions", number, "runs").read_text().split() for number in ("0002", "0003")]
    assert [[Path(run_dir).name[-4:] for run_dir in of_one] for of_one in runs] == [["1e-4"], ["2e-4", "3e-4"]]
    assert read_job("run/optim.lr=1e-4")["job_id"] == "101_0"

    cluster.has(j104="PENDING", j105_0="RUNNING", j106_0="PENDING", j106_1="PENDING")
    assert submit(recipe, *ARRAY) == 0
    assert "every run is done or queued" in capsys.readouterr().out
    assert len(cluster.scripts()) == 6


def test_cancelled_runs_of_a_sweep_are_queued_beside_what_did_not_follow(cluster: Cluster, recipe: Path) -> None:
    assert submit(recipe, *ARRAY) == 0
    done("optim.lr=1e-4", "merge")
    assert submit(recipe, *ARRAY) == 0
    scripts = cluster.scripts()
    assert [("-m submitit" in text, "followed" in text) for text in scripts.values()][3:] == [
        *((True, False), (True, True), (True, True)),
        (True, True),
    ]
    assert read_job("run/optim.lr=2e-4")["job_id"] == "104_0"
    assert [one["job_id"] for one in read_job("run/optim.lr=1e-4")["then"]] == ["102_0", "107"]


def test_nothing_follows_twice(cluster: Cluster, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit(recipe, "--then", "merge") == 0
    done(".", "merge")
    assert submit(recipe, "--then", "merge") == 0
    assert "this run is done; nothing to submit" in capsys.readouterr().out
    assert len(cluster.scripts()) == 2


def test_what_is_verified_is_whole_or_was_merged(toy_recipe: Callable[..., RunConfig]) -> None:
    check_then(toy_recipe(), ["verify"])  # a full fine-tune's model needs no merge
    check_then(toy_recipe(adapter={"r": 4}), ["merge", "verify"])
    check_then(toy_recipe(adapter={"r": 4}, export={"merge": True}), ["verify"])
    with pytest.raises(UserError, match="nothing merges before it"):
        check_then(toy_recipe(adapter={"r": 4}), ["verify", "merge"])
    with pytest.raises(UserError, match="a full fine-tune is whole as it is"):
        check_then(toy_recipe(), ["merge", "verify"])


def test_a_job_does_not_train_on_data_that_were_edited_since(
    cluster: Cluster, toy_recipe_file: Callable[..., Path], toy_rows_file: Path, tmp_path: Path
) -> None:
    from trainer.run import train

    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(toy_rows_file.read_bytes())
    data = {"train": [{"path": str(rows), "format": "messages"}], "pack_length": 128}
    recipe = toy_recipe_file(adapter={"r": 4}, data=data, train={"max_steps": 1}, slurm={"gpus_per_node": 0})
    assert submit(recipe) == 0
    submission = Path(read_job()["submission"])

    environ = {**cluster.commands.environ, "PYTHONPATH": str(submission / "code"), SUBMISSION: str(submission)}
    code = "import sys; sys.executable = '/bin/echo'; from slurm.job import run_task; run_task('run')"
    ran = subprocess.run([sys.executable, "-P", "-c", code], env=environ, capture_output=True, text=True, check=True)
    *started, option, fingerprint = ran.stdout.split()
    config = load_recipe(submission / "recipes" / "0.yaml")
    assert started[-4:] == ["trainer", str(submission / "recipes" / "0.yaml"), "--run-dir", "run"]
    assert option == "--data-fingerprint"

    rows.write_bytes(b"".join(rows.read_bytes().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match=r"data: not the tokens that were submitted.*\n  fix: .* or submit again"):
        train(config, Path("run"), data=fingerprint)
    assert not Path("run/recipe.yaml").exists() and not Path("run/state.json").exists()

    rows.write_bytes(toy_rows_file.read_bytes())  # the same again, with another time
    train(config, Path("run"), data=fingerprint)
    assert json.loads(Path("run/state.json").read_text())["state"] == "done"
