"""`packtrain preprocess`: what it prints is what is trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from launch.preprocess import preprocess, token_texts
from trainer.data.prepare import load_splits
from trainer.data.types import IGNORE_INDEX

RecipeFile = Callable[..., Path]
NASTY = "<script>alert('&amp;')</script>\x1b[31m[bold]ü🐦[/bold]\x9b"


@pytest.fixture
def nasty_rows(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "[red]rows.jsonl"
    path.write_text(json.dumps({"prompt": NASTY, "completion": f"{NASTY} answer"}) + "\n" + json.dumps({"prompt": "a"}))
    return {"train": [{"path": str(path), "format": "prompt_completion"}], "split": {}, "pack_length": 512}


def test_json_is_one_object_a_row_and_a_summary(
    toy_recipe: Callable[..., Any],
    toy_recipe_file: RecipeFile,
    toy_tokenizer: PreTrainedTokenizerFast,
    capfd: pytest.CaptureFixture[str],
) -> None:
    preprocess(toy_recipe_file(), json=True)
    *rows, last = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    splits = load_splits(toy_recipe(), toy_tokenizer)
    expected = [row for _, packs in splits.items() for row in packs.rows]
    assert len(rows) == len(expected) == 64
    for row, right in zip(rows, expected, strict=True):
        assert list(row) == ["source", "row", "ids", "tokens", "trained"]
        assert (row["source"], row["row"], row["ids"]) == (right.source, right.row, right.ids)
        assert row["trained"] == [int(label != IGNORE_INDEX) for label in right.labels]
        assert toy_tokenizer.convert_tokens_to_ids(row["tokens"]) == row["ids"]
    summary = last["summary"]
    assert summary["rows"] == 64 and summary["dropped"] == {}
    assert summary["tokens"] == sum(len(row["ids"]) for row in rows)
    assert summary["trained_tokens"] == sum(sum(row["trained"]) for row in rows)
    assert summary["packs"] == len(splits.train) + len(splits.validation)
    assert summary["fill"] == pytest.approx(summary["tokens"] / (summary["packs"] * 128))
    assert summary["splits"]["validation"]["rows"] == 16


def test_table_counts_rows_and_reasons(
    toy_recipe_file: RecipeFile, nasty_rows: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    preprocess(toy_recipe_file(data=nasty_rows), show=1)
    out = capsys.readouterr().out
    lines = {cells[1].strip(): cells[2].strip() for line in out.splitlines() if len(cells := line.split("│")) == 4}
    assert lines["rows"] == "1" and lines["dropped"] == "1" and lines["completion is not text"] == "1"
    assert lines["fill"].endswith("%") and "Training rows by length" in out
    assert "⟦" in out and "answer<|end|>⟧" in out, "without colours trained text stands in brackets"
    assert "\x1b" not in out and "\x9b" not in out, "rows do not steer the terminal"
    assert "[bold]ü🐦[/bold]" in out and "[red]rows.jsonl, row 0" in out


def test_rows_are_counted_and_shown_by_source(
    toy_recipe_file: RecipeFile, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, count in (("a", 3), ("b", 2)):
        rows = [{"prompt": f"{name}{i}", "completion": "x"} for i in range(count)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": "a.jsonl", "format": "prompt_completion", "weight": 2.0}
    train = [source, {**source, "path": "b.jsonl", "weight": 1.0}]
    preprocess(toy_recipe_file(data={"train": train, "split": {}}), show=4)
    out = capsys.readouterr().out
    lines = {cells[1].strip(): cells[2].strip() for line in out.splitlines() if len(cells := line.split("│")) == 4}
    assert (lines["rows"], lines["of a.jsonl"], lines["of b.jsonl"]) == ("8", "6", "2")
    shown = [line.removeprefix("-- ").split(":")[0] for line in out.splitlines() if line.startswith("-- ")]
    assert shown == ["a.jsonl, row 0", "b.jsonl, row 0", "a.jsonl, row 1", "b.jsonl, row 1"]


def test_colours_tell_trained_tokens(
    toy_recipe_file: RecipeFile, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    preprocess(toy_recipe_file(), show=2)
    out = capsys.readouterr().out
    assert "\x1b[30;42m<|end|>" in out or "\x1b[30;102m<|end|>" in out
    assert "\x1b[2m<|user|>" in out


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[tuple[str, str | None]] = []
        self.text: dict[str, str] = {"on": "", "off": ""}
        self._of = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [a for a in attrs if a[0] in ("src", "href")]
        self._of = str(dict(attrs).get("class")) if tag == "span" else ""

    def handle_endtag(self, tag: str) -> None:
        self._of = ""

    def handle_data(self, data: str) -> None:
        if self._of in self.text:
            self.text[self._of] += data


def test_page_is_offline_and_escapes_everything(
    toy_recipe_file: RecipeFile, nasty_rows: dict[str, Any], tmp_path: Path
) -> None:
    preprocess(toy_recipe_file(data=nasty_rows), html=tmp_path / "out" / "page.html")
    page = Page()
    page.feed((tmp_path / "out" / "page.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags and not page.links
    assert {"table", "pre", "style"} <= set(page.tags)
    shown = NASTY.replace("\x1b", "␛").replace("\x9b", "␡")
    assert f"{shown} answer<|end|>" in page.text["on"], "the page shows the answer as trained"
    assert shown in page.text["off"] and "answer" not in page.text["off"]


def test_token_texts_add_up_to_the_text(toy_tokenizer: PreTrainedTokenizerFast) -> None:
    for text in ("d c b a", "ü 🐦🐦 ok", " 名 前 ", "a\ufffdb\n\n"):
        ids = toy_tokenizer(text, add_special_tokens=False).input_ids
        texts = token_texts(toy_tokenizer, ids)
        assert len(texts) == len(ids) and "".join(texts) == text


def test_overrides_reach_the_recipe(toy_recipe_file: RecipeFile, capsys: pytest.CaptureFixture[str]) -> None:
    preprocess(toy_recipe_file(), overrides={"data.pack_length": 64, "data.split.validation": 0.5})
    out = capsys.readouterr().out
    assert "Packs of 64 tokens" in out
    assert [cell.strip() for cell in out.split("rows")[1].split("\n")[0].split("│")[1:3]] == ["32", "32"]
