"""The pool of processes, and the order of tests that starts each of its groups once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from distributed.pool import Pools

HERE = Path(__file__).parent


@pytest.fixture(scope="package")
def pool() -> Iterator[Pools]:
    """``pool(n)``: n processes in one group, the same ones for every test here; see `pool.Pool.run`.

    They end with this folder, as each holds up to 1.4 GiB.
    """
    pools = Pools()
    yield pools
    pools.close()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts this folder's tests by their parameter `world_size`; those without come last.

    All that use the pool run in one of pytest-xdist's workers, beside which another has the rest.
    """
    for item in items:
        if "pool" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("pool"))
    places = [index for index, item in enumerate(items) if HERE in item.path.parents]
    ordered = sorted((items[index] for index in places), key=_world_size)
    for index, item in zip(places, ordered, strict=True):
        items[index] = item


def _world_size(item: pytest.Item) -> int:
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("world_size", 99) if callspec else 99
