"""Loss against plain transformers row by row; exact match on a model that knows half of the answers."""

from __future__ import annotations

import json
import logging
import math
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.cli import main
from launch.demo import chat_rows, write_jsonl
from tests.unit.export_toys import make_run
from tests.unit.test_merge import LORA, NF4
from trainer.answers import word_f1
from trainer.checkpoint.layout import write_atomically
from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.evaluate import Evaluation, Split, evaluate, find_candidates
from trainer.export.merge import merge_adapter
from trainer.generate import load_for_inference
from trainer.recipe import dump_recipe

ROWS = list(chat_rows(12, seed=5))


def encode(tokenizer: Any, row: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of a row: the answer and its end token are trained."""
    prompt, answer = (message["content"] for message in row["messages"])
    head = tokenizer(f"<|user|>{prompt}<|end|><|assistant|>").input_ids
    tail = tokenizer(f"{answer}<|end|>", add_special_tokens=False).input_ids
    return torch.tensor([head + tail]), torch.tensor([[-100] * len(head) + tail])


def evaluate_folder(
    folder: Path, recipe: Path | None = None, split: Split = "validation", **options: Any
) -> Evaluation:
    (candidate,) = find_candidates([folder], recipe, split)
    return evaluate(candidate, split, **options)


@pytest.fixture(scope="module")
def parrot(tmp_path_factory: pytest.TempPathFactory, toy_model_dir: Path) -> Path:
    """The toy, taught the first half of `ROWS` by heart."""
    model: Any = AutoModelForCausalLM.from_pretrained(toy_model_dir)
    tokenizer: Any = AutoTokenizer.from_pretrained(toy_model_dir)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rows = [encode(tokenizer, row) for row in ROWS[:6]]
    for _ in range(60):
        loss = torch.stack([model(input_ids=ids, labels=labels).loss for ids, labels in rows]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.02
    folder = tmp_path_factory.mktemp("parrot")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path: Path, toy_recipe_file: Callable[..., Path]) -> Path:
    """Holds all of `ROWS` out for validation."""
    held_out = write_jsonl(tmp_path / "held_out.jsonl", ROWS)
    return toy_recipe_file(data={"split": {"validation": [{"path": str(held_out), "format": "messages"}]}})


def test_loss_is_the_mean_over_trained_tokens(recipe: Path, parrot: Path) -> None:
    result = evaluate_folder(parrot, recipe, exact_match=False).total

    model: Any = AutoModelForCausalLM.from_pretrained(parrot)
    total, hits, tokens = 0.0, 0, 0
    for ids, labels in (encode(AutoTokenizer.from_pretrained(parrot), row) for row in ROWS):
        with torch.no_grad():
            num_trained = int((labels != -100).sum())
            output = model(input_ids=ids, labels=labels)
            total += output.loss.item() * num_trained
            hits += int((output.logits[0, :-1].argmax(-1) == labels[0, 1:]).sum())
            tokens += num_trained
    assert result.tokens == tokens
    assert result.token_accuracy == hits / tokens
    assert result.loss == pytest.approx(total / tokens, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert result.exact_match is result.f1 is None
    assert result.rows == 12


def test_exact_match_counts_the_answers_it_knows(recipe: Path, parrot: Path) -> None:
    found = evaluate_folder(parrot, recipe).total
    assert found.exact_match == 0.5
    assert found.f1 and 0.5 < found.f1 < 1
    assert evaluate_folder(parrot, recipe, max_rows=4).total.exact_match == 1.0


def test_answers_longer_than_the_tokenizer_s_limit_are_no_warning(
    recipe: Path, parrot: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(parrot, tmp_path / "short")
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 2}))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    evaluate_folder(folder, recipe)
    assert "longer than the specified maximum" not in caplog.text


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("The cat sat.", "a CAT sat", 1.0),
        ("cat cat dog", "cat bird", 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("the", "", 1.0),
    ],
)
def test_f1_is_squad_s(answer: str, reference: str, f1: float) -> None:
    assert word_f1(answer, reference) == pytest.approx(f1)


def test_run_and_merged_model_know_their_recipe(tmp_path: Path, toy_recipe: Callable[..., RunConfig]) -> None:
    run = make_run(tmp_path / "run", toy_recipe(adapter=LORA, quantization=NF4))
    merge_adapter(run, tmp_path / "merged")
    before, after = (evaluate_folder(folder, exact_match=False).total for folder in (run, tmp_path / "merged"))
    assert before.loss == pytest.approx(after.loss, rel=1e-4)
    assert before.tokens == after.tokens


def test_model_without_a_recipe_and_split_without_rows(
    toy_model_dir: Path, toy_recipe_file: Callable[..., Path]
) -> None:
    with pytest.raises(UserError, match="records no recipe"):
        evaluate_folder(toy_model_dir)
    with pytest.raises(UserError, match=r"data\.split\.test"):
        evaluate_folder(toy_model_dir, toy_recipe_file(), split="test")


def two_sources(folder: Path) -> dict[str, Any]:
    """Sections of a recipe whose validation rows are what the parrot knows, and what it does not."""
    files = [write_jsonl(folder / name, rows) for name, rows in (("known.jsonl", ROWS[:6]), ("new.jsonl", ROWS[6:]))]
    return {"data": {"split": {"validation": [{"path": str(file), "format": "messages"} for file in files]}}}


def test_each_data_set_has_figures_of_its_own(
    parrot: Path, toy_recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    found = evaluate_folder(parrot, toy_recipe_file(**two_sources(tmp_path)))

    known, new = (found.sources[str(tmp_path / name)] for name in ("known.jsonl", "new.jsonl"))
    assert (known.exact_match, new.exact_match, found.total.exact_match) == (1.0, 0.0, 0.5)
    assert known.token_accuracy == 1.0 > found.total.token_accuracy > new.token_accuracy
    assert known.tokens + new.tokens == found.total.tokens
    assert known.loss * known.tokens + new.loss * new.tokens == pytest.approx(found.total.loss * found.total.tokens)
    first = {"data": {"split": {"validation": two_sources(tmp_path)["data"]["split"]["validation"][:1]}}}
    assert evaluate_folder(parrot, toy_recipe_file(**first)).total.loss == pytest.approx(known.loss, rel=1e-5)


QUANTIZATIONS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "int8": {"type": "int8"},
    "nf4": {"type": "nf4"},
    "nf4, plain scales": {"type": "nf4", "double_quant": False},
}


@pytest.fixture
def sweep(tmp_path: Path, parrot: Path, toy_recipe: Callable[..., RunConfig]) -> Path:
    """Runs of equal adapters on the parrot, quantised in different ways, as `submit --array` leaves them."""
    folder = tmp_path / "sweep"
    for name, quantization in QUANTIZATIONS.items():
        sections = {**two_sources(tmp_path), "model": {"path": str(parrot)}, "adapter": LORA}
        run = make_run(folder / name, toy_recipe(quantization=quantization, **sections), size=1e-3)
        write_atomically(run / "state.json", '{"state": "done"}')
    runs = [{"run_dir": name, "values": {"quantization": str(value)}} for name, value in QUANTIZATIONS.items()]
    (folder / "sweep.json").write_text(json.dumps({"fields": ["quantization"], "runs": runs}))
    (folder / "submissions").mkdir()
    return folder


class TestComparison:
    """Several models in one call."""

    def test_quantisations_of_a_sweep_side_by_side(
        self, sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        out = tmp_path / "out.json"
        assert main(["evaluate", str(sweep), "--max-rows", "2", "--json", str(out)]) == 0

        records = json.loads(out.read_text())
        assert [Path(record["folder"]).name for record in records] == list(QUANTIZATIONS)
        assert [record["fields"] for record in records] == [
            {"quantization.type": None, "quantization.double_quant": None},
            {"quantization.type": "int8", "quantization.double_quant": False},
            {"quantization.type": "nf4", "quantization.double_quant": True},
            {"quantization.type": "nf4", "quantization.double_quant": False},
        ]
        plain, *quantized = (record["loss"] for record in records)
        distances = [abs(loss - plain) for loss in quantized]
        assert distances[0] < 0.1 * min(distances[1:])
        sizes = [record["base_gib"] for record in records]
        assert sizes[0] > sizes[1] > sizes[3] > sizes[2]
        assert {(record["rows"], record["answered"]) for record in records} == {(12, 4)}
        assert [source["exact_match"] for source in records[0]["sources"]] == [1.0, 0.0]
        lines = capsys.readouterr().out.splitlines()
        assert lines[1].split()[:5] == ["validation", "rows", "of", "type", "double_quant"]
        assert any("int8" in line and f"{quantized[0]:.4f}" in line for line in lines)
        assert sum("known.jsonl" in line for line in lines) == 4

    def test_a_damaged_model_is_named_before_the_others_are_loaded(
        self, sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        weights = sweep / "nf4" / "adapter" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        monkeypatch.setattr("trainer.evaluate.load_for_inference", None)
        assert main(["evaluate", str(sweep)]) == 2
        assert capsys.readouterr().err.startswith(f"{sweep / 'nf4'}")

    def test_other_rows_are_refused_unless_a_recipe_names_them(
        self, sweep: Path, recipe: Path, toy_recipe: Callable[..., RunConfig], parrot: Path, capsys: Any
    ) -> None:
        other = make_run(sweep.parent / "other", toy_recipe(model={"path": str(parrot)}, adapter=LORA))
        command = ["evaluate", str(sweep / "nf4"), str(other), "--no-exact-match"]
        assert main(command) == 2
        assert (
            f"{other}: its recipe names other validation rows than that of {sweep / 'nf4'}" in capsys.readouterr().err
        )
        assert main([*command, "--recipe", str(recipe)]) == 0

    def test_a_recipe_stands_for_its_base(
        self, parrot: Path, tmp_path: Path, toy_recipe: Callable[..., RunConfig], recipe: Path
    ) -> None:
        """So the loss by quantisation alone is seen without training."""
        losses = {}
        for name, quantization in QUANTIZATIONS.items():
            file = tmp_path / f"{name}.yaml"
            config = toy_recipe(model={"path": str(parrot)}, adapter=LORA, quantization=quantization)
            file.write_text(dump_recipe(config))
            losses[name] = evaluate_folder(file, recipe, exact_match=False).total.loss
        assert losses["none"] == pytest.approx(evaluate_folder(parrot, recipe, exact_match=False).total.loss, rel=1e-5)
        assert 0 < abs(losses["int8"] - losses["none"]) < 0.1 * abs(losses["nf4"] - losses["none"])

    def test_what_a_shell_makes_of_a_sweep_and_a_star_with_one_model_in_memory_at_a_time(
        self, sweep: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loaded: list[Any] = []

        def load(*args: Any) -> Any:
            assert [model() for model in loaded] == [None] * len(loaded)
            found = load_for_inference(*args)
            loaded.append(weakref.ref(found.model))
            return found

        monkeypatch.setattr("trainer.evaluate.load_for_inference", load)
        in_it = sorted(map(str, sweep.iterdir()))
        assert len(in_it) == 6
        assert main(["evaluate", *in_it, "--max-rows", "1"]) == 0
        assert len(loaded) == 4


class TestCommands:
    """`packtrain evaluate`, `generate`, `chat`, as a user runs them."""

    def test_evaluate_prints_a_table_and_writes_json(
        self, recipe: Path, parrot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["evaluate", str(parrot), "--recipe", str(recipe), "--json", str(tmp_path / "out.json")]) == 0
        (record,) = json.loads((tmp_path / "out.json").read_text())
        assert record["folder"] == str(parrot) and record["sources"] == [] and record["fields"] == {}
        assert (record["exact_match"], record["rows"], record["split"]) == (0.5, 12, "validation")
        assert "0.500" in capsys.readouterr().out

    def test_generate_answers_files_of_prompts(self, parrot: Path, tmp_path: Path) -> None:
        prompts = [row["messages"][0]["content"] for row in ROWS[:3]]
        answers = [row["messages"][1]["content"] for row in ROWS[:3]]
        requests = [
            {"prompt": prompts[1], "num_beams": 2},
            {"messages": [{"role": "user", "content": prompts[2]}], "max_new_tokens": 1},
        ]
        file, out = write_jsonl(tmp_path / "in.jsonl", requests), tmp_path / "out.jsonl"
        command = ["generate", str(parrot), "--prompt", prompts[0], "--prompts", str(file), "--out", str(out)]
        assert main(command) == 0
        records = [json.loads(line) for line in out.read_text().splitlines()]
        assert [record["answer"] for record in records[:2]] == answers[:2]
        assert answers[2].startswith(records[2]["answer"]) and records[2]["answer"] != answers[2]
        assert [record["num_beams"] for record in records] == [1, 2, 1]
        assert main(command) == 2  # nothing is written over

    def test_generate_names_a_wrong_line(
        self, parrot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a", "temprature": 1}\n')
        assert main(["generate", str(parrot), "--prompts", str(tmp_path / "in.jsonl")]) == 2
        assert "in.jsonl:2" in capsys.readouterr().err

    def test_chat_streams_and_forgets(
        self, parrot: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lines = iter([ROWS[0]["messages"][0]["content"], "/reset", ROWS[1]["messages"][0]["content"], "/exit", "never"])
        monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
        assert main(["chat", str(parrot), "--max-new-tokens", "12"]) == 0
        assert capsys.readouterr().out.split("\n")[:2] == [row["messages"][1]["content"] for row in ROWS[:2]]
        assert next(lines) == "never"
