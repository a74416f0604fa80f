"""The `packtrain` command: what it answers, and the exit status it ends with."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch import cli
from launch.init import choose_fields
from trainer.config import RunConfig
from trainer.errors import PacktrainError, Preempted, UserError
from trainer.recipe import load_recipe

ROOT = Path(__file__).parents[2]
HEAVY = ["torch", "transformers", "datasets", "accelerate", "peft", "bitsandbytes", "pydantic"]
MINIMAL = "model: {path: m}\ndata: {train: [{path: a.jsonl, format: messages}]}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of `trainer.run.train`, which are not carried out."""
    calls: list[Any] = []
    train = lambda config, run_dir: calls.append((config, run_dir))  # noqa: E731
    monkeypatch.setitem(sys.modules, "trainer.run", SimpleNamespace(train=train))
    return calls


def test_help_lists_all_commands_and_loads_nothing_heavy() -> None:
    code = f"""
import sys
from launch.cli import main
status = main(["--help"])
loaded = [name for name in {HEAVY} if name in sys.modules]
commands = [name for name in sys.modules if name.startswith("launch.") and name != "launch.cli"]
print("LOADED", status, loaded, commands)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "LOADED 0 [] []" in result.stdout
    assert all(re.search(rf"\b{name}  ", result.stdout) for name in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert f"Usage: packtrain {command}" in output
    assert "--overrides" not in output
    assert ("--optim.lr 1e-4" in output) == (command in cli.TAKE_OVERRIDES)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    "order",
    [
        lambda recipe: [recipe, "--optim.lr", "1e-4", "--run-dir", "d", "--adapter.r=8", "--optim.weight_decay", "0.5"],
        lambda recipe: ["--optim.lr", "1e-4", "--optim.weight_decay=0.5", recipe, "--adapter.r", "8", "--run-dir=d"],
    ],
)
def test_train_takes_overrides_anywhere(order: Callable[[str], list[str]], recipe: Path, trained: list[Any]) -> None:
    assert cli.main(["train", *order(str(recipe))]) == 0
    ((config, run_dir),) = trained
    assert (config.optim.lr, config.optim.weight_decay, config.adapter.r) == (1e-4, 0.5, 8)
    assert run_dir == Path("d")


def test_a_run_dir_is_named_after_its_recipe(recipe: Path, trained: list[Any]) -> None:
    assert cli.main(["train", str(recipe)]) == 0
    assert trained[0][1] == Path("runs/small")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optim.lrr", "1"], "did you mean optim.lr?"),
        (["--lr", "1"], "--optim.lr"),
        (["--run-dri", "d"], "Did you mean --run-dir?"),
        (["--optim.lr"], "has no value"),
        (["--optim.lr", "fast"], 'found "fast"'),
        (["stray"], "stray"),
    ],
)
def test_wrong_options_exit_2_and_name_the_nearest(
    options: list[str], message: str, recipe: Path, trained: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", str(recipe), *options]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.out == ""
    assert not trained


@pytest.mark.parametrize("tokens", [["trian"], ["train"], ["merge"], ["evaluate", "d", "--split", "tset"], ["chat"]])
def test_wrong_command_lines_exit_2(tokens: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(tokens) == 2
    assert capsys.readouterr().err


def test_a_missing_recipe_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(tmp_path / "no.yaml")]) == 2
    assert "no.yaml: no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("a.b", "found x"), 2),
        (PacktrainError("failed"), 1),
        (Preempted("saved"), 75),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_error_s_exit_status(
    error: BaseException,
    status: int,
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def train(config: Any, run_dir: Path) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "trainer.run", SimpleNamespace(train=train))
    assert cli.main(["train", str(recipe)]) == status
    assert capsys.readouterr().err.strip() == str(error)


def test_python_m_trainer_reads_the_same_command_line(recipe: Path) -> None:
    command = [sys.executable, "-m", "trainer", "--optim.lr", "1", str(recipe), "--optim.lrr", "1"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2
    assert result.stderr.startswith("--optim.lrr: unknown field")


def test_a_closed_pipe_is_no_error() -> None:
    command = f"set -o pipefail; {sys.executable} -m launch.cli schema | head -c 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert (result.stdout, result.stderr) == ("{", "")


def test_schema_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["required"] == ["model", "data"]


# init

INIT = ["init", "--model", "meta-llama/Llama-2-7b-hf", "--data", "rows.jsonl"]


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("options", [[], ["--gpu-memory", "140"], ["--format", "alpaca", "--columns.input", "context"]])
def test_init_writes_a_recipe_that_loads(method: str, options: list[str], tmp_path: Path) -> None:
    out = tmp_path / "new" / "recipe.yaml"
    assert cli.main([*INIT, "--method", method, *options, "--out", str(out)]) == 0
    config = load_recipe(out)
    assert config.method == method
    assert config.model.path == "meta-llama/Llama-2-7b-hf"
    assert config.data.train[0].path == "rows.jsonl"
    assert config.data.train[0].columns == ({"input": "context"} if "--format" in options else {})


def test_the_defaults_in_init_s_comments_are_the_defaults(tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"
    assert cli.main([*INIT, "--out", str(out)]) == 0
    config, text = load_recipe(out), out.read_text()
    out.write_text(re.sub(r"^( *)(- )?# (\w+: )", r"\1\2\3", text, flags=re.MULTILINE))
    assert out.read_text() != text
    assert not re.search(r"^\s*# revision:", out.read_text(), flags=re.MULTILINE)
    assert load_recipe(out) == config


@pytest.mark.parametrize(("type", "double_quant"), [("nf4", True), ("fp4", True), ("int8", False)])
def test_what_init_writes_can_be_quantised_in_every_way(type: str, double_quant: bool, tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"
    assert cli.main([*INIT, "--out", str(out)]) == 0
    found = load_recipe(out, {"quantization.type": type}).quantization
    assert found and (found.type, found.double_quant) == (type, double_quant)
    assert re.search(r"^  type: nf4  # .*nf4, fp4, int8", out.read_text(), flags=re.MULTILINE)


def test_init_says_what_is_not_here_and_packs_no_longer_than_the_model_reaches(
    toy_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def init(model: Path | str, data: Path | str, name: str) -> tuple[RunConfig, str]:
        out = tmp_path / name
        assert cli.main(["init", "--model", str(model), "--data", str(data), "--out", str(out)]) == 0
        return load_recipe(out), capsys.readouterr().err

    config = json.loads((toy_model_dir / "config.json").read_text())
    (tmp_path / "rows.jsonl").touch()
    found, said = init(toy_model_dir, tmp_path / "*.jsonl", "here.yaml")
    assert said == "" and found.data.pack_length == config["max_position_embeddings"]
    found, said = init(tmp_path / "no_model", "rows/none.jsonl", "neither.yaml")
    assert f"--model: no folder {tmp_path / 'no_model'} is here" in said and found.data.pack_length == 4096
    assert "--data: no file or folder rows/none.jsonl is here" in said and "hub" not in said
    _, said = init("owner/model", "owner/rows", "hub.yaml")
    assert said.count("taken for an id on the hub") == 2


def test_init_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "recipe.yaml"
    out.write_text("mine")
    assert cli.main([*INIT, "--out", str(out)]) == 2
    assert out.read_text() == "mine"
    assert f"{out} exists" in capsys.readouterr().err


def test_init_chooses_for_the_gpu() -> None:
    def choose(model: str, method: str, gpu_memory: float) -> dict[str, Any]:
        return choose_fields(model, "d", "messages", {}, method, gpu_memory)

    assert choose("Llama-2-7b-hf", "full", 140)["optim"]["name"] == "adamw"
    small = choose("Llama-2-7b-hf", "full", 80)
    assert (small["optim"]["name"], small["train"]["param_dtype"]) == ("paged_adamw_8bit", "bfloat16")
    with pytest.raises(
        UserError, match=r"24 GiB\n  allowed: about 43 GiB for Llama-2-7b-hf by full\n  fix: --method lora"
    ):
        choose("Llama-2-7b-hf", "full", 24)
    with pytest.raises(UserError, match="fix: --method qlora"):
        choose("Llama-3.1-70B", "lora", 80)
    with pytest.raises(UserError, match="fix: a smaller model or a larger GPU"):
        choose("Llama-3.1-70B", "qlora", 24)
    assert choose("my-llama", "full", 1)["optim"]["name"] == "adamw"  # of unknown size
