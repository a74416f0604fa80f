"""Facts of a cluster, from what sinfo and scontrol print, and SLURM's times and host lists."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from slurm_commands import Commands

from slurm.cluster import (
    SlurmError,
    SlurmMissing,
    expand_hosts,
    parse_cluster,
    parse_config,
    parse_duration,
    parse_gpus,
    parse_limit,
    read_cluster,
    run_slurm,
)
from trainer.errors import EXIT_USER_ERROR

# sinfo --noheader --all --exact -o '%R|%P|%a|%l|%G|%c|%m|%f|%N'
LAB = "main|main*|up|infinite|gpu:4|8|16000|(null)|node[0-3]\n"
MIXED = """\
cpu|cpu|up|1-00:00:00|(null)|64|257000|milan,ib|c[001-128]
gpu|gpu*|up|2-00:00:00|gpu:a100:8(S:0-1)|128|1031000|a100,nvlink,ib|g[01-16]
gpu|gpu*|up|2-00:00:00|gpu:a100:4(S:0-3),nvme:1|64|515000|a100,ib|g[17-20]
gpu|gpu*|up|2-00:00:00|gpu:h100:4(S:0-1)|96|1545000|h100,ib|h[1-2]
short|short|up|30:00|gpu:a100:8(S:0-1)|128|1031000|a100,nvlink,ib|g[01-16]
drained|drained|drain|n/a|gpu:1|4|7900|(null)|old1
empty|empty|inact|infinite|(null)|0|0|(null)|
"""


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    made = Commands(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(made.folder))
    return made


def test_the_lab() -> None:
    facts = parse_cluster(LAB)
    (main,) = facts.partitions.values()
    assert facts.default is main
    assert (main.name, main.is_up, main.max_minutes, main.num_nodes) == ("main", True, None, 4)
    assert (main.gpus_per_node, main.gpu_types, main.cpus_per_node, main.memory_mib) == (4, frozenset(), 8, 16000)
    assert main.features == frozenset()
    assert facts.nodes == ["node0", "node1", "node2", "node3"]


def test_partitions_of_mixed_nodes() -> None:
    facts = parse_cluster(MIXED)
    assert list(facts.partitions) == ["cpu", "gpu", "short", "drained", "empty"]
    gpu = facts.partitions["gpu"]
    assert facts.default is gpu
    assert (gpu.num_nodes, gpu.gpus_per_node, gpu.cpus_per_node, gpu.memory_mib) == (22, 8, 128, 1545000)
    assert gpu.gpu_types == {"a100", "h100"}
    assert gpu.features == {"a100", "h100", "nvlink", "ib"}
    assert gpu.max_minutes == 2880
    assert facts.partitions["short"].max_minutes == 30
    cpu = facts.partitions["cpu"]
    assert (cpu.gpus_per_node, cpu.max_minutes, cpu.is_default) == (0, 1440, False)
    assert not facts.partitions["drained"].is_up
    assert facts.partitions["empty"].num_nodes == 0
    assert len(facts.nodes) == 128 + 22 + 1
    assert facts.nodes[:2] == ["c001", "c002"]


def test_a_cluster_without_default_partition_or_nodes() -> None:
    assert parse_cluster(LAB.replace("*", "")).default is None
    assert parse_cluster("").partitions == {}
    assert parse_cluster("CLUSTER: one\n" + LAB).nodes == parse_cluster(LAB).nodes


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("(null)", {}),
        ("gpu:4", {"": 4}),
        ("gpu", {"": 1}),
        ("gpu:8(S:0-1)", {"": 8}),
        ("gpu:a100:8(S:0-1)", {"a100": 8}),
        ("gpu:a100:4(S:0,2),gpu:v100:2(S:1),nvme:no_consume:4", {"a100": 4, "v100": 2}),
        ("gpu:nvidia_a100_1g.5gb:7(S:0)", {"nvidia_a100_1g.5gb": 7}),
        ("gpu:h100", {"h100": 1}),
        ("craynetwork:4,shard:16,tmpdisk:900G", {}),
        ("gpu:tesla:no_consume:2", {"tesla": 2}),
    ],
)
def test_gres(gres: str, gpus: dict[str, int]) -> None:
    assert parse_gpus(gres) == gpus


@pytest.mark.parametrize("text", ["UNLIMITED", "infinite", "n/a", "INVALID", "NOT_SET", "Partition_Limit", ""])
def test_no_limit(text: str) -> None:
    assert parse_limit(text) is None


@given(days=st.integers(0, 400), seconds=st.integers(0, 86399))
def test_a_time_written_as_slurm_writes_it_is_read_back(days: int, seconds: int) -> None:
    hours, minutes = divmod(seconds // 60, 60)
    clock = f"{hours:02d}:{minutes:02d}:{seconds % 60:02d}"
    assert parse_duration(f"{days}-{clock}") == days * 86400 + seconds
    assert parse_duration(clock) == seconds
    assert parse_duration(f"{seconds // 60}:{seconds % 60:02d}") == seconds
    assert parse_limit(f"{days}-{clock}") == days * 1440 + -(-seconds // 60)


@pytest.mark.parametrize(
    ("text", "names"),
    [  # as scontrol show hostnames prints them
        ("n[01-03,7],gpu05", ["n01", "n02", "n03", "n7", "gpu05"]),
        ("rack[1-2]n[01-02]", ["rack1n01", "rack1n02", "rack2n01", "rack2n02"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("n[1-2]-ib,c1", ["n1-ib", "n2-ib", "c1"]),
        ("one", ["one"]),
        ("", []),
        ("(null)", []),
        ("None assigned", []),
    ],
)
def test_host_lists(text: str, names: list[str]) -> None:
    assert expand_hosts(text) == names


@given(st.lists(st.integers(0, 999), min_size=1, max_size=20), st.integers(1, 4))
def test_a_list_of_single_numbers(numbers: list[int], width: int) -> None:
    padded = [f"{number:0{width}d}" for number in numbers]
    assert expand_hosts(f"n[{','.join(padded)}]") == [f"n{number}" for number in padded]


def test_config() -> None:
    text = """Configuration data as of 2026-11-21T12:25:41
AuthInfo                = socket=/run/munge.socket,cred_expire=5
JobRequeue              = 1
KillWait                = 30 sec
PowerPlugin             = 
SlurmctldHost[0]        = head(10.0.0.1)
SlurmctldParameters     = preempt_send_user_signal,enable_configless

Slurmctld(primary) at head is UP
"""  # noqa: W291
    config = parse_config(text)
    assert config["JobRequeue"] == "1" and config["KillWait"] == "30 sec" and config["PowerPlugin"] == ""
    assert config["AuthInfo"] == "socket=/run/munge.socket,cred_expire=5"
    assert config["SlurmctldHost[0]"] == "head(10.0.0.1)"


def test_reading_asks_once(commands: Commands) -> None:
    commands.add("sinfo", MIXED)
    assert set(read_cluster().partitions) == {"cpu", "gpu", "short", "drained", "empty"}
    assert len(commands.calls("sinfo")) == 1


def test_the_user_s_own_formats_are_put_aside(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SINFO_FORMAT", "SQUEUE_STATES", "SACCT_FORMAT", "SLURM_TIME_FORMAT"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("SLURM_CONF", "/etc/other.conf")
    commands.add("sinfo", shell="env() { compgen -e; }; env")
    seen = run_slurm("sinfo", environ={"SLURM_TIME_FORMAT": "%s"}).split()
    assert "SLURM_CONF" in seen and "SLURM_TIME_FORMAT" in seen
    assert not {"SINFO_FORMAT", "SQUEUE_STATES", "SACCT_FORMAT"} & set(seen)


def test_a_missing_command_is_the_user_s_to_mend(commands: Commands) -> None:
    with pytest.raises(SlurmMissing, match="sinfo: no such command: SLURM is not on this host") as caught:
        read_cluster()
    assert caught.value.exit_status == EXIT_USER_ERROR


def test_a_failing_command_is_told_with_what_it_said(commands: Commands) -> None:
    commands.add("sinfo", status=1, stderr="slurm_load_partitions: Unable to contact slurm controller")
    with pytest.raises(SlurmError, match="sinfo ended with status 1: slurm_load_partitions: Unable") as caught:
        read_cluster()
    assert (caught.value.status, caught.value.command[0]) == (1, "sinfo")


def test_a_hanging_command_is_given_up(commands: Commands) -> None:
    commands.add("sinfo", shell="sleep 8")  # with a child that keeps the pipe open
    began = time.monotonic()
    with pytest.raises(SlurmError, match="sinfo did not answer: nothing within 0.5 s"):
        run_slurm("sinfo", timeout=0.5)
    assert time.monotonic() - began < 5


def test_what_is_no_program_is_told(commands: Commands) -> None:
    (commands.folder / "sinfo").write_bytes(b"\x7fELF nothing")
    os.chmod(commands.folder / "sinfo", 0o755)
    with pytest.raises(SlurmError, match="sinfo ended with status 126"):
        run_slurm("sinfo")
