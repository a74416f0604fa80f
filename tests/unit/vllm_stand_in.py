"""`tests/stand_ins/vllm` in the place of vLLM, for tests that import `trainer.vllm_engine`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

STAND_INS = Path(__file__).parents[1] / "stand_ins"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`import vllm` gives the stand-in, wherever vLLM may be installed."""
    before = {name: sys.modules.pop(name) for name in _vllm_modules()}
    monkeypatch.syspath_prepend(str(STAND_INS))
    monkeypatch.delenv("VLLM_STAND_IN_FAULT", raising=False)
    yield
    for name in _vllm_modules():
        del sys.modules[name]
    sys.modules.update(before)


def _vllm_modules() -> list[str]:
    return [name for name in sys.modules if name == "trainer.vllm_engine" or name.split(".")[0] == "vllm"]
