"""Runs that are interrupted again and again. ``python tests/slurm/soak.py --interruptions 200`` does more of it."""

from __future__ import annotations

import pytest
from cluster import Cluster
from runs import Submitter
from soak import soak


def test_interruptions_at_random_moments_lose_nothing(
    cluster: Cluster, submit: Submitter, reference: dict[int, float], request: pytest.FixtureRequest
) -> None:
    number, seed = request.config.getoption("--interruptions"), request.config.getoption("--seed")
    tally = soak(cluster, submit, reference, number, seed)
    print(f"\n{tally}")
    assert tally.total >= number
