"""The table of benchmarks/speed.py: its ratios and its second column, against numbers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SETTING = {"shape": "Llama-2-7b", "device": "cuda", "rows": 4, "pack_length": 4096, "setting": "qlora-24gib"}
MEASURED = {"versions": {"torch": "2.11"}, "step_tokens": 16384, "mean_attended": 150.0, "trained_share": 0.6}
GPU = {"device_name": "NVIDIA H200"}
MASK = {"attention": "sdpa, 4-D mask", "layout": [1, 16384], "num_forwards": 1.0, "recompute": True}


def write(path: Path, *cells: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(SETTING | cell) + "\n" for cell in cells))
    return path


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the table over cells; gives its rows by contender, and its text."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from speed_table import write_table

    def table(*cells: dict[str, Any]) -> tuple[dict[str, Any], str]:
        results = write(tmp_path / "results.jsonl", *cells)
        text = write_table(results)
        (group,) = json.loads(results.with_suffix(".json").read_text())
        assert results.with_suffix(".svg").read_text().count("<rect") >= 1
        return {row["contender"]: row for row in group["contenders"]}, text

    return table


def cell(contender: str, rate: float, **more: Any) -> dict[str, Any]:
    return {"contender": contender, "tokens_per_second": rate, "step_seconds": 16384 / rate, **MEASURED, **more}


def test_a_peer_is_compared_with_the_price_of_its_mask_and_without(rows: Any) -> None:
    hardware = {
        "contender": "hardware",
        "device_name": "NVIDIA H200",
        "matmul_flops": 800e12,
        "attention": [
            {"rows": None, "forward_s": 0.001, "forward_backward_s": 0.002},
            {"rows": [1, 16384], "forward_s": 0.011, "forward_backward_s": 0.042},
            {"rows": [1, 4096], "forward_s": 0.004, "forward_backward_s": 0.012},
        ],
    }
    found, text = rows(
        cell("packtrain", 1.0, peak_gib=8.0),  # of a run before: the newest counts
        hardware,
        cell("packtrain", 12000.0, peak_gib=8.0),
        cell("trl", 4096.0, peak_gib=12.0, **MASK),
        cell("trl-liger-1", 4096.0, peak_gib=25.0, **MASK | {"layout": [1, 4096], "num_forwards": 4.0}),
        {"contender": "unsloth", "missing": ["unsloth"], "versions": {"torch": "2.11"}},
    )
    assert found["trl"]["ratio"] == pytest.approx(12000 / 4096)
    # Of its 4 s: 32 layers, each 40 ms more than varlen's forward and backward, and 10 ms for the forward again.
    assert found["trl"]["without_mask"] == pytest.approx(16384 / (4 - 32 * 0.050))
    assert found["trl-liger-1"]["without_mask"] == pytest.approx(16384 / (4 - 32 * 0.013))
    # 4N + 3A + 6 N_adapter with the head at trained tokens, over the measured matmuls.
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    adapter = 32 * 16 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    flops = 4 * weights + 4 * 0.6 * 4096 * 32000 + 3 * 4 * 32 * 4096 * 150 + 6 * adapter
    assert found["packtrain"]["of_ceiling"] == pytest.approx(12000 * flops / 800e12)
    assert found["packtrain"]["mfu"] == pytest.approx(12000 * flops / 989e12)
    assert "takes more than 24 GiB" in text and "not installed: unsloth" in text


def test_a_peer_without_a_mask_has_one_rate_though_its_steps_differ(rows: Any) -> None:
    """The rate is the median of the steps' rates, which is not the mean of tokens over the median of seconds."""
    uneven = {"step_seconds": 4.0, "step_tokens": 16000}  # 4,000 tok/s of these
    dense = {**MASK, "attention": "varlen"}
    found, _ = rows(
        cell("packtrain", 12000.0, peak_gib=8.0),
        {"contender": "hardware", "attention": []},
        cell("trl", 4096.0, peak_gib=12.0, **dense) | uneven,
    )
    assert found["trl"]["without_mask"] == pytest.approx(4096)
    assert found["trl"]["ratio_without_mask"] == pytest.approx(found["trl"]["ratio"])


def test_where_the_mask_was_not_measured_the_second_column_is_empty(rows: Any) -> None:
    found, _ = rows(cell("packtrain", 12000.0, peak_gib=8.0), cell("trl", 4096.0, peak_gib=12.0, **MASK))
    assert found["trl"]["without_mask"] is None
    assert found["trl"]["ratio"] == pytest.approx(12000 / 4096)


def test_each_setting_is_held_against_the_machine_that_ran_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from speed_table import write_table

    runs = [("qlora", 800e12), ("lora", 700e12)]
    cells = [
        one | {"setting": setting}
        for setting, flops in runs
        for one in ({"contender": "hardware", "matmul_flops": flops, **GPU}, cell("packtrain", 12000.0, peak_gib=8.0))
    ]
    first, second = write_table(write(tmp_path / "results.jsonl", *cells)).split("\n\n**")
    assert "800 TFLOP/s" in first and "700 TFLOP/s" in second
