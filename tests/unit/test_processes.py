"""What processes find out of one another before they compute together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from trainer import devices, processes
from trainer.devices import choose_device
from trainer.errors import EXIT_FAILURE, EXIT_USER_ERROR, PacktrainError, PreflightFailed, UserError
from trainer.launchers import World, granted_gpus
from trainer.processes import check_devices, start_processes

LOST = PreflightFailed("GPUs: CUDA sees 3 here, SLURM granted 4", blamed="n2")
TOO_MANY = UserError("LOCAL_RANK", "2, and this host shows 2 GPUs")


def look(uuids: Sequence[str], faults: Sequence[PacktrainError | None] = ()) -> list[PacktrainError | None]:
    """What each of as many ranks is told."""
    store = dist.HashStore()

    def rank(number: int) -> PacktrainError | None:
        try:
            check_devices(store, number, len(uuids), uuids[number], faults[number] if faults else None)
        except PacktrainError as error:
            return error
        return None

    with ThreadPoolExecutor(len(uuids)) as pool:
        return list(pool.map(rank, range(len(uuids))))


@pytest.mark.parametrize("uuids", [["a", "b", "c"], ["", "", ""]], ids=["own GPUs", "no GPUs"])
def test_processes_with_a_gpu_each_or_none_may_go_on(uuids: list[str]) -> None:
    assert look(uuids) == [None] * 3


def test_two_processes_on_one_gpu_are_named_to_all() -> None:
    told = look(["a", "b", "a"])
    assert all("ranks 0 and 2 have the same GPU" in str(error) for error in told)


def test_a_host_that_lost_a_gpu_is_named_to_all_and_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    for error in look(["a", "b", ""], [None, None, LOST]):
        assert isinstance(error, PreflightFailed) and error.blamed == "n2" and error.exit_status == EXIT_FAILURE
        assert str(error).startswith("rank 2 on host n2: GPUs: CUDA sees 3 here")


def test_more_processes_than_gpus_is_wrong_input_though_some_have_one() -> None:
    for error in look(["a", "b", ""], [None, None, TOO_MANY]):
        assert error is not None and error.exit_status == EXIT_USER_ERROR and not error.blamed
        assert "rank 2 on host" in str(error)


def test_what_all_hosts_lack_is_no_hosts_fault() -> None:
    others = PreflightFailed(str(LOST), blamed="n1")
    for error in look(["", ""], [LOST, others]):
        assert isinstance(error, PreflightFailed) and not error.blamed
        assert str(error).startswith("GPUs: ")


# GPUs granted


@pytest.mark.parametrize(
    ("environ", "granted"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, None),  # a user's own choice
        ({"SLURM_JOB_ID": "7"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "4"}, 4),
        ({"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 4),
        ({"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "2"}, 1),  # bound to this task
        ({"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": ""}, 0),  # hidden on purpose
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_GPUS": "4,5"}, 2),
        ({"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 0),
        ({"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "MIG-1c2f,MIG-9b1e"}, 1),
    ],
)
def test_gpus_that_slurm_granted(environ: dict[str, str], granted: int | None) -> None:
    assert granted_gpus(environ) == granted


def with_gpus(monkeypatch: pytest.MonkeyPatch, visible: int, cuda: str | None = "13.0") -> None:
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(devices, "count_gpus", lambda environ: visible)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURMD_NODENAME", "n2")


def test_as_many_gpus_as_were_granted_are_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, visible=4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert choose_device(3) == torch.device("cuda", 3)


@pytest.mark.parametrize("visible", [0, 3])
def test_a_gpu_that_is_lost_is_its_hosts_fault(monkeypatch: pytest.MonkeyPatch, visible: int) -> None:
    with_gpus(monkeypatch, visible)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    with pytest.raises(
        PreflightFailed, match=f"CUDA sees {visible} here, SLURM granted 4 .*\n.*allowed.*\n.*fix: "
    ) as e:
        choose_device(0)
    assert e.value.blamed == "n2"


def test_a_torch_without_cuda_is_nobodys_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 0, cuda=None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(UserError, match="cannot use this host's 2 GPUs.*\n.*\n.*--train.device cpu"):
        choose_device(0)


def test_device_cpu_leaves_the_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")  # as many as SLURM granted of fake ones
    monkeypatch.setattr(torch.cuda, "set_device", pytest.fail)
    assert choose_device(0, "cpu") == torch.device("cpu")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""  # for the libraries that look by themselves


# Where they meet


def test_a_taken_port_is_told_with_what_to_do() -> None:
    taken = dist.TCPStore("127.0.0.1", 0, is_master=True)
    with (
        pytest.raises(PreflightFailed, match=f"127.0.0.1:{taken.port} is taken by another program.*\n  fix: start"),
        start_processes(World(0, 2, 0, 2, "127.0.0.1", taken.port), needs_group=True, kind="auto"),
    ):
        pass


def test_a_process_that_never_comes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "MEETING_TIMEOUT", timedelta(seconds=1))
    with (
        pytest.raises(PreflightFailed, match="rank 0 on host .* did not bring all 2 processes together within 0:00:01"),
        start_processes(World(0, 2, 0, 2, "127.0.0.1", 0), needs_group=True),
    ):
        pass
