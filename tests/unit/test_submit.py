"""`packtrain submit` with stand-ins for SLURM's commands: what it queues, notes, refuses; tests/slurm has real ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from slurm_commands import NO_ACCOUNTING, Commands, squeue_line

from launch import cli

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


@pytest.mark.parametrize(
    "values", ["optim.lr=1e-4,2e-4,0.0001", "adapter.targets=[q_proj,v_proj],[q_proj, v_proj]", "eval.every_steps=5,+5"]
)
def test_one_value_written_in_two_ways_is_no_sweep(
    values: str, cluster: Cluster, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(recipe, "--array", values) == 2
    assert "are one and the same run\n  fix: keep one of them" in capsys.readouterr().err
    assert not Path("run").exists() and not cluster.scripts()
