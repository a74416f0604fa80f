"""What processes find out of one another before they compute together."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from trainer.errors import UserError
from trainer.processes import check_own_gpus


def look(uuids: list[str]) -> list[str]:
    """What each of as many ranks is told."""
    store = dist.HashStore()

    def rank(number: int) -> str:
        try:
            check_own_gpus(store, number, len(uuids), uuids[number])
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(uuids)) as pool:
        return list(pool.map(rank, range(len(uuids))))


@pytest.mark.parametrize("uuids", [["a", "b", "c"], ["", "", ""]], ids=["own GPUs", "no GPUs"])
def test_processes_with_a_gpu_each_or_none_may_go_on(uuids: list[str]) -> None:
    assert look(uuids) == ["", "", ""]


def test_two_processes_on_one_gpu_are_named_to_all() -> None:
    told = look(["a", "b", "a"])
    assert all("ranks 0 and 2 have the same GPU" in text for text in told)
