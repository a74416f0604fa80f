"""Optimizers step on whole weights and on rows of them, leave the rest alone, and hold 8-bit moments as stated."""

import pytest
import torch
from bitsandbytes.functional import dequantize_blockwise
from torch import nn

from trainer.config import OptimConfig
from trainer.optim import build_optimizer, dequantize_moment, init_optimizer_state, quantize_moment

NAMES = ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]
HALF_WIDEST_GAP = {"state1": 0.0071, "state2": 0.0036}

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers")


def build(name, seed=0, **settings):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(96, 64), nn.LayerNorm(64), nn.Linear(64, 4))
    module[2].weight.requires_grad_(False)
    trained = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    return module, build_optimizer(OptimConfig(name=name, lr=1e-2, **settings), trained)


def step(module, optimizer, seed):
    x = torch.randn(16, 96, generator=torch.Generator().manual_seed(seed))
    module(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_moves_trained_weights_and_no_other(name):
    module, optimizer = build(name)
    before = {n: p.clone() for n, p in module.named_parameters()}
    step(module, optimizer, seed=0)
    moved = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(before) - {"2.weight"}


@pytest.mark.parametrize("name", NAMES)
def test_allocating_state_changes_no_weight(name):
    module, optimizer = build(name, weight_decay=0.5)
    before = [p.clone() for p in module.parameters()]
    init_optimizer_state(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert all(group["lr"] == 1e-2 for group in optimizer.param_groups)
    assert all(optimizer.state[p] for p in module.parameters() if p.requires_grad)


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
    def state_bytes(name):
        module, optimizer = build(name)
        init_optimizer_state(optimizer)
        state = optimizer.state[module[0].weight]
        return sum(t.nbytes for key, t in state.items() if torch.is_tensor(t) and not key.startswith("qmap"))

    assert state_bytes("adamw_8bit") < 0.26 * state_bytes("paged_adamw_32bit")


@pytest.mark.parametrize("elements", [4096, 6144, 6145])
def test_tensors_below_the_threshold_keep_moments_of_32_bit(elements):
    weight = nn.Parameter(torch.zeros(2, 3072))
    optimizer = build_optimizer(OptimConfig(name="adamw_8bit"), [("w", weight)], elements)
    init_optimizer_state(optimizer)
    assert (optimizer.state[weight]["state1"].dtype == torch.uint8) == (weight.numel() >= elements)


def test_weight_decay_spares_vectors_and_their_shards():
    module, optimizer = build("adamw", weight_decay=0.9)
    decayed = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decayed[id(module[0].weight)] == 0.9
    assert decayed[id(module[0].bias)] == decayed[id(module[1].weight)] == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_lie_inside_other_storage_are_stepped_in_place(name):
    """As FSDP2 has them: weights in a padded buffer, gradients at any offset of the buffer that was reduced into."""
    rows, columns, offset = 21, 301, 7  # 28 bytes: no offset that a vector load could take
    buffers = [noise(offset + rows * columns + 900, seed=seed) for seed in (1, 2)]
    values, grads = (torch.as_strided(buffer, (rows, columns), (columns, 1), offset) for buffer in buffers)
    around = [buffers[0][:offset].clone(), buffers[0][offset + rows * columns :].clone()]
    alone = nn.Parameter(values.clone())
    inside = nn.Parameter(values)
    for weight, grad in ((alone, grads.clone()), (inside, grads)):
        optimizer = build_optimizer(OptimConfig(name=name, lr=1e-2, weight_decay=0.1), [("w", weight)])
        for _ in range(3):
            weight.grad = grad
            optimizer.step()
    assert not torch.equal(values, noise(*buffers[0].shape, seed=1)[offset:][: rows * columns].view(rows, columns))
    assert torch.equal(values, alone.detach())  # `values` looks into the buffer
    assert torch.equal(buffers[0][:offset], around[0]) and torch.equal(buffers[0][offset + values.numel() :], around[1])


def test_adamw_on_rows_is_adamw_on_the_whole():
    whole = nn.Parameter(noise(7, 33))
    data = whole.detach().clone()
    rows = [(str(k), nn.Parameter(part)) for k, part in enumerate(data.chunk(3))]
    plain = torch.optim.AdamW([whole], lr=1e-2, weight_decay=0.1, foreach=False)
    optimizer = build_optimizer(OptimConfig(name="adamw", lr=1e-2, weight_decay=0.1, betas=(0.9, 0.999)), rows)
    for seed in range(4):
        whole.grad = noise(7, 33, seed=seed + 1)
        for (_, part), grad in zip(rows, whole.grad.chunk(3), strict=True):
            part.grad = grad.clone()
        plain.step()
        optimizer.step()
    torch.testing.assert_close(data, whole.detach(), rtol=1e-6, atol=1e-7)


# ------------------------------------------------------------------------------------------------ the 8-bit data type


def test_moments_are_read_as_the_optimizer_reads_them():
    module, optimizer = build("adamw_8bit")
    for seed in range(3):
        step(module, optimizer, seed)
    state = optimizer.state[module[0].weight]
    for key, number in (("state1", 1), ("state2", 2)):
        absmax, code = state[f"absmax{number}"], state[f"qmap{number}"]
        reference = dequantize_blockwise(state[key], absmax=absmax, code=code, blocksize=256)
        assert reference.abs().max() > 0
        assert torch.equal(dequantize_moment(state[key], absmax, key), reference)
        flat, begun = state[key].flatten(), 700  # inside the third block
        part = dequantize_moment(flat[begun:1900], absmax, key, begun)
        assert torch.equal(part, reference.flatten()[begun:1900])


@pytest.mark.parametrize("key", ["state1", "state2"])
def test_quantising_moves_a_value_by_at_most_half_the_widest_gap(key):
    values = torch.cat([torch.linspace(-1, 1, 200_001), noise(100_000)])
    if key == "state2":
        values = values.square()
    values = values * torch.logspace(-20, 3, values.numel())  # scales of all sizes
    codes, absmax = quantize_moment(values, key)
    moved = (dequantize_moment(codes, absmax, key) - values).abs() / absmax.repeat_interleave(256)[: values.numel()]
    assert 0.9 * HALF_WIDEST_GAP[key] < moved.max() <= HALF_WIDEST_GAP[key]


@pytest.mark.parametrize("key", ["state1", "state2"])
def test_blocks_of_zeros_stay_zeros(key):
    values = torch.zeros(700)
    values[300] = 1.0  # the first and the last block have nothing else
    codes, absmax = quantize_moment(values, key)
    again = dequantize_moment(codes, absmax, key)
    assert absmax.tolist() == [0.0, 1.0, 0.0]
    assert torch.equal(again[:256], values[:256]) and torch.equal(again[512:], values[512:])
    assert (again - values).abs().max() <= HALF_WIDEST_GAP[key]
