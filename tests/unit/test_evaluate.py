"""Loss against plain transformers row by row; exact match on a model that knows half of the answers."""

from __future__ import annotations

import json
import math
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
from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.evaluate import evaluate_folder
from trainer.export.merge import merge_adapter

ROWS = list(chat_rows(12, seed=5))


def encode(tokenizer: Any, row: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of a row: the answer and its end token are trained."""
    prompt, answer = (message["content"] for message in row["messages"])
    head = tokenizer(f"<|user|>{prompt}<|end|><|assistant|>").input_ids
    tail = tokenizer(f"{answer}<|end|>", add_special_tokens=False).input_ids
    return torch.tensor([head + tail]), torch.tensor([[-100] * len(head) + tail])


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
    result = evaluate_folder(parrot, recipe, exact_match=False)

    model: Any = AutoModelForCausalLM.from_pretrained(parrot)
    total, tokens = 0.0, 0
    for ids, labels in (encode(AutoTokenizer.from_pretrained(parrot), row) for row in ROWS):
        with torch.no_grad():
            num_trained = int((labels != -100).sum())
            total += model(input_ids=ids, labels=labels).loss.item() * num_trained
            tokens += num_trained
    assert result.tokens == tokens
    assert result.loss == pytest.approx(total / tokens, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert result.exact_match is None
    assert result.rows == 12


def test_exact_match_counts_the_answers_it_knows(recipe: Path, parrot: Path) -> None:
    assert evaluate_folder(parrot, recipe).exact_match == 0.5
    assert evaluate_folder(parrot, recipe, max_rows=4).exact_match == 1.0


def test_run_and_merged_model_know_their_recipe(tmp_path: Path, toy_recipe: Callable[..., RunConfig]) -> None:
    run = make_run(tmp_path / "run", toy_recipe(adapter=LORA, quantization=NF4))
    merge_adapter(run, tmp_path / "merged")
    before, after = (evaluate_folder(folder, exact_match=False) for folder in (run, tmp_path / "merged"))
    assert before.loss == pytest.approx(after.loss, rel=1e-4)
    assert before.tokens == after.tokens


def test_model_without_a_recipe_and_split_without_rows(
    toy_model_dir: Path, toy_recipe_file: Callable[..., Path]
) -> None:
    with pytest.raises(UserError, match="records no recipe"):
        evaluate_folder(toy_model_dir)
    with pytest.raises(UserError, match=r"data\.split\.test"):
        evaluate_folder(toy_model_dir, toy_recipe_file(), split="test")


class TestCommands:
    """`packtrain evaluate`, `generate`, `chat`, as a user runs them."""

    def test_evaluate_prints_a_table_and_writes_json(
        self, recipe: Path, parrot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["evaluate", str(parrot), "--recipe", str(recipe), "--json", str(tmp_path / "out.json")]) == 0
        record = json.loads((tmp_path / "out.json").read_text())
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
