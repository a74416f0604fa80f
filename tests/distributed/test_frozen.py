"""Frozen layers under fsdp2: how much of them is whole at a time, and what becomes of failures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from distributed.pool import Pools
from distributed.runs import build, make_packs
from trainer.config import RunConfig
from trainer.data.sampler import collate
from trainer.errors import PacktrainError
from trainer.model.recompute import decoder_layers
from trainer.processes import Processes
from trainer.strategies import gathering
from trainer.strategies.base import Strategy
from trainer.strategies.frozen import FrozenLayers
from trainer.strategies.gathering import GatheredPiece, choose_piece

CPU = torch.device("cpu")
QLORA: dict[str, Any] = {"adapter": {"r": 4}, "quantization": {}}


def frozen_layers(strategy: Strategy) -> list[list[nn.Parameter]]:
    """Of each decoder layer what is not trained."""
    root: Any = strategy.module
    layers = decoder_layers(root.model)
    return [[parameter for parameter in layer.parameters() if not parameter.requires_grad] for layer in layers]


def whole_layers(strategy: Strategy) -> list[int]:
    """Decoder layers of whose frozen weights there is memory."""
    storages = [frozen[0].untyped_storage() for frozen in frozen_layers(strategy)]
    return [index for index, storage in enumerate(storages) if storage.nbytes()]


class Watch(TorchDispatchMode):
    """Notes which layers are whole whenever a weight is dequantised."""

    def __init__(self, strategy: Strategy) -> None:
        super().__init__()
        self.strategy = strategy
        self.moments: list[list[int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.bitsandbytes.dequantize_4bit.default:
            self.moments.append(whole_layers(self.strategy))
        return func(*args, **(kwargs or {}))


def watch(processes: Processes, config: RunConfig) -> dict[str, Any]:
    """Which layers are whole whenever one computes, and at rest."""
    strategy = build(processes, config)
    root: Any = strategy.module
    found: dict[str, Any] = {"at first": whole_layers(strategy)}
    root.train()
    batch = collate(make_packs(1, seed=processes.rank))
    with Watch(strategy) as training:
        losses = [strategy.forward_backward([batch] * 2, 10).item() for _ in range(2)]
    found |= {"training": training.moments, "after": whole_layers(strategy), "same": losses[0] == losses[1]}
    with torch.no_grad(), Watch(strategy) as evaluating:
        root(batch)
    strategy.fingerprint()
    return found | {"evaluating": evaluating.moments, "at last": whole_layers(strategy)}


@pytest.fixture(scope="session")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Config of a Llama with more layers than are whole at a time."""
    folder = tmp_path_factory.mktemp("four")
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 88, "num_attention_heads": 4}
    LlamaConfig(**sizes, num_hidden_layers=4, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("recompute", ["none", "mlp", "full"])
@pytest.mark.parametrize("world_size", [2])
def test_two_layers_are_whole_at_a_time(
    world_size: int, recompute: str, four_layers: str, pool: Pools, toy_recipe: Any
) -> None:
    model = {"path": four_layers, "init": "random"}
    config = toy_recipe(**QLORA, model=model, strategy={"kind": "fsdp2"}, train={"recompute": recompute})
    for found in pool(world_size).run(watch, config):
        assert found["at first"] == found["at last"] == []
        assert {(0, 1), (1, 2), (2, 3)} <= {*map(tuple, found["training"])}
        assert max(map(len, found["training"])) == max(map(len, found["evaluating"])) == 2
        assert found["after"] == [0]  # for the next forward
        assert found["same"]


@pytest.mark.parametrize("world_size", [2])
def test_layers_that_stay_gathered_are_let_go_by_the_backward(
    world_size: int, four_layers: str, pool: Pools, toy_recipe: Any
) -> None:
    model = {"path": four_layers, "init": "random"}
    config = toy_recipe(**QLORA, model=model, strategy={"kind": "fsdp2", "reshard": False})
    for found in pool(world_size).run(watch, config):
        assert [0, 1, 2, 3] in found["training"] and found["after"] == [0] and found["same"]


def share_of(processes: Processes, config: RunConfig) -> tuple[int, int]:
    """Bytes of frozen layers at rest on this process, and of them all."""
    strategy: Any = build(processes, config)
    frozen = [parameter for layer in frozen_layers(strategy) for parameter in layer]
    own = sum(len(strategy._frozen.own(parameter)) for parameter in frozen)
    return own, sum(parameter.numel() * parameter.element_size() for parameter in frozen)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("sections", [QLORA, {"adapter": {"r": 4}}], ids=["qlora", "lora"])
def test_every_byte_rests_on_one_process(
    world_size: int, sections: dict[str, Any], pool: Pools, toy_recipe: Any
) -> None:
    found = pool(world_size).run(share_of, toy_recipe(**sections, strategy={"kind": "fsdp2"}))
    total = found[0][1]
    assert sum(own for own, _ in found) == total
    assert max(own for own, _ in found) < 1.2 * total / world_size


class Swapped(GatheredPiece):
    """Brings the pieces in the wrong order on one process."""

    def fill(self, line: torch.Tensor) -> None:
        super().fill(line)
        if dist.get_rank() == 1:
            line.copy_(torch.cat([*line.chunk(2)][::-1]))


def settle(processes: Processes, is_swapped: bool) -> str | None:
    """What `FrozenLayers.settle` says of two layers."""
    with torch.device("meta"):
        layers = [nn.Linear(8, 8), nn.Linear(8, 6)]
    for layer in layers:
        layer.requires_grad_(False)
    group = dist.group.WORLD
    assert group is not None
    make_piece = choose_piece(processes, group, CPU, CPU)
    if is_swapped:
        make_piece = lambda nbytes: Swapped(group, CPU, CPU, nbytes)  # noqa: E731
    frozen = FrozenLayers(layers, group, CPU, make_piece, True)
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        for parameter in layer.parameters():
            frozen.place(parameter, torch.rand(parameter.shape, generator=generator))
    try:
        frozen.settle(processes)
    except PacktrainError as error:
        return str(error)
    return None


@pytest.mark.parametrize("world_size", [2])
def test_bytes_that_arrive_elsewhere_than_they_belong_end_the_run_on_all(world_size: int, pool: Pools) -> None:
    assert pool(world_size).run(settle, False) == [None, None]
    said = pool(world_size).run(settle, True)
    assert all(text and "rank 1" in text and "frozen weights" in text for text in said)


class Failing(GatheredPiece):
    """As a `PulledPiece`, of which rank 1 can make none, or reads something else than lies there."""

    fault = ""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, nbytes: int) -> None:
        if self.fault == "make" and dist.get_rank() == 1:
            raise RuntimeError("no peer access\nat length")
        super().__init__(group, device, device, nbytes)

    def fill(self, line: torch.Tensor) -> None:
        super().fill(line)
        if self.fault == "read" and dist.get_rank() == 1:
            line.add_(1)


def ask_for_obstacles(processes: Processes, fault: str) -> str | None:
    group = dist.group.WORLD
    assert group is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathering, "PulledPiece", Failing)
        patch.setattr(Failing, "fault", fault)
        return gathering.find_obstacle(processes, group, CPU)


@pytest.mark.parametrize("world_size", [2])
def test_all_learn_that_one_cannot_reach_the_others(world_size: int, pool: Pools) -> None:
    run = pool(world_size).run
    other = "another process cannot reach its neighbours' memory"
    assert run(ask_for_obstacles, "") == [None, None]
    assert run(ask_for_obstacles, "make") == [other, "RuntimeError: no peer access"]
    assert run(ask_for_obstacles, "read") == [other, "what was read from the others' memory is not what lies there"]
