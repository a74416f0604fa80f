"""The cache: the same content is prepared once, is there whole or not at all, and gives back the rows that went in."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from trainer.caches import cache_root
from trainer.config import RunConfig
from trainer.data import conversion, prepare
from trainer.data.cache import ABANDONED_SECONDS, open_or_build
from trainer.data.masking import build_labels, load_template
from trainer.data.prepare import iter_split_examples, load_split_examples, load_splits
from trainer.data.types import TokenizedRow
from trainer.errors import UserError

Recipe = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PACKTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_building(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes every later build fail."""

    def refuse(*_: object) -> None:
        raise AssertionError("the data was prepared a second time")

    return lambda: monkeypatch.setattr(prepare, "_build", refuse)


def write_rows(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    return path


def rows_of(path: Path | str, **fields: Any) -> dict[str, Any]:
    return {"train": [{"path": str(path), "format": "prompt_completion"}], "split": {}, "pack_length": 256, **fields}


QUESTIONS = [(f"What is {i}?", "a number " * (i % 5 + 1)) for i in range(40)]


def test_packs_hold_the_rows_that_masking_makes(toy_recipe: Recipe, toy_tokenizer: PreTrainedTokenizerFast) -> None:
    config = toy_recipe(data={"split": {"validation": 0.25, "test": 0.125, "seed": 3}})
    splits = load_splits(config, toy_tokenizer)
    template = load_template("tokenizer", toy_tokenizer)
    sizes = {}
    for name, packs in splits.items():
        examples = list(iter_split_examples(config, name, toy_tokenizer))
        made = build_labels(examples, template, toy_tokenizer, config.data)
        rows = [row for row in made if isinstance(row, TokenizedRow)]
        assert list(packs.rows) == rows
        documents = [document for pack in packs for document in pack]
        assert sorted(documents) == sorted((row.ids, row.labels) for row in rows)
        assert all(sum(len(ids) for ids, _ in pack) <= config.data.pack_length for pack in packs)
        report = splits.reports[name]
        assert report.rows == len(rows) and report.packs == len(packs) and report.lengths == [len(r.ids) for r in rows]
        assert report.tokens == sum(report.lengths)
        assert report.fill == report.tokens / (len(packs) * config.data.pack_length)
        assert packs[len(packs) - 1] == list(packs)[-1]
        with pytest.raises(IndexError):
            packs[len(packs)]
        sizes[name] = len(rows)
    assert sizes == {"train": 40, "validation": 16, "test": 8}


def test_packs_know_their_lengths_without_their_tokens(
    toy_recipe: Recipe, toy_tokenizer: PreTrainedTokenizerFast
) -> None:
    packs = load_splits(toy_recipe(), toy_tokenizer).train
    assert packs.lengths().tolist() == [sum(len(ids) for ids, _ in pack) for pack in packs]
    assert packs.costs().tolist() == [sum(len(ids) ** 2 + 65536 * len(ids) for ids, _ in pack) for pack in packs]


def test_without_packing_each_row_is_a_pack(
    tmp_path: Path, toy_recipe: Recipe, toy_tokenizer: PreTrainedTokenizerFast
) -> None:
    config = toy_recipe(data=rows_of(write_rows(tmp_path / "rows.jsonl", QUESTIONS), packing=False))
    packs = load_splits(config, toy_tokenizer).train
    assert [pack[0][0] for pack in packs] == [row.ids for row in packs.rows]


def test_the_same_content_is_prepared_once(
    tmp_path: Path, toy_recipe: Recipe, toy_tokenizer: PreTrainedTokenizerFast, no_building: Callable[[], None]
) -> None:
    config = toy_recipe(data=rows_of(write_rows(tmp_path / "rows.jsonl", QUESTIONS)))
    first = load_splits(config, toy_tokenizer)
    no_building()
    copy = toy_recipe(data=rows_of(write_rows(tmp_path / "elsewhere.jsonl", QUESTIONS)), train={"epochs": 3})
    second = load_splits(copy, toy_tokenizer)
    assert list(second.train) == list(first.train) and second.fingerprint == first.fingerprint
    assert second.reports == first.reports
    assert second.train.rows[0].source.endswith("elsewhere.jsonl"), "messages name the file of this recipe"


def test_other_content_is_prepared_anew(
    tmp_path: Path, own_cache: Path, toy_recipe: Recipe, toy_tokenizer: PreTrainedTokenizerFast
) -> None:
    import copy

    path = write_rows(tmp_path / "rows.jsonl", QUESTIONS)
    (tmp_path / "t.jinja").write_text(str(toy_tokenizer.chat_template).replace("<|user|>", "<|user|> "))
    changes: list[dict[str, Any]] = [
        {},
        {"train_on": "all"},
        {"pack_length": 257},
        {"packing": False},
        {"template": "alpaca"},
        {"split": {"validation": 0.25}},
        {"split": {"validation": 0.25, "seed": 7}},
        {"train": [{**rows_of(path)["train"][0], "sample": 39}]},
        {"train": [{**rows_of(path)["train"][0], "columns": {"prompt": "completion"}}]},
        {"train": rows_of(write_rows(tmp_path / "more.jsonl", [*QUESTIONS, ("a", "b")]))["train"]},
    ]
    configs = [toy_recipe(data=rows_of(path, **change), train={"global_batch": {"rows": 2}}) for change in changes]
    for config in configs:
        load_splits(config, toy_tokenizer)
    other = copy.deepcopy(toy_tokenizer)
    other.add_tokens(["number"])
    load_splits(configs[0], other)
    assert len([path for path in own_cache.iterdir() if path.is_dir()]) == len(configs) + 1


def test_a_resumed_run_finds_its_data_whichever_version_of_the_code_prepares_it(
    tmp_path: Path, toy_recipe: Recipe, toy_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", QUESTIONS)
    first = load_splits(toy_recipe(data=rows_of(path)), toy_tokenizer)
    key = prepare.content_key
    monkeypatch.setattr(prepare, "content_key", lambda parts: key({**parts, "code": "newer"}))
    assert load_splits(toy_recipe(data=rows_of(path)), toy_tokenizer).fingerprint == first.fingerprint
    other = rows_of(write_rows(path, [*QUESTIONS[:-1], ("a", "b")]))
    assert load_splits(toy_recipe(data=other), toy_tokenizer).fingerprint != first.fingerprint


def test_dropped_and_cut_rows_are_counted_by_reason(
    tmp_path: Path, toy_recipe: Recipe, toy_tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [*QUESTIONS, ("why " * 300, "too far"), ("short", "long " * 300), ("empty", "  "), ("empty", "")]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with open(path, "a") as file:
        file.write('{"prompt": "no answer", "completion": null}\n')
    config = toy_recipe(data=rows_of(path))
    report = load_splits(config, toy_tokenizer).reports["train"]
    assert report.rows == 41 and report.truncated == 1
    assert report.dropped == {
        "an answer is empty": 2,
        "its answer starts beyond pack_length": 1,
        "completion is not text": 1,
    }
    assert load_splits(config, toy_tokenizer).reports["train"].dropped == report.dropped
    examples = load_split_examples(config, "train", toy_tokenizer)
    assert [e.row for e in examples] == [*range(40), 41]
    assert [e.row for e in iter_split_examples(config, "train", toy_tokenizer)] == [*range(44)]


def test_all_rows_too_long_is_an_error_that_leaves_nothing(
    tmp_path: Path, own_cache: Path, toy_recipe: Recipe, toy_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [("why " * 300, "because")] * 3)
    for long_rows in ("truncate", "drop"):
        with pytest.raises(UserError, match="all 3 rows of train are too long") as caught:
            load_splits(toy_recipe(data=rows_of(path, long_rows=long_rows)), toy_tokenizer)
        assert caught.value.where == "data.pack_length" and caught.value.exit_status == 2
    assert not [path for path in own_cache.iterdir() if path.suffix != ".lock"]


def test_a_template_that_no_row_survives_is_an_error(
    tmp_path: Path, toy_recipe: Recipe, toy_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", QUESTIONS)
    template = tmp_path / "silent.jinja"
    template.write_text("{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match=r"no stop token after an answer \(40\)|generation prompt.* \(40\)") as caught:
        load_splits(toy_recipe(data=rows_of(path, template=str(template))), toy_tokenizer)
    assert caught.value.where == "data" and "data.template" in caught.value.fix


def test_a_source_of_which_nothing_is_left_is_an_error(
    tmp_path: Path, toy_recipe: Recipe, toy_tokenizer: PreTrainedTokenizerFast
) -> None:
    good, bad = write_rows(tmp_path / "good.jsonl", QUESTIONS), write_rows(tmp_path / "bad.jsonl", [("a", " ")] * 7)
    data = rows_of(good)
    data["train"].append({"path": str(bad), "format": "prompt_completion"})
    with pytest.raises(UserError, match=r"all 7 rows of .*bad\.jsonl are refused: an answer is empty \(7\)") as caught:
        load_splits(toy_recipe(data=data), toy_tokenizer)
    assert caught.value.where == "data.train[1]"


def test_plain_text_needs_train_on_all(
    tmp_path: Path, toy_recipe: Recipe, toy_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "Once upon a time"}\n' * 4)
    data = rows_of(path, train=[{"path": str(path), "format": "text"}])
    with pytest.raises(UserError, match="plain text without an assistant") as caught:
        load_splits(toy_recipe(data=data), toy_tokenizer)
    assert caught.value.where == "data.train_on" and "train_on: all" in caught.value.fix
    report = load_splits(toy_recipe(data={**data, "train_on": "all"}), toy_tokenizer).reports["train"]
    assert report.rows == 4 and report.trained_tokens == report.tokens - 4


def test_a_pool_of_processes_gives_the_same_rows(
    tmp_path: Path, toy_recipe: Recipe, toy_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", QUESTIONS * 60)
    config = toy_recipe(data=rows_of(path))
    alone = load_splits(config, toy_tokenizer)
    monkeypatch.setenv("PACKTRAIN_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(conversion, "PARALLEL_ROWS", 1000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    pooled = load_splits(config, toy_tokenizer)
    assert any((tmp_path / "other").glob("*/meta.json"))
    assert pooled.fingerprint == alone.fingerprint
    assert list(pooled.train) == list(alone.train) and list(pooled.train.rows) == list(alone.train.rows)


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError("a", "b"), MemoryError])
def test_an_interrupted_build_leaves_nothing(own_cache: Path, error: Any) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        open_or_build("key", fail)
    assert [path.name for path in own_cache.iterdir()] == ["key.lock"]
    folder = open_or_build("key", lambda folder: (folder / "whole").touch())
    assert [path.name for path in folder.iterdir()] == ["whole"]


BUILDER = """
import fcntl, os, sys, time
from pathlib import Path
from trainer.data.cache import open_or_build

def build(folder):
    with open(sys.argv[1], "a") as log:
        log.write("built\\n")
    (folder / "part").mkdir()
    (folder / "part" / "half").write_text("half")
    if "die" in sys.argv:
        os.kill(os.getpid(), 9)
    time.sleep(0.5)
    (folder / "done").write_text("whole")

def refuse(*arguments):
    raise OSError("no locks here")

if "without-locks" in sys.argv:
    fcntl.flock = refuse
folder = open_or_build("key", build)
assert (folder / "done").read_text() == "whole"
print(folder)
"""


def start_builder(log: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILDER, str(log), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("mode", ["with-locks", "without-locks"])
def test_builders_that_start_together_all_get_one_whole_folder(tmp_path: Path, own_cache: Path, mode: str) -> None:
    builders = [start_builder(tmp_path / "log", mode) for _ in range(4)]
    for builder in builders:
        out, err = builder.communicate(timeout=60)
        assert builder.returncode == 0, err
        assert out.strip() == str(own_cache / "key")
    assert sorted(path.name for path in own_cache.iterdir()) == ["key", "key.lock"]
    if mode == "with-locks":
        assert (tmp_path / "log").read_text() == "built\n", "one builds, the others wait for it"


def test_a_builder_killed_half_way_is_not_read(tmp_path: Path, own_cache: Path) -> None:
    killed = start_builder(tmp_path / "log", "die")
    killed.communicate(timeout=60)
    assert killed.returncode == -9
    left = [path for path in own_cache.iterdir() if path.suffix == ".tmp"]
    assert len(left) == 1, "a killed builder cannot clean up"
    after = start_builder(tmp_path / "log")
    assert after.communicate(timeout=60)[0].strip() == str(own_cache / "key")
    assert left[0].exists(), "it may be at work on another host"
    os.utime(left[0], (0, os.stat(left[0]).st_mtime - ABANDONED_SECONDS - 1))
    (own_cache / "key").rename(own_cache / "gone")
    open_or_build("key", lambda folder: None)
    assert not left[0].exists()


def test_the_cache_is_in_the_home_folder_unless_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PACKTRAIN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "packtrain"


def test_splits_share_no_row(toy_recipe: Recipe, toy_tokenizer: PreTrainedTokenizerFast) -> None:
    config = toy_recipe(data={"split": {"validation": 0.3, "test": 0.3}})
    origins = {name: set(packs.rows.origins()) for name, packs in load_splits(config, toy_tokenizer).items()}
    assert sum(map(len, origins.values())) == 64
    assert all(not a & b for a, b in itertools.combinations(origins.values(), 2))


def test_a_split_that_is_not_asked_for_cannot_be_had(
    toy_recipe: Recipe, toy_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match="no test rows") as caught:
        load_split_examples(toy_recipe(), "test", toy_tokenizer)
    assert caught.value.where == "data.split.test"
