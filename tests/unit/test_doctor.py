"""`packtrain doctor`: what it says of hosts and clusters that work, that lack something, and that are broken."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from slurm_commands import NO_ACCOUNTING, Commands

from launch import cli
from launch.checks import Check, run_checks
from launch.host_checks import GIB, check_disks, check_shm

ROOT = Path(__file__).parents[2]
SINFO = (
    "gpu|gpu*|up|2-00:00:00|gpu:a100:8(S:0-1)|128|1031000|a100,ib|g[01-16]\ncpu|cpu|up|infinite|(null)|64|1|(null)|c1\n"
)
CONFIG = """\
Configuration data as of 2026-11-21T12:25:41
AuthInfo                = (null)
ClusterName             = alps
JobRequeue              = 1
KillWait                = 30 sec
MinJobAge               = 300 sec
PreemptMode             = {mode}
PreemptType             = {kind}
SlurmctldParameters     = {parameters}
SLURM_VERSION           = 22.05.8
"""
PARTITION = (
    "PartitionName={name} AllowGroups=ALL Default=YES GraceTime={grace} Hidden=NO PreemptMode={mode} State=UP \n"
)
SMI_TABLE = "550.54.15, 143771, 4, NVIDIA H200\n550.54.15, 143771, 90000, NVIDIA H200\n"
SMI_HEADING = "| NVIDIA-SMI 550.54.15    Driver Version: 550.54.15   CUDA Version: {cuda} |\n"
# Libraries that import at once. A test replaces the one it is about.
LIBRARIES = {
    "torch": """
        __version__ = "{version}"
        class version: cuda = {cuda!r}
        class cuda:
            is_available = staticmethod(lambda: {gpus} > 0)
            device_count = staticmethod(lambda: {gpus})
            get_device_name = staticmethod(lambda index: "NVIDIA H200")
            is_bf16_supported = staticmethod(lambda: True)
            class nccl: version = staticmethod(lambda: (2, 27, 5))
        class Tensor:
            def __sub__(self, other): return self
            def __getattr__(self, name): return lambda *a, **k: self
            def __float__(self): return {error}
        def ones(*a, **k): return Tensor()
        def linspace(*a, **k): return Tensor()
    """,
    "bitsandbytes": """
        import torch
        from . import functional
    """,
    "deepspeed": "__version__ = '0.19.8'",
}


def write_libraries(folder: Path, version: str = "2.13.0", cuda: str | None = None, gpus: int = 0, **own: str) -> Path:
    """A folder for PYTHONPATH with `LIBRARIES`, or what `own` says instead of one."""
    for name, text in {**LIBRARIES, **own}.items():
        if name == "torch" and name not in own:
            text = text.format(version=version, cuda=cuda, gpus=gpus, error=0.1)
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(re.sub(r"^        ", "", text, flags=re.MULTILINE))
    native = "class BNBNativeLibrary: compiled_with_cuda = False\nlib = BNBNativeLibrary()\n"
    (folder / "bitsandbytes/cextension.py").write_text(native)
    functional = "quantize_4bit = lambda w, quant_type: (w, w)\ndequantize_4bit = lambda w, s: w\n"
    (folder / "bitsandbytes/functional.py").write_text(functional)
    return folder


@pytest.fixture
def commands(tmp_path: Path) -> Commands:
    return Commands(tmp_path / "bin")


@pytest.fixture
def slurm(commands: Commands) -> Commands:
    """A cluster that works."""
    for name in ("srun", "squeue", "scancel"):
        commands.add(name)
    commands.add("sbatch", stderr="sbatch: Job 15 to start at 2026-11-21T13:00:00 using 1 processors on nodes g01")
    commands.add("sinfo", SINFO)
    commands.add("sacct")
    set_config(commands)
    return commands


def set_config(
    commands: Commands,
    kind: str = "preempt/none",
    mode: str = "OFF",
    parameters: str = "(null)",
    partitions: str = PARTITION.format(name="gpu", grace=0, mode="OFF"),
) -> None:
    (commands.folder / "config").write_text(CONFIG.format(kind=kind, mode=mode, parameters=parameters))
    (commands.folder / "partitions").write_text(partitions)
    shell = f'case "$*" in *partition*) cat {commands.folder}/partitions ;; *) cat {commands.folder}/config ;; esac'
    commands.add("scontrol", shell=shell)


def run_doctor(commands: Commands, *arguments: str, libraries: Path | None = None, **environ: str) -> Any:
    """The process's result; without a terminal."""
    path = ":".join(map(str, filter(None, [libraries, ROOT])))
    command = [sys.executable, "-P", "-m", "launch.cli", "doctor", *arguments]
    own = {"PYTHONPATH": path, "HOME": str(commands.folder.parent), **environ}
    return subprocess.run(
        command, env=commands.environ | own, capture_output=True, text=True, cwd=commands.folder.parent, timeout=200
    )


def ask(commands: Commands, *arguments: str, status: int = 0, **options: Any) -> dict[str, dict[str, Any]]:
    """The checks by name, with libraries that import at once unless others are given."""
    if "libraries" not in options:
        options["libraries"] = write_libraries(commands.folder.parent / "libraries")
    result = run_doctor(commands, "--json", *arguments, **options)
    assert result.returncode == status, result.stdout + result.stderr
    document = json.loads(result.stdout)
    assert document["ok"] == (status == 0)
    return {check["name"]: check for check in document["checks"]}


def test_a_laptop_with_the_real_libraries(commands: Commands) -> None:
    result = run_doctor(commands, COLUMNS="80")
    assert result.returncode == 0, result.stdout + result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80
    words = " ".join(result.stdout.split())
    assert f"ok code {ROOT}" in words
    assert "ok bitsandbytes kernels load for" in words and "4-bit weights come back right" in words
    assert "- GPUs no nvidia-smi" in words
    assert "- SLURM no sbatch on PATH: runs are local" in words
    assert "FAIL" not in words and result.stderr == ""


def test_a_cluster_that_works(slurm: Commands) -> None:
    checks = ask(slurm)
    assert {checks[name]["status"] for name in ("SLURM", "default partition", "sbatch --test-only", "accounting")} == {
        "ok"
    }
    assert checks["SLURM"]["found"] == "22.05.8, cluster alps, 17 nodes"
    assert "gpu, at most 2 d 00 h a job, 8 GPUs a node" in checks["default partition"]["found"]
    assert "jobs are not preempted; scancel leaves 30 s" in checks["preemption"]["found"]
    assert "starts after some 2 min" in checks["requeue"]["found"]
    assert "--test-only" in slurm.calls("sbatch")[0]
    shown = run_doctor(slurm, libraries=slurm.folder.parent / "libraries", COLUMNS="80").stdout
    assert max(map(len, shown.splitlines())) <= 80
    assert re.search(r"gpu\* +up +2 d 00 h +16 +8 a100 +128 +1007 +a100,ib", shown)
    piped = run_doctor(slurm, libraries=slurm.folder.parent / "libraries").stdout
    assert re.search(r"default partition +gpu, at most .* in the next job", piped)  # on one line


def test_a_controller_that_is_down_is_a_failure(slurm: Commands) -> None:
    slurm.add("scontrol", status=1, stderr="slurm_load_ctl_conf error: Unable to contact slurm controller")
    check = ask(slurm, status=1)["SLURM"]
    assert check["status"] == "failed" and "Unable to contact slurm controller" in check["found"]


def test_slurms_commands_on_a_workstation_without_a_cluster(slurm: Commands, tmp_path: Path) -> None:
    said = "scontrol: error: fetch_config: DNS SRV lookup failed\nscontrol: fatal: Could not establish a configuration"
    slurm.add("scontrol", status=1, stderr=f"{said} source")
    libraries = write_libraries(tmp_path / "libraries")
    check = ask(slurm, libraries=libraries)["SLURM"]
    assert check["status"] == "not here" and "know of no cluster: runs are local" in check["found"]
    profile = tmp_path / "cluster.yaml"
    profile.write_text("partition: gpu\n")
    assert ask(slurm, "--cluster", str(profile), status=1, libraries=libraries)["SLURM"]["status"] == "failed"


def test_half_of_slurm_is_a_failure(slurm: Commands) -> None:
    slurm.remove("scancel")
    check = ask(slurm, status=1)["SLURM"]
    assert check["found"] == "not on PATH: scancel"


@pytest.mark.parametrize("missing", [True, False])
def test_without_accounting_packtrain_works(missing: bool, slurm: Commands) -> None:
    slurm.remove("sacct")
    if not missing:
        slurm.add("sacct", status=1, stderr=NO_ACCOUNTING)
    check = ask(slurm)["accounting"]
    assert check["status"] == "not here" and "forgotten after 5 min" in check["found"]


def test_a_job_that_sbatch_would_refuse(slurm: Commands, tmp_path: Path) -> None:
    slurm.add(
        "sbatch", status=1, stderr="allocation failure: Invalid account or account/partition combination specified"
    )
    check = ask(slurm)["sbatch --test-only"]
    assert check["status"] == "warning" and "Invalid account" in check["found"] and "--cluster FILE" in check["fix"]


@pytest.mark.parametrize(
    ("config", "status", "found", "fix"),
    [
        (
            {"kind": "preempt/partition_prio", "mode": "REQUEUE"},
            "ok",
            "TERM (no preempt_send_user_signal), then 30 s (KillWait) after GraceTime: gpu 60 s, low 0 s",
            "",
        ),
        (
            {"kind": "preempt/qos", "mode": "REQUEUE", "parameters": "preempt_send_user_signal"},
            "ok",
            "qos, REQUEUE: USR2 and TERM",
            "",
        ),
        (
            {"kind": "preempt/qos", "mode": "CANCEL"},
            "warning",
            "qos, CANCEL",
            "preempted in gpu, low are not queued again",
        ),
    ],
)
def test_preemption(config: dict[str, str], status: str, found: str, fix: str, slurm: Commands) -> None:
    mode = config["mode"]
    partitions = [("gpu", 60, mode), ("low", 0, mode), ("high", 0, "OFF")]
    text = "".join(PARTITION.format(name=name, grace=grace, mode=one) for name, grace, one in partitions)
    set_config(slurm, **config, partitions=text)
    check = ask(slurm)["preemption"]
    assert check["status"] == status and found in check["found"] and fix in check["fix"]


def test_little_time_before_a_preemption_is_a_warning(slurm: Commands) -> None:
    set_config(slurm, "preempt/qos", "REQUEUE", partitions=PARTITION.format(name="low", grace=0, mode="REQUEUE"))
    config = slurm.folder / "config"
    config.write_text(config.read_text().replace("30 sec", "5 sec"))
    check = ask(slurm)["preemption"]
    assert check["status"] == "warning" and "checkpoint.every_steps low" in check["fix"]


@pytest.mark.parametrize(
    ("profile", "status", "found"),
    [
        ("partition: gpu\ngpus_per_node: 8\ngpu_type: a100\ntime: 1-00\n", "ok", "partition gpu"),
        ("partition: gpus\n", "failed", "partition: gpus is no partition here"),
        ("gpus_per_node: 16\n", "failed", "gpus_per_node: 16; gpu has 8 a node"),
        ("gpu_type: h100\n", "failed", "gpu_type: h100; gpu has a100"),
        ("time: 7-00\n", "failed", "time: 7-00; gpu has at most 2 d 00 h"),
        ("partiton: gpu\n", "failed", "did you mean"),
        ("[1, 2\n", "failed", "cluster.yaml"),
    ],
)
def test_a_cluster_s_profile(profile: str, status: str, found: str, slurm: Commands, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(profile)
    check = ask(slurm, "--cluster", str(path), status=0 if status == "ok" else 1)["cluster profile"]
    assert check["status"] == status and found in check["found"]
    if status == "ok":
        assert "--partition=gpu" in slurm.calls("sbatch")[0]


def test_a_missing_profile(commands: Commands) -> None:
    check = ask(commands, "--cluster", "no.yaml", status=1)["cluster profile"]
    assert "no.yaml" in check["found"]


# GPUs and libraries


def add_gpus(commands: Commands, cuda: str) -> None:
    shell = f"case $# in 0) echo '{SMI_HEADING.format(cuda=cuda).strip()}'; exit 0 ;; esac"
    commands.add("nvidia-smi", SMI_TABLE, shell=shell)


def test_gpus_that_work(commands: Commands) -> None:
    add_gpus(commands, "13.0")
    libraries = write_libraries(commands.folder.parent / "gpu", cuda="12.8", gpus=2)
    checks = ask(commands, libraries=libraries)
    assert checks["GPUs"]["found"] == "2 x NVIDIA H200 (140 GiB), driver 550.54.15 (CUDA 13.0); in use: GPU 1"
    assert checks["torch and CUDA"]["found"] == "2 GPUs, CUDA 12.8, NCCL 2.27.5"


def test_a_driver_that_is_too_old(commands: Commands) -> None:
    add_gpus(commands, "12.4")
    check = ask(commands, status=1, libraries=write_libraries(commands.folder.parent / "l", cuda="13.0"))[
        "torch and CUDA"
    ]
    assert check["found"] == "torch 2.13.0 (CUDA 13.0) sees no GPU: the driver runs CUDA 12.4 at most"
    assert "a torch built for CUDA 12.4" in check["fix"]


def test_a_torch_without_cuda_on_a_gpu_host(commands: Commands) -> None:
    add_gpus(commands, "12.4")
    libraries = write_libraries(commands.folder.parent / "l", version="2.13.0+cpu")
    assert "is built without CUDA" in ask(commands, status=1, libraries=libraries)["torch and CUDA"]["found"]


def test_hidden_gpus(commands: Commands) -> None:
    add_gpus(commands, "13.0")
    libraries = write_libraries(commands.folder.parent / "l", cuda="12.8")
    check = ask(commands, libraries=libraries, CUDA_VISIBLE_DEVICES="")["torch and CUDA"]
    assert check["status"] == "warning" and "hides the GPUs" in check["found"]


def test_a_driver_that_does_not_answer(commands: Commands) -> None:
    commands.add("nvidia-smi", status=18, stderr="Failed to initialize NVML: Driver/library version mismatch")
    check = ask(commands, status=1)["GPUs"]
    assert "Driver/library version mismatch" in check["found"] and "reboot" in check["fix"]


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        (
            "raise ImportError('libcudart.so.13: cannot open shared object file')",
            "cannot be imported: ImportError: libcud",
        ),
        ("import os; os.abort()", "cannot be imported: killed by signal 6"),
        ("import sys; sys.exit(3)", "cannot be imported: status 3"),
    ],
)
def test_a_broken_torch_does_not_break_doctor(broken: str, found: str, commands: Commands) -> None:
    checks = ask(commands, status=1, libraries=write_libraries(commands.folder.parent / "l", torch=broken))
    assert checks["torch and CUDA"]["found"].startswith(found)
    assert checks["deepspeed import"]["status"] == "ok" and checks["SLURM"]["status"] == "not here"


def test_bitsandbytes_without_its_native_library(commands: Commands) -> None:
    libraries = write_libraries(commands.folder.parent / "l")
    native = libraries / "bitsandbytes/cextension.py"
    native.write_text("class ErrorHandlerMockBNBNativeLibrary: pass\nlib = ErrorHandlerMockBNBNativeLibrary()\n")
    check = ask(commands, status=1, libraries=libraries)["bitsandbytes kernels"]
    assert check["found"] == "its native library does not load"


def test_a_broken_deepspeed_is_a_warning(commands: Commands) -> None:
    checks = ask(commands, libraries=write_libraries(commands.folder.parent / "l", deepspeed="1/0"))
    assert checks["deepspeed import"]["status"] == "warning"
    assert "ZeroDivisionError" in checks["deepspeed import"]["found"]


def test_versions_out_of_range(commands: Commands) -> None:
    libraries = write_libraries(commands.folder.parent / "l")
    for name, version in {"peft": "0.15.2", "rich": "12.0"}.items():
        info = libraries / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    checks = ask(commands, status=1, libraries=libraries)
    assert checks["peft"]["found"].startswith("0.15.2, needed ") and "pip install 'peft" in checks["peft"]["fix"]
    assert checks["rich"]["status"] == "failed"
    assert checks["transformers"]["status"] == "ok"


# the code itself


def test_another_package_called_slurm(commands: Commands) -> None:
    libraries = write_libraries(commands.folder.parent / "l")
    (libraries / "slurm").mkdir()
    (libraries / "slurm/__init__.py").write_text("")
    checks = ask(commands, status=1, libraries=libraries)
    assert checks["code"]["found"] == f"slurm from {libraries}"
    assert "cannot be looked at" in checks["SLURM"]["found"]


def test_a_snapshot_is_one_place_too(commands: Commands, tmp_path: Path) -> None:
    code = tmp_path / "submissions/0001/code"
    for package in ("launch", "slurm", "trainer"):
        shutil.copytree(ROOT / package, code / package, ignore=shutil.ignore_patterns("__pycache__"))
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "of another project"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    libraries = write_libraries(tmp_path / "l")
    result = subprocess.run(
        [sys.executable, "-P", "-m", "launch.cli", "doctor", "--json"],
        env=commands.environ | {"PYTHONPATH": f"{libraries}:{code}"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert (checks["code"]["status"], checks["code"]["found"]) == ("ok", str(code))
    assert checks["git"]["status"] == "not here"
    assert checks["torch"]["status"] == "ok"  # by what was installed: there is no setup.cfg


def test_a_folder_that_hides_ours(commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "trainer").mkdir()
    check = ask(commands)["folders here"]
    assert check["status"] == "warning"
    assert check["found"] == "the current folder has its own trainer, which torchrun -m trainer would take"


# rooms


def test_small_disks_and_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(64 << 20, 0, 64 << 20))
    (shm,) = check_shm()
    assert (shm.status, shm.found) == ("warning", "0.1 GiB free of 0.1 GiB") and "--shm-size" in shm.fix
    assert {check.status for check in check_disks()} == {"failed"}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(90 * GIB, 0, 5 * GIB))
    assert {check.status for check in check_disks()} == {"warning"}


def test_a_check_that_fails_itself_does_not_stop_the_others() -> None:
    def check_bad_luck() -> list[Check]:
        raise ZeroDivisionError("oh")

    found = run_checks([check_bad_luck, lambda: [Check("next", "ok", "")]])
    assert [check.name for check in found] == ["bad luck", "next"]
    assert (found[0].status, found[0].found) == ("failed", "cannot be looked at: ZeroDivisionError: oh")


def test_help_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--help"]) == 0
    assert "--cluster" in capsys.readouterr().out
