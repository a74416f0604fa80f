"""The demo's inputs, its commands and its verdict. `make demo` itself shows that the model learns."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from launch import demo
from launch.demo import Measured, Row


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "demo"


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_inputs_keep_test_prompts_out_of_training(folder: Path) -> None:
    examples = demo.write_inputs()
    train, test = (read(folder / "data" / f"{name}.jsonl") for name in ("train", "test"))
    prompts = {row["messages"][0]["content"] for row in test}
    assert len(train) == demo.NUM_TRAIN
    assert len(prompts) == len(test) == demo.NUM_TEST == 200
    assert not prompts & {row["messages"][0]["content"] for row in train}
    assert len({row["messages"][0]["content"].split()[0] for row in examples}) >= 3
    assert all(row in test for row in examples)


def test_inputs_replace_an_earlier_demo_and_nothing_else(folder: Path) -> None:
    (folder / "qlora").mkdir(parents=True)
    (folder / "qlora" / "state.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    demo.write_inputs()
    first = (folder / "data" / "train.jsonl").read_bytes()
    demo.write_inputs()
    assert not (folder / "qlora").exists()
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "data" / "train.jsonl").read_bytes() == first


def test_shape_and_tokenizer_load_and_have_no_weights(folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    demo.write_inputs()
    tokenizer = AutoTokenizer.from_pretrained(folder / "shape")
    assert AutoConfig.from_pretrained(folder / "shape").vocab_size == len(tokenizer)
    assert not list((folder / "shape").glob("*.safetensors"))
    chat = [{"role": "system", "content": "Hi"}, {"role": "user", "content": "Repeat a b c d."}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|begin|><|system|>Hi<|end|><|user|>Repeat a b c d.<|end|><|assistant|>"
    letters = tokenizer("d c b a", add_special_tokens=False)["input_ids"]
    assert len(letters) == 4
    assert tokenizer.decode(letters) == "d c b a"


def test_answers_are_right() -> None:
    seen = set()
    for row in demo.chat_rows(50, seed=0):
        question, answer = (message["content"] for message in row["messages"])
        letters = [word for word in question.rstrip(".").split() if len(word) == 1]
        kind = " ".join(word for word in question.rstrip(".").split() if len(word) > 1)
        expected = {
            "Write backwards": letters[::-1],
            "Repeat": letters,
            "Write in capitals": [letter.upper() for letter in letters],
            "Move the first of to the end": letters[1:] + letters[:1],
        }[kind]
        assert answer.split() == expected
        seen.add(kind)
    assert len(seen) == 4


@pytest.mark.parametrize("name", ["demo-pretrain", "demo"])
def test_recipes_are_valid(name: str) -> None:
    from trainer.recipe import load_recipe

    config = load_recipe(demo.RECIPES / f"{name}.yaml")
    assert config.method == {"demo-pretrain": "full", "demo": "qlora"}[name]


@pytest.mark.parametrize(
    ("before", "after", "status"),
    [
        (Measured(3.0, 0.0, [" x"]), Measured(0.1, 0.95, ["a b"]), 0),
        (Measured(3.0, 0.0, [" x"]), Measured(0.1, 0.895, ["a b"]), 1),
        (Measured(3.0, 0.11, [" x"]), Measured(0.1, 0.95, ["a b"]), 1),
        (Measured(3.0, 0.0, [" x"]), Measured(3.0, 0.95, ["a b"]), 1),
    ],
)
def test_verdict(before: Measured, after: Measured, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"messages": [{"role": "user", "content": "Repeat [a] b."}, {"role": "assistant", "content": "a b"}]}
    assert demo.conclude(before, after, [row], seconds=1.0) == status
    shown = capsys.readouterr().out
    assert "Repeat [a] b." in shown
    assert ("NOT reached" in shown) == bool(status)


def test_a_command_is_shown_as_typed_and_its_failure_raised(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failure:
        demo.packtrain("train", "no such recipe.yaml")
    assert failure.value.returncode == 2
    assert "packtrain train 'no such recipe.yaml'" in capfd.readouterr().out
