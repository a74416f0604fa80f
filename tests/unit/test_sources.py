"""Sources: each file format gives the same rows; what is wrong with a file is said with its place."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from trainer.config import RunConfig, Source
from trainer.data.sources import open_source
from trainer.data.splits import Part, draw_splits
from trainer.errors import UserError

ROWS = [{"prompt": f'question {i}, "quoted"\nü', "completion": f"answer {i}"} for i in range(25)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".csv":
        import csv

        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow as pa
        import pyarrow.feather
        import pyarrow.parquet

        table = pa.Table.from_pylist(rows)
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(table, path, row_group_size=10)
        elif path.stem == "stream":
            with pa.ipc.new_stream(str(path), table.schema) as stream:
                stream.write_table(table, max_chunksize=10)
        else:
            pyarrow.feather.write_feather(table, str(path))
    return path


def source(path: Path | str, **fields: Any) -> Source:
    return Source.model_validate({"path": str(path), "format": "prompt_completion", **fields})


def config(*sources: Source, **sections: Any) -> RunConfig:
    data = {"train": [s.model_dump() for s in sources], **sections.pop("data", {})}
    return RunConfig.model_validate({"model": {"path": "m"}, "data": data, **sections})


def taken(parts: list[Part]) -> list[dict[str, Any]]:
    return [row for part in parts for _, rows in part.chunks() for row in rows]


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "stream.arrow", "feather.arrow"]
)
def test_local_files_give_their_rows_without_network(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a local file touched the network")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    rows = open_source(source(write(tmp_path / name, ROWS)), "data.train[0]")
    assert len(rows) == 25 and rows.columns == ["prompt", "completion"]
    assert rows.take(range(25)) == ROWS
    assert rows.take([3, 4, 24]) == [ROWS[3], ROWS[4], ROWS[24]]
    assert rows.take([0, 0, 2]) == [ROWS[0], ROWS[0], ROWS[2]], "rows that are trained on twice"
    assert list(rows.column("completion")) == [row["completion"] for row in ROWS]


def test_a_pattern_is_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    write(tmp_path / "part-2.jsonl", ROWS[10:])
    write(tmp_path / "part-1.parquet", ROWS[:7])
    write(tmp_path / "deep" / "part-1.csv", ROWS[7:10])
    (tmp_path / "part-folder").mkdir()
    rows = open_source(source(tmp_path / "**" / "part-*"), "w")
    assert rows.take(range(25)) == [*ROWS[7:10], *ROWS[:7], *ROWS[10:]]
    assert rows.take([2, 3, 3, 9, 10, 24]) == [ROWS[9], ROWS[0], ROWS[0], ROWS[6], ROWS[10], ROWS[24]]
    assert list(rows.column("prompt"))[3] == ROWS[0]["prompt"]
    before = rows.content_hash
    write(tmp_path / "part-2.jsonl", [*ROWS[10:24], ROWS[0]])
    assert open_source(source(tmp_path / "**" / "part-*"), "w").content_hash != before
    with pytest.raises(UserError, match="no file matches"):
        open_source(source(tmp_path / "other-*"), "w")


def test_a_column_that_a_late_row_is_the_first_to_have_is_there(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}] * 1500 + [{"prompt": "a", "completion": "b"}]
    assert open_source(source(write(tmp_path / "rows.jsonl", rows)), "w").columns == ["prompt", "completion"]


def test_what_an_object_of_a_table_lacks_is_not_there(tmp_path: Path) -> None:
    """Arrow's objects have the fields of all: another call's arguments must not become this one's."""
    calls = [{"city": "Paris"}, {"x": 1}]
    path = write(tmp_path / "rows.parquet", [{"calls": [{"arguments": arguments}]} for arguments in calls])
    rows = open_source(source(path), "w").take([0, 1])
    assert [row["calls"][0]["arguments"] for row in rows] == calls


@pytest.mark.parametrize("train", ["*.jsonl", "[a]*.jsonl"])
def test_a_file_that_is_named_in_two_ways_is_held_out_all_the_same(tmp_path: Path, train: str) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    write(tmp_path / "b.jsonl", [{"prompt": f"more {i}", "completion": "a"} for i in range(25)])
    own = {"split": {"validation": [source(path).model_dump()]}}
    with pytest.raises(UserError, match="in train too"):
        draw_splits(config(source(tmp_path / train), data=own))
    parts = draw_splits(config(source(path), source(tmp_path / train), data={"split": {"validation": 0.2}}))
    held_out = {row["prompt"] for row in taken(parts["validation"])}
    assert held_out and not held_out & {row["prompt"] for row in taken(parts["train"])}


def test_files_of_a_pattern_that_give_nothing_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match=r"b\.jsonl"):
        open_source(source(tmp_path / "*.jsonl"), "w")
    (tmp_path / "b.jsonl").unlink()
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(UserError, match=r"b\.jsonl has no rows"):
        open_source(source(tmp_path / "*.jsonl"), "w")


def test_a_folder_of_several_kinds_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "set" / "a.jsonl", ROWS)
    write(tmp_path / "set" / "b.csv", ROWS)
    with pytest.raises(UserError, match=r"several kinds: \.csv, \.jsonl"):
        open_source(source(tmp_path / "set"), "w")


def test_an_arrow_stream_that_breaks_off_between_batches_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "stream.arrow", ROWS)
    whole.write_bytes(whole.read_bytes()[:-8])
    with pytest.raises(UserError, match="breaks off"):
        open_source(source(whole), "w")


@pytest.mark.parametrize("fields", [{"split": "test"}, {"name": "main"}, {"revision": "v1"}])
def test_what_only_hub_sets_have_is_refused_for_files(tmp_path: Path, fields: dict[str, str]) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    (field,) = fields
    for place in (path, tmp_path / "*.jsonl"):
        with pytest.raises(UserError, match="is local") as caught:
            open_source(source(place, **fields), "data.train[0]")
        assert caught.value.where == f"data.train[0].{field}"


def test_a_saved_data_set_is_read_by_its_splits(tmp_path: Path) -> None:
    import datasets

    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "dev": one.select(range(3))}).save_to_disk(tmp_path / "several")
    assert open_source(source(tmp_path / "one"), "w").take(range(25)) == ROWS
    assert open_source(source(tmp_path / "several", split="dev"), "w").take(range(3)) == ROWS[:3]
    with pytest.raises(UserError, match="splits train, dev"):
        open_source(source(tmp_path / "several", split="test"), "w")


def test_json_with_an_object_a_line_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert open_source(source(path), "w").take(range(25)) == ROWS


def test_a_folder_is_read_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = write(tmp_path / "set" / "train.jsonl", ROWS).parent
    rows = open_source(source(folder), "w")
    assert rows.take([0, 24]) == [ROWS[0], ROWS[24]]
    with pytest.raises(UserError, match="split dev"):
        open_source(source(folder, split="dev"), "w")


def test_slices_of_a_split_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their hashes name the data cache: equal ones would train on the rows of another slice."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = write(tmp_path / "set" / "train.jsonl", ROWS).parent
    first, second = (open_source(source(folder, split=f"train[{cut}]"), "w") for cut in (":10", "10:20"))
    assert len(first) == len(second) == 10
    assert first.content_hash != second.content_hash


def test_hash_is_of_the_content_not_of_the_place(tmp_path: Path) -> None:
    def content_hash(name: str, rows: list[dict[str, Any]]) -> str:
        return open_source(source(write(tmp_path / name, rows)), "w").content_hash

    assert content_hash("a/rows.jsonl", ROWS) == content_hash("b/other.jsonl", ROWS)
    assert content_hash("a/rows.jsonl", ROWS) != content_hash("c/rows.jsonl", [*ROWS[:-1], ROWS[0]])


BAD_FILES = {
    "missing.jsonl": (None, "there is no file"),
    "./missing/file": (None, "there is no file"),
    "rows.txt": ("hello", "no ending that tells its format"),
    "half.jsonl": ('{"prompt": "a", "completion": "b"}\n\n{"prompt": ', "line 3 is not JSON"),
    "list.jsonl": ("[1, 2]\n", "line 1 is a list"),
    "half.json": ('[{"prompt": ', "is not JSON"),
    "one.json": ('{"prompt": "a"}', "holds one dict"),
    "text.json": ('["a"]', "row 0 is a str"),
    "fields.csv": ("prompt,completion\na,b,c\n", "more fields than the header"),
    "twice.csv": ("prompt,completion,completion\na,b,c\n", "two columns 'completion'"),
    "number.json": ('[{"prompt": ' + "1" * 5000 + "}]", "digits"),
    "~nobody-here/rows.jsonl": (None, "~nobody-here"),
    "empty.jsonl": ("\n", "has no rows"),
    "empty.csv": ("prompt,completion\n", "has no rows"),
    "not.parquet": ("PAR?", "is not Parquet"),
    "not.arrow": ("ARROW?", "is not Arrow"),
    "latin.csv": (b"prompt,completion\n\xfc,a\n", "UTF-8"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_with_their_place(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content, message = BAD_FILES[name]
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        rows = open_source(source(name), "data.train[0]")
        rows.take(range(len(rows)))
    assert caught.value.where.startswith("data.train[0]") and caught.value.fix


def test_a_hub_id_that_cannot_be_had_says_what_to_do() -> None:
    with pytest.raises(UserError, match="no-such-owner/no-such-set") as caught:
        open_source(source("no-such-owner/no-such-set"), "data.train[0]")
    assert caught.value.exit_status == 2 and "path" in caught.value.where


def test_sample_is_exact_and_seeded(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)

    def sample(count: int, seed: int) -> list[dict[str, Any]]:
        return taken(draw_splits(config(source(path, sample=count), data={"split": {"seed": seed}}))["train"])

    first = sample(7, seed=1)
    assert len(first) == 7 and all(row in ROWS for row in first)
    assert first == sorted(first, key=ROWS.index), "a source keeps its order"
    assert first == sample(7, seed=1) != sample(7, seed=2)
    assert sample(25, seed=3) == ROWS
    with pytest.raises(UserError, match="26 rows are asked for.*has 25"):
        sample(26, seed=1)


@pytest.mark.parametrize("shares", [(0.2, 0.0), (0.0, 0.2), (0.2, 0.4), (0.04, 0.04)])
def test_shares_are_exact_and_disjoint(tmp_path: Path, shares: tuple[float, float]) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    more = write(tmp_path / "more.jsonl", [{"prompt": f"more {i}", "completion": "a"} for i in range(25)])
    split = {"validation": shares[0], "test": shares[1], "seed": 3}
    parts = draw_splits(config(source(path), source(more), data={"split": split}))
    counts = {name: len(taken(of_split)) for name, of_split in parts.items()}
    assert counts.get("validation", 0) == round(50 * shares[0]) and counts.get("test", 0) == round(50 * shares[1])
    prompts = [row["prompt"] for of_split in parts.values() for row in taken(of_split)]
    assert len(prompts) == len(set(prompts)) == 50
    again = draw_splits(config(source(path), source(more), data={"split": split}))
    assert {name: taken(p) for name, p in parts.items()} == {name: taken(p) for name, p in again.items()}
    other = draw_splits(config(source(path), source(more), data={"split": {**split, "seed": 4}}))
    assert taken(parts["train"]) != taken(other["train"])


def test_a_source_listed_twice_does_not_leak_into_a_share(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    copy = write(tmp_path / "copy.jsonl", ROWS)
    parts = draw_splits(config(source(path), source(copy), data={"split": {"validation": 0.1}}))
    held_out = [row["prompt"] for row in taken(parts["validation"])]
    assert len(held_out) == 5
    assert not {row["prompt"] for row in taken(parts["train"])} & set(held_out)


def test_sources_of_their_own_must_not_be_trained_on(tmp_path: Path) -> None:
    path, other = write(tmp_path / "rows.jsonl", ROWS), write(tmp_path / "other.jsonl", ROWS[:5])
    own = {"split": {"validation": [source(other).model_dump()]}}
    assert taken(draw_splits(config(source(path), data=own))["validation"]) == ROWS[:5]
    own = {"split": {"validation": [source(path, sample=20).model_dump()]}}
    with pytest.raises(UserError, match="in train too"):
        draw_splits(config(source(path, sample=20), data=own))


@pytest.mark.parametrize(("share", "message"), [(0.01, "leaves no row for it"), (0.99, "leaves none to train on")])
def test_a_share_of_nothing_is_refused(tmp_path: Path, share: float, message: str) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(UserError, match=message) as caught:
        draw_splits(config(source(path), data={"split": {"validation": share}}))
    assert caught.value.where == "data.split.validation"


@pytest.mark.parametrize(
    "sections",
    [
        {"eval": {"every_steps": 5}},
        {"eval": {"every_steps": 5, "samples": ["x"], "early_stopping": {}}},
        {"eval": {"every_steps": 5, "samples": ["x"]}, "schedule": {"name": "plateau"}},
    ],
)
def test_evaluation_without_validation_rows_is_refused(tmp_path: Path, sections: dict[str, Any]) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(UserError, match="needs validation rows") as caught:
        draw_splits(config(source(path), **sections))
    assert caught.value.where == "data.split.validation" and "0.02" in caught.value.fix
    assert draw_splits(config(source(path), data={"split": {"validation": 0.2}}, **sections))
