"""`strategy.kind: auto`: replicate what fits, cut what does not."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.config import RunConfig
from trainer.model.build import build_model
from trainer.sizes import describe_job
from trainer.strategies import choose


def same(value: Any) -> Any:
    return value


def processes(world_size: int, device: str = "cuda") -> Any:
    return SimpleNamespace(
        world_size=world_size, local_world_size=4, device=torch.device(device), min=same, from_first=same
    )


SEVEN_B = {"path": "meta-llama/Llama-2-7b-hf", "init": "random", "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("sections", "world_size", "device", "gpu_bytes", "host_bytes", "kind"),
    [
        ({}, 1, "cuda", 1e3, 1e3, "single"),
        ({}, 1, "cpu", 1e3, 1e3, "single"),
        ({}, 4, "cpu", 1e3, 1e3, "ddp"),
        ({}, 4, "cuda", 80e9, 1e12, "ddp"),
        ({"model": SEVEN_B}, 4, "cuda", 80e9, 1e12, "fsdp2"),  # a GPU does not hold weights, gradients and moments
        ({}, 4, "cuda", 80e9, 6e6, "fsdp2"),  # a full state copied by each of four
        ({"adapter": {"r": 2}}, 4, "cuda", 80e9, 6e6, "ddp"),
        ({"strategy": {"offload": "all"}}, 4, "cuda", 80e9, 1e12, "fsdp2"),
        ({"strategy": {"shard_size": 2}}, 4, "cuda", 80e9, 1e12, "fsdp2"),
    ],
)
def test_auto(
    sections: dict[str, Any],
    world_size: int,
    device: str,
    gpu_bytes: float,
    host_bytes: float,
    kind: str,
    toy_recipe: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "trainer")
    config = toy_recipe(**sections)
    model = build_model(config, torch.device("cpu")).model
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=gpu_bytes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(choose, "host_memory", lambda: host_bytes)
    group = processes(world_size, device)
    assert choose.choose_kind(describe_job(config, model, group), group) == kind
    assert ("GiB predicted" in caplog.text) == (device == "cuda")


def test_host_memory_is_the_jobs_share(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(choose, "CGROUP_LIMIT", limit)
    physical = choose.host_memory()
    limit.write_text("max\n")
    assert choose.host_memory() == physical
    limit.write_text("1000000\n")
    assert choose.host_memory() == 1_000_000 < physical
