"""Learning rates at the points a user would look at."""

import itertools

import pytest

from trainer.config import OptimConfig, ScheduleConfig
from trainer.schedule import Schedule


def rates(num_steps=100, **settings):
    schedule = Schedule(ScheduleConfig(**settings), OptimConfig(lr=1.0), num_steps)
    return [schedule.lr(step) for step in range(1, num_steps + 1)]


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd", "plateau"])
def test_warmup_climbs_to_the_peak_and_the_last_step_still_trains(name):
    lr = rates(name=name, warmup=0.1)
    assert lr[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert max(lr) == pytest.approx(1.0)
    assert lr[-1] > 0
    assert all(a >= b for a, b in itertools.pairwise(lr[10:]))


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
def test_min_lr_is_the_floor(name):
    assert rates(num_steps=1000, name=name, warmup=0, min_lr=0.1)[-1] == pytest.approx(0.1, abs=5e-3)


def test_shapes_at_half_way():
    assert rates(num_steps=99, name="linear", warmup=0)[49] == pytest.approx(0.505, abs=0.01)
    assert rates(num_steps=99, name="cosine", warmup=0)[49] == pytest.approx(0.5, abs=0.02)
    wsd = rates(name="wsd", warmup=0, decay=0.2)
    assert wsd[79] == 1.0 and wsd[90] == pytest.approx(0.5)


def test_warmup_from_one_counts_steps():
    assert rates(name="constant", warmup=5)[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])


def test_plateau_waits_then_lowers_and_survives_a_restart():
    def fresh():
        return Schedule(ScheduleConfig(name="plateau", warmup=0, factor=0.1, patience=1), OptimConfig(lr=1.0), 10)

    schedule = fresh()
    for loss in (2.0, 2.5):
        schedule.observe(loss)
    assert schedule.lr(3) == 1.0
    resumed = fresh()
    resumed.load_state_dict(schedule.state_dict())
    resumed.observe(2.1)
    assert resumed.lr(4) == pytest.approx(0.1)
    resumed.observe(1.0)
    resumed.observe(1.1)
    assert resumed.lr(6) == pytest.approx(0.1)
