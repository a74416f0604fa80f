"""The summary of benchmarks/step_profile.py, of spans made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def step_profile(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import step_profile

    return step_profile


def test_kernels_gaps_and_what_ran_beside_them(step_profile: Any) -> None:
    span = step_profile.Span
    spans = [
        span(7, "matmul", 0.0, 1000.0),
        span(7, "matmul", 1010.0, 2000.0),
        span(7, "norm", 4000.0, 4500.0),
        span(9, "all_gather", 1500.0, 3900.0),
        span(11, "copy", 0.0, 10.0),
    ]
    lines = step_profile.summarise(spans)
    assert lines[0] == f"{step_profile.STEPS} steps in 4.5 ms"
    assert [line for line in lines if line.startswith("stream")] == [
        "stream 7: 2.5 ms in 3",
        "stream 9: 2.4 ms in 1",
        "stream 11: 0.0 ms in 1",
    ]
    assert any(line.split() == ["2.0", "ms", "2", "matmul"] for line in lines)
    assert "nothing runs in stream 7 for 2.0 ms, 2.0 of them in gaps over 0.3 ms" in lines
    assert lines[-1].split() == ["2.0", "ms", "at", "2:", "matmul", "->", "norm,", "beside", "all_gather"]


def test_kernels_that_overlap_in_a_stream_leave_no_gap(step_profile: Any) -> None:
    spans = [step_profile.Span(7, "a", 0.0, 900.0), step_profile.Span(7, "b", 100.0, 1000.0)]
    assert "nothing runs in stream 7 for 0.0 ms, 0.0 of them in gaps over 0.3 ms" in step_profile.summarise(spans)
