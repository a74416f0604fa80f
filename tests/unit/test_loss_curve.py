"""benchmarks/loss_curve.py: what it runs, and what it refuses before it runs anything."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
Measure = Callable[..., dict[str, dict[str, str]]]


@pytest.fixture
def loss_curve(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import loss_curve

    return loss_curve


@pytest.fixture
def measure(loss_curve: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Measure:
    """Runs it without training; gives what was laid over the recipe by path, the reference's first."""

    def run(recipe: Path, *words: str) -> dict[str, dict[str, str]]:
        ran: list[dict[str, str]] = []

        def train(recipe: Path, overrides: dict[str, str]) -> list[float]:
            ran.append(overrides)
            return [1.0] * 30

        monkeypatch.setattr(loss_curve, "train", train)
        monkeypatch.setattr(loss_curve, "train_reference", lambda config, device: ran.append({}) or [1.0] * 30)
        monkeypatch.setattr(sys, "argv", ["loss_curve.py", str(recipe), "--device", "cpu", *words])
        try:
            loss_curve.main()
        except SystemExit:
            assert not ran
            raise
        paths = words[words.index("--paths") + 1].split(",")
        return dict(zip(["reference", *paths], ran, strict=True))

    return run


def test_every_path_but_flash4_has_torch_s_attention(
    loss_curve: ModuleType, measure: Measure, toy_recipe_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = toy_recipe_file(model={"dtype": "bfloat16"}, adapter={"r": 4})
    ran = measure(recipe, "--paths", "bfloat16,float8", "--model.attention", "sdpa")
    assert {path: fields.get("model.attention") for path, fields in ran.items()} == {
        "reference": None,
        "bfloat16": "auto",
        "float8": "auto",
    }
    assert ran["float8"]["train.float8"] == "true"
    assert f"mean of the last {loss_curve.WINDOW} " in capsys.readouterr().out
    on_a_gpu = loss_curve.plan_runs(recipe, ["bfloat16", "mlp"], {}, "cuda")
    assert [fields["model.attention"] for fields in on_a_gpu.values()] == ["varlen", "varlen"]
    in_float32 = loss_curve.plan_runs(recipe, ["mlp"], {"model.dtype": "float32"}, "cuda")
    assert in_float32["mlp"]["model.attention"] == "auto"  # which varlen does not take


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--paths", "bfloat16,float9"], "--paths: 'float9'"),
        (["--paths", "flash4"], "--paths: flash4 on this device"),
        (["--paths", "kept", "--train.offload_activations", "maybe"], "train.offload_activations"),
    ],
)
def test_wrong_paths_are_refused_before_the_reference_runs(
    words: list[str], said: str, measure: Measure, toy_recipe_file: Callable[..., Path]
) -> None:
    with pytest.raises(SystemExit) as refused:
        measure(toy_recipe_file(adapter={"r": 4}), *words)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("field", "sections"),
    [
        ("adapter.rslora", {"adapter": {"rslora": True}}),
        ("adapter.dropout", {"adapter": {"dropout": 0.1}}),
        ("adapter.dora", {"adapter": {"dora": True}}),
        ("adapter.alpha", {"adapter": {"alpha": 8.5}}),
        ("adapter.modules_to_save", {"adapter": {"modules_to_save": ["lm_head"]}}),
        ("adapter.targets", {"adapter": {"targets": ["q_proj", "v_proj"]}}),
        ("optim.name", {"optim": {"name": "adamw_8bit"}}),
        ("model.revision", {"model": {"revision": "main"}}),
        ("model.init", {"model": {"init": "random"}}),
        ("schedule.name", {"schedule": {"name": "plateau"}, "eval": {"every_steps": 2}}),
        ("quantization.type", {"quantization": {"type": "int8"}, "adapter": {"r": 4}}),
    ],
)
def test_what_the_reference_does_not_do_is_refused(
    field: str, sections: dict[str, Any], loss_curve: ModuleType, measure: Measure, toy_recipe_file: Callable[..., Path]
) -> None:
    with pytest.raises(SystemExit, match=f"^{field}: "):
        measure(toy_recipe_file(**sections), "--paths", "bfloat16")


@pytest.mark.parametrize("targets", ["all-linear", "each"])
def test_an_adapter_on_all_linear_layers_is_not(
    targets: str, loss_curve: ModuleType, measure: Measure, toy_recipe_file: Callable[..., Path]
) -> None:
    named = loss_curve.LINEARS if targets == "each" else targets
    assert len(measure(toy_recipe_file(adapter={"r": 4, "targets": named}), "--paths", "bfloat16")) == 2
