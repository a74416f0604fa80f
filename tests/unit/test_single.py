"""The single-process strategy: clipping, skipped steps, and which overflows are float16's."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.data.sampler import collate
from trainer.launchers import World
from trainer.loss import PackedCausalLM
from trainer.model.load import load_model
from trainer.model.recompute import set_recompute
from trainer.optim import build_optimizer
from trainer.planning.levels import read_levels
from trainer.processes import Processes
from trainer.strategies.scaler import GROWTH_INTERVAL, MIN_SCALE, LossScaler
from trainer.strategies.single import SingleProcess

ALONE = Processes(World(), torch.device("cpu"))


class Root(nn.Module):
    """As `PackedCausalLM`: the trained module is called `model`; a batch is what it is multiplied with."""

    def __init__(self):
        super().__init__()
        self.model = nn.Linear(4, 1, bias=False)

    def forward(self, batch):
        return self.model(batch.x).sum()


class Batch:
    seed = 0

    def __init__(self, x):
        self.x = x

    def to(self, device):
        return self


FUSED = partial(torch.optim.AdamW, fused=True)  # skips by itself


def strategy(loss_scaling=False, optimizer=FUSED, offload=False):
    single = SingleProcess(ALONE, loss_scaling, offload)
    single.shard(Root())
    single.prepare(lambda named, _: optimizer([tensor for _, tensor in named], lr=0.0))
    return single


class Saved:
    """A checkpoint in memory."""

    def __init__(self, state):
        self.state = {name: tensor.clone() for name, tensor in state.items()}
        self.names = self.state.keys()

    def load(self, state):
        for name, tensor in state.items():
            tensor.copy_(self.state[name])

    def read(self, name):
        return self.state[name]


ONES = Batch(torch.ones(3, 4))
BROKEN = Batch(torch.full((3, 4), float("inf")))


def test_gradients_of_micro_batches_add_up_over_the_whole_batch():
    single = strategy()
    loss = single.forward_backward([ONES, ONES], num_trained_tokens=6)
    weight = single.module.model.weight
    torch.testing.assert_close(loss, 6 * weight.detach().sum())
    torch.testing.assert_close(weight.grad, torch.ones(1, 4))


def test_the_norm_reported_is_before_clipping_and_the_step_after():
    single = strategy(optimizer=torch.optim.SGD)
    before = single.module.model.weight.clone()
    single.forward_backward([ONES], num_trained_tokens=1)
    result = single.step(lr=1.0, max_norm=0.5)
    assert result.grad_norm == pytest.approx(6.0)
    assert (single.module.model.weight - before).norm().item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("optimizer", [FUSED, torch.optim.AdamW], ids=["fused", "plain"])
def test_a_gradient_that_is_not_finite_changes_nothing(optimizer, offload, max_norm):
    single = strategy(optimizer=optimizer, offload=offload)
    single.forward_backward([ONES], num_trained_tokens=1)
    assert not single.step(lr=0.1, max_norm=max_norm).skipped
    before = {name: tensor.clone() for name, tensor in single.state_dict().items()}
    counts = [state["step"].item() for state in single.optimizer.state.values()]
    single.forward_backward([BROKEN], num_trained_tokens=1)
    result = single.step(lr=0.1, max_norm=max_norm)
    assert result.skipped and result.is_failure and not math.isfinite(result.grad_norm)
    assert all(torch.equal(tensor, before[name]) for name, tensor in single.state_dict().items())
    assert counts == [state["step"].item() for state in single.optimizer.state.values()] == [1.0]
    single.forward_backward([ONES], num_trained_tokens=1)
    assert not single.step(lr=0.1, max_norm=max_norm).skipped
    assert not torch.equal(single.module.model.weight, before["model.weight"])


@pytest.mark.parametrize("loss_scaling", [False, True])
def test_a_fused_step_is_the_plain_one(loss_scaling):
    fused, plain = strategy(loss_scaling), strategy(loss_scaling, torch.optim.AdamW)
    plain.module.load_state_dict(fused.module.state_dict())
    for max_norm in (None, 0.5, 100.0):
        for single in (fused, plain):
            single.forward_backward([ONES, ONES], num_trained_tokens=6)
            single.step(lr=0.1, max_norm=max_norm)
        torch.testing.assert_close(fused.module.model.weight, plain.module.model.weight)


def test_float16_overflows_lower_the_scale_and_count_only_at_its_minimum():
    single = strategy(loss_scaling=True)
    scales, failures = [], []
    for _ in range(20):
        single.forward_backward([BROKEN], num_trained_tokens=1)
        result = single.step(lr=1.0, max_norm=None)
        scales.append(single.scaler.scale)
        failures.append(result.is_failure)
    assert scales[0] < 65536 and scales[-1] == MIN_SCALE
    first = failures.index(True)
    assert scales[first - 1] == MIN_SCALE and all(failures[first:])


def test_the_loss_scale_survives_a_restart():
    first, second = strategy(loss_scaling=True), strategy(loss_scaling=True)
    first.forward_backward([BROKEN], 1)
    first.step(1.0, None)
    second.restore(Saved(first.state_dict()))
    assert second.scaler.scale == first.scaler.scale == 32768


def test_the_scaled_loss_gives_the_same_gradient():
    plain, scaled = (strategy(scaling, torch.optim.SGD) for scaling in (False, True))
    scaled.module.load_state_dict(plain.module.state_dict())
    for single in (plain, scaled):
        single.forward_backward([ONES], num_trained_tokens=3)
        single.step(lr=0.1, max_norm=None)
    torch.testing.assert_close(plain.module.model.weight, scaled.module.model.weight)


def test_a_checkpoint_before_the_first_whole_step_holds_what_a_resume_asks_for():
    single = strategy(loss_scaling=True)
    single.forward_backward([BROKEN], num_trained_tokens=1)
    assert single.step(lr=0.1, max_norm=None).skipped
    before = set(single.state_dict())
    single.forward_backward([ONES], num_trained_tokens=1)
    assert not single.step(lr=0.1, max_norm=None).skipped
    assert before == set(single.state_dict()) and "optim.weight.exp_avg" in before


def test_moments_in_host_memory_give_the_same_weights():
    plain, offloaded = strategy(), strategy(offload=True)
    offloaded.module.load_state_dict(plain.module.state_dict())
    offloaded.restore(Saved(plain.state_dict()))
    for single in (plain, offloaded):
        for _ in range(3):
            single.forward_backward([ONES], num_trained_tokens=1)
            single.step(lr=0.1, max_norm=1.0)
    assert torch.equal(plain.module.model.weight, offloaded.module.model.weight)
    restored = strategy(offload=True)
    restored.restore(Saved(offloaded.state_dict()))
    for single in (plain, restored):
        single.forward_backward([ONES], num_trained_tokens=1)
        single.step(lr=0.1, max_norm=1.0)
    assert torch.equal(plain.module.model.weight, restored.module.model.weight)


def test_the_loss_scale_grows_again():
    scaler = LossScaler(enabled=True)
    scaler.update(overflow=True)
    for _ in range(GROWTH_INTERVAL):
        scaler.update(overflow=False)
    assert scaler.scale == 65536


def test_dropout_follows_the_batch_and_not_the_process():
    class Dropping(Root):
        def forward(self, batch):
            return self.model(nn.functional.dropout(batch.x, 0.5)).sum()

    single = strategy()
    single.module = Dropping()
    first, second = (single.forward_backward([ONES], 1) for _ in range(2))
    torch.rand(7)
    assert torch.equal(first, second) and torch.equal(single.forward_backward([ONES], 1), first)


class ReadBack(TorchDispatchMode):
    """Notes every operation that has the host look at a tensor, for which it would wait on a GPU."""

    LOOKS = ("_local_scalar_dense", "nonzero", "equal", "_unique2", "masked_select")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.LOOKS:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("sections", [{}, {"adapter": {"r": 4}}, {"adapter": {"r": 4}, "quantization": {}}])
def test_the_host_looks_at_nothing_of_a_step(sections, recompute, toy_recipe):
    config = toy_recipe(**sections)
    single = SingleProcess(ALONE)
    single.module = PackedCausalLM(load_model(config, ALONE.device).model, torch.float32).train()
    single.prepare(partial(build_optimizer, config.optim))
    set_recompute(single.module.model, read_levels(recompute, 2))
    documents = [(list(range(5, 25)), list(range(5, 25))), (list(range(30, 40)), list(range(30, 40)))]
    batch = collate([documents])
    single.forward_backward([batch], batch.num_trained_tokens)
    with ReadBack() as looks:
        single.forward_backward([batch, batch], 2 * batch.num_trained_tokens)
        result = single.step(1e-3, 1.0)
    assert looks.found == [] and result.grad_norm > 0
