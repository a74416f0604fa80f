"""The job's script as a value, what is queued after it, and the recipe's slurm section with a cluster's profile."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm.script import command_script, job_name, script_text, training_script
from slurm.snapshot import PACKAGES, next_submission, take_snapshot, with_absolute_paths
from slurm.sweep import expand
from trainer.config import RunConfig, SlurmConfig, minutes_of
from trainer.errors import UserError
from trainer.recipe import load_profile, load_recipe

HERE = Path("/runs/a 'run'/submissions/0001")

TEXT = """\
#!/bin/bash

# Parameters
#SBATCH --account=proj1
#SBATCH --chdir='/runs/a '"'"'run'"'"'/submissions/0001'
#SBATCH --constraint=nvlink
#SBATCH --cpus-per-task=12
#SBATCH --exclude='n7,n[9-11]'
#SBATCH --exclusive
#SBATCH --gpus-per-node=a100:4
#SBATCH --job-name=packtrain-my-run
#SBATCH --mail-type=END
#SBATCH --mem=480G
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output='/runs/a '"'"'run'"'"'/submissions/0001/script/%j_0_log.out'
#SBATCH --partition=gpu
#SBATCH --qos=long
#SBATCH --requeue
#SBATCH --signal=USR2@180
#SBATCH --time=1440

# setup
SUBMISSION='/runs/a '"'"'run'"'"'/submissions/0001'
MAX_RESTARTS=7 LIMIT_SECONDS=86400
EXCLUDE='n7,n[9-11]'
export PACKTRAIN_SUBMISSION='/runs/a '"'"'run'"'"'/submissions/0001'
export HF_HUB_OFFLINE=1
export PYTHONSAFEPATH=1
export PYTHONPATH='/runs/a '"'"'run'"'"'/submissions/0001/code'
export NCCL_SOCKET_IFNAME='ib0,ib1 x'
source "$SUBMISSION/code/slurm/batch.sh"
begin
module load CUDA/12.8
check_setup $? 'module load CUDA/12.8'
conda activate packtrain
check_setup $? 'conda activate packtrain'
set +eu

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output '/runs/a '"'"'run'"'"'/submissions/0001/script/%j_%t_log.out' --kill-on-bad-exit=1 --wait=0 \
--open-mode=append --distribution=block --cpus-per-task=12 --container-image=a.sqsh \
apptainer exec --nv i.sif python -u -m submitit.core._submit '/runs/a '"'"'run'"'"'/submissions/0001/script'


# teardown
end $?"""

SLURM = SlurmConfig.model_validate(
    {
        "partition": "gpu",
        "account": "proj1",
        "qos": "long",
        "constraint": "nvlink",
        "exclude": ["n7", "n[9-11]"],
        "time": "1-00:00:00",
        "nodes": 2,
        "gpus_per_node": 4,
        "gpu_type": "a100",
        "cpus_per_gpu": 12,
        "memory": "480G",
        "exclusive": True,
        "stop_seconds": 180,
        "max_restarts": 7,
        "modules": ["CUDA/12.8"],
        "setup": ["conda activate packtrain"],
        "env": {"NCCL_SOCKET_IFNAME": "ib0,ib1 x"},
        "python": "apptainer exec --nv i.sif python",
        "srun_args": ["--container-image=a.sqsh"],
        "sbatch": {"mail-type": "END", "hold": False},
    }
)


@pytest.fixture(autouse=True)
def _srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """submitit looks for it where scripts are made."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name in ("PACKTRAIN_CACHE", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def test_all_of_a_training_jobs_script() -> None:
    assert script_text(training_script(SLURM, "my run!", HERE)) == TEXT


def test_an_array_differs_in_its_output_and_in_being_one() -> None:
    text = script_text(training_script(SLURM, "my run!", HERE), 3)
    changed = set(text.splitlines()) - set(TEXT.splitlines())
    assert "#SBATCH --array=0-2%3" in changed
    assert {line.split()[0] for line in changed} == {"#SBATCH", "srun"}
    assert all("%A_%a" in line for line in changed if "array" not in line)


def test_caches_are_the_submitters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACKTRAIN_CACHE", "/shared/cache of us")
    assert "export PACKTRAIN_CACHE='/shared/cache of us'\n" in script_text(training_script(SLURM, "run", HERE))


@pytest.mark.parametrize(("command", "partition"), [("merge", "partition=cpu"), ("evaluate", "partition=gpu")])
def test_what_follows_waits_for_success(command: str, partition: str) -> None:
    slurm = SLURM.model_copy(update={"cpu_partition": "cpu"})
    text = script_text(command_script(slurm, "run", command, HERE, "12", 1))
    for line in (partition, "dependency=afterok:12", "kill-on-invalid-dep=yes", "nodes=1", "ntasks-per-node=1"):
        assert f"#SBATCH --{line}\n" in text
    assert ("gpus-per-node=a100:1" in text) == (command == "evaluate")
    assert f"#SBATCH --job-name=packtrain-run-{command}\n" in text and text.endswith(f"\nfollowed {command} $?")
    assert "dependency" not in script_text(command_script(slurm, "run", command, HERE, None, 1))
    assert "aftercorr:12" in script_text(command_script(slurm, "run", command, HERE, "12", 4))


def test_the_scripts_shell_is_valid(tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    for slurm in (SLURM, SlurmConfig()):
        script.write_text(script_text(training_script(slurm, "run", HERE)))
        assert subprocess.run(["bash", "-n", str(script)], capture_output=True).stderr == b""


# ------------------------------------------------------------------------------------------------------ slurm section


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("30", 30),
        ("90:30", 91),
        ("04:00:00", 240),
        ("4:0:1", 241),
        ("2-00", 2880),
        ("1-12:30", 2190),
        ("7-00:00:00", 10080),
    ],
)
def test_times_in_all_of_slurms_forms(text: str, minutes: int) -> None:
    assert minutes_of(text) == minutes


@pytest.mark.parametrize(
    "text", ["", "x", "0", "00:00", "0-0", "-5", "1:2:3:4", "5-", "1-2-3", "4h", "1.5", "٣٠", "UNLIMITED", "1:", ":30"]
)
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError, match=r"04:00:00|no time"):
        minutes_of(text)


@given(st.integers(1, 10**6))
def test_minutes_are_read_back(minutes: int) -> None:
    days, rest = divmod(minutes, 24 * 60)
    assert minutes_of(f"{days}-{rest // 60:02d}:{rest % 60:02d}:00") == minutes


def test_the_profile_lies_under_the_recipe_and_the_command_line_over_both(
    tmp_path: Path, toy_recipe_file: Callable[..., Path]
) -> None:
    profile = tmp_path / "cluster.yaml"
    profile.write_text("partition: a100\naccount: proj1\ntime: 4:00:00\nenv: {NCCL_DEBUG: WARN}\n")
    recipe = toy_recipe_file(slurm={"time": "08:00:00", "nodes": 3})
    slurm = load_recipe(recipe, {"slurm.nodes": "5"}, profile).slurm
    assert (slurm.partition, slurm.account, slurm.time, slurm.nodes) == ("a100", "proj1", "08:00:00", 5)
    assert slurm.env == {"NCCL_DEBUG": "WARN"}
    assert load_profile(profile).time == "4:00:00"


def test_a_profiles_errors_name_its_lines(tmp_path: Path, toy_recipe_file: Callable[..., Path]) -> None:
    profile = tmp_path / "cluster.yaml"
    profile.write_text("partition: a100\n\ngpus: 4\nnodes: many\n")
    for load in (lambda: load_recipe(toy_recipe_file(), {}, profile), lambda: load_profile(profile)):
        with pytest.raises(UserError) as caught:
            load()
        assert f"{profile}:3: slurm.gpus: unknown field" in str(caught.value)
        assert f"{profile}:4: slurm.nodes: found" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the file is empty\n  allowed: a section with partition, account, "),
        ("- a100\n", ":1: found a list\n  allowed: a section with partition, account, "),
        (None, "no such file\n  fix: name a cluster's profile"),
        ("nodes: 8.5\nnodes: 8\n", "2 errors\n"),
    ],
)
def test_a_profile_that_is_none_is_not_called_a_recipe(
    text: str | None, said: str, tmp_path: Path, toy_recipe_file: Callable[..., Path]
) -> None:
    profile = tmp_path / "cluster.yaml"
    if text is not None:
        profile.write_text(text)
    for load in (lambda: load_recipe(toy_recipe_file(), {}, profile), lambda: load_profile(profile)):
        with pytest.raises(UserError) as caught:
            load()
        heading = str(caught.value).splitlines()[0]
        assert str(profile) in heading and said in str(caught.value)
        assert "a recipe" not in str(caught.value) and "optim" not in str(caught.value)


def test_a_number_for_a_variable_wants_quotes(toy_recipe_file: Callable[..., Path]) -> None:
    recipe = toy_recipe_file()
    with open(recipe, "a", encoding="utf-8") as file:
        file.write('slurm: {env: {A: 8, B: "9"}}\n')
    with pytest.raises(UserError, match=r'slurm\.env\.A: found 8\n  allowed: text\n  fix: put it in quotes: "8"'):
        load_recipe(recipe)
    slurm = load_recipe(recipe, {"slurm.env.A": "8", "slurm.sbatch.nice": "100"}).slurm
    assert slurm.env == {"A": "8", "B": "9"} and slurm.sbatch == {"nice": 100}


@pytest.mark.parametrize(
    "section",
    [
        {"time": "04:00:00\n#SBATCH --uid=0"},
        {"time": "0"},
        {"time": "4h"},
        {"partition": "a\nb"},
        {"setup": ["echo\0"]},
        {"env": {"A-B": "c"}},
        {"sbatch": {"Signal": "x"}},
        {"sbatch": {"requeue": False}},
        {"memory": "lots"},
        {"time": "1", "stop_seconds": 60},
        {"env": {"PATH": "/opt/bin:$PATH"}},
        {"env": {"PYTHONPATH": "/opt"}},
    ],
)
def test_what_could_break_out_of_the_script_is_refused(
    section: dict[str, object], toy_recipe: Callable[..., RunConfig]
) -> None:
    with pytest.raises(ValueError, match="slurm|one line|time|pattern|String"):
        toy_recipe(slurm=section)


# --------------------------------------------------------------------------------------------------- sweep and snapshot


def test_a_sweep_is_all_combinations_the_last_fastest() -> None:
    found = expand(["optim.lr=1e-4,2e-4", "adapter.targets=[q_proj,v_proj],all-linear"])
    assert [variation.values for variation in found] == [
        {"optim.lr": lr, "adapter.targets": targets}
        for lr in ("1e-4", "2e-4")
        for targets in ("[q_proj,v_proj]", "all-linear")
    ]
    assert found[1].name == "optim.lr=1e-4,adapter.targets=all-linear"
    assert "/" not in found[0].name and "[" not in found[0].name
    assert expand([]) == []


@given(
    st.lists(
        st.text(
            st.characters(
                codec="utf-8", exclude_characters=",[]{}=", exclude_categories=("Cc", "Zs", "Zl", "Zp", "Cs")
            ),
            min_size=1,
        ),
        min_size=1,
        max_size=6,
        unique=True,
    )
)
def test_no_two_runs_share_a_folder(values: list[str]) -> None:
    names = [variation.name for variation in expand([f"model.path={','.join(values)}"])]
    assert len(set(names)) == len(values)
    assert all("/" not in name and len(name.encode()) < 200 and name not in (".", "..") for name in names)


@pytest.mark.parametrize(
    "text", ["optim.lr", "optim.lr=", "=1", "optim.lr=1,,2", "optim.lr=1,1", "slurm.nodes=1,2", "a b=1"]
)
def test_what_is_no_sweep_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--array"):
        expand([text])


def test_a_snapshot_is_importable_and_all_its_own(tmp_path: Path, toy_recipe: Callable[..., RunConfig]) -> None:
    submission = next_submission(tmp_path)
    assert submission == tmp_path / "submissions" / "0001"
    submission.mkdir(parents=True)
    take_snapshot(submission, [with_absolute_paths(toy_recipe())], [tmp_path / "run"])
    assert next_submission(tmp_path).name == "0002"
    code = "import launch, slurm, trainer; print(launch.__file__, slurm.__file__, trainer.__file__)"
    found = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={"PYTHONPATH": str(submission / "code")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [path.startswith(str(submission)) for path in found.stdout.split()] == [True] * len(PACKAGES)
    assert (submission / "code" / "slurm" / "batch.sh").exists()
    assert (submission / "runs").read_text() == f"{tmp_path / 'run'}\n"


def test_local_files_are_named_in_full_and_hub_ids_are_not(
    tmp_path: Path, toy_recipe: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "chat.jinja").write_text("{{ bos_token }}")
    monkeypatch.chdir(tmp_path)
    config = toy_recipe(
        model={"path": "meta-llama/Llama-2-7b-hf"},
        data={
            "train": [{"path": "rows.jsonl", "format": "text"}],
            "template": "chat.jinja",
            "split": {"validation": [{"path": "x/../rows.jsonl", "format": "text"}]},
        },
    )
    (tmp_path / "x").mkdir()
    found = with_absolute_paths(config)
    assert found.model.path == "meta-llama/Llama-2-7b-hf"
    assert found.data.train[0].path == str(tmp_path / "rows.jsonl")
    assert isinstance(found.data.split.validation, list)
    assert found.data.split.validation[0].path == str(tmp_path / "rows.jsonl")
    submission = tmp_path / "submissions" / "0001"
    submission.mkdir(parents=True)
    take_snapshot(submission, [found], [tmp_path])
    (tmp_path / "chat.jinja").write_text("edited")
    kept = load_recipe(submission / "recipes" / "0.yaml").data.template
    assert Path(kept).read_text() == "{{ bos_token }}"


@pytest.mark.parametrize(
    ("text", "name"), [("a b/c", "a-b-c"), ("ü", "run"), ("--x", "x"), ("lr=1e-4,r=8", "lr=1e-4,r=8")]
)
def test_names_of_jobs(text: str, name: str) -> None:
    assert job_name(text) == name
