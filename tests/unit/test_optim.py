"""Optimizers step, leave frozen weights alone, and continue from saved state bit by bit."""

import pytest
import torch
from torch import nn

from trainer.config import OptimConfig
from trainer.optim import build_optimizer, init_optimizer_state, load_optimizer_state, optimizer_state

NAMES = ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]


def build(name, seed=0, **settings):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(96, 64), nn.LayerNorm(64), nn.Linear(64, 4))
    module[2].weight.requires_grad_(False)
    return module, build_optimizer(OptimConfig(name=name, lr=1e-2, **settings), module)


def step(module, optimizer, seed):
    x = torch.randn(16, 96, generator=torch.Generator().manual_seed(seed))
    module(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("name", NAMES)
def test_resumed_steps_are_bitwise_those_of_an_uninterrupted_run(name):
    whole, optimizer = build(name)
    for seed in range(4):
        step(whole, optimizer, seed)

    first, optimizer = build(name)
    for seed in range(2):
        step(first, optimizer, seed)
    saved = {key: value.clone() for key, value in optimizer_state(optimizer, first.named_parameters()).items()}
    second, optimizer = build(name, seed=1)
    second.load_state_dict(first.state_dict())
    init_optimizer_state(optimizer)
    trained = [(n, p) for n, p in second.named_parameters() if p.requires_grad]
    load_optimizer_state(optimizer, trained, saved)
    for seed in range(2, 4):
        step(second, optimizer, seed)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("name", NAMES)
def test_allocating_state_changes_no_weight(name):
    module, optimizer = build(name, weight_decay=0.5)
    before = [p.clone() for p in module.parameters()]
    init_optimizer_state(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert all(group["lr"] == 1e-2 for group in optimizer.param_groups)
    assert optimizer_state(optimizer, module.named_parameters())


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("name", NAMES)
def test_moments_allocated_early_are_those_of_a_fresh_optimizer(name):
    plain, plain_optimizer = build(name, weight_decay=0.1)
    early, early_optimizer = build(name, weight_decay=0.1)
    init_optimizer_state(early_optimizer)
    for seed in range(3):
        step(plain, plain_optimizer, seed)
        step(early, early_optimizer, seed)
        init_optimizer_state(early_optimizer)  # finds all there, and keeps them
    for a, b in zip(plain.parameters(), early.parameters(), strict=True):
        assert torch.equal(a, b)


def test_eight_bit_moments_take_a_quarter_of_the_memory():
    module, optimizer = build("adamw_8bit")
    init_optimizer_state(optimizer)
    moments = optimizer_state(optimizer, module.named_parameters())
    assert moments["optim.0.weight.state1"].dtype == torch.uint8


def test_weight_decay_spares_vectors():
    module, optimizer = build("adamw", weight_decay=0.9)
    decayed = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decayed[id(module[0].weight)] == 0.9
    assert decayed[id(module[0].bias)] == decayed[id(module[1].weight)] == 0.0
