"""Mixes: the counts are exact, the draw is the seed's, and no copy of a held-out row is trained on."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from trainer.config import RunConfig, Source
from trainer.data.mixing import apportion, choose_rows, repeat_rows
from trainer.data.rows import ListRows
from trainer.data.splits import Part, SplitName, draw_splits
from trainer.errors import UserError

KINDS = ["poem", "code", "law"]


def make_rows(counts: dict[Any, int]) -> list[dict[str, Any]]:
    """Rows of each kind by turns, as far as they go."""
    left, rows = dict(counts), []
    while any(left.values()):
        for kind in left:
            if left[kind]:
                left[kind] -= 1
                rows.append({"prompt": f"{kind} {left[kind]}", "completion": "a", "kind": kind})
    return rows


def source(path: Path | str = "rows", **fields: Any) -> Source:
    return Source.model_validate({"path": str(path), "format": "prompt_completion", **fields})


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def draw(train: list[Source], **split: Any) -> dict[SplitName, list[Part]]:
    data = {"train": [s.model_dump(exclude_unset=True) for s in train], "split": split}
    return draw_splits(RunConfig.model_validate({"model": {"path": "m"}, "data": data}))


def prompts(parts: list[Part]) -> list[str]:
    return [row["prompt"] for part in parts for _, rows in part.chunks() for row in rows]


@given(
    st.dictionaries(st.sampled_from(KINDS), st.tuples(st.integers(1, 60), st.floats(0.05, 1.0)), min_size=1),
    st.floats(0.05, 1.0),
    st.integers(0, 5),
)
@settings(max_examples=100, deadline=None)
def test_a_mix_has_exactly_its_counts(wanted: dict[str, tuple[int, float]], share: float, seed: int) -> None:
    rows = make_rows({kind: count for kind, (count, _) in wanted.items()} | {"other": 5})
    sizes = [size for _, size in wanted.values()]
    ratios = [size / math.fsum(sizes) for size in sizes]
    total = max(1, int(share * min(count / ratio for (count, _), ratio in zip(wanted.values(), ratios, strict=True))))
    where = {"column": "kind", "values": list(wanted), "ratios": ratios, "total": total}
    counts = dict(zip(wanted, apportion(total, ratios), strict=True))
    if any(counts[kind] > count for kind, (count, _) in wanted.items()):
        return  # rounded up beyond what there is; refused, as below
    indices = choose_rows(source(where=where), ListRows(rows, "hash"), 0, seed, "w")
    found = Counter(rows[i]["kind"] for i in indices)
    assert found == Counter(counts) and found.total() == total
    assert all(abs(found[kind] - total * ratio) < 1 for kind, ratio in zip(wanted, ratios, strict=True))
    assert np.all(np.diff(indices) > 0), "no row twice, and the source's order is kept"
    assert np.array_equal(indices, choose_rows(source(where=where), ListRows(rows, "other"), 0, seed, "w"))


def test_a_mix_follows_the_seed() -> None:
    rows = ListRows(make_rows(dict.fromkeys(KINDS, 50)), "hash")
    where = {"column": "kind", "values": KINDS, "ratios": [0.5, 0.3, 0.2], "total": 40}
    draws = [choose_rows(source(where=where), rows, 0, seed, "w").tolist() for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


@given(st.integers(0, 10_000), st.lists(st.integers(1, 1000), min_size=1, max_size=12))
def test_shares_add_up(total: int, parts: list[int]) -> None:
    ratios = [part / sum(parts) for part in parts]
    counts = apportion(total, ratios)
    assert sum(counts) == total
    assert all(abs(count - total * ratio) < 1 for count, ratio in zip(counts, ratios, strict=True))


def test_ten_categories_as_seed_rows_are_mixed(tmp_path: Path) -> None:
    """7,500 rows of ten categories, half to train on and a quarter each to validate and test."""
    kinds = [f"category {i}" for i in range(10)]
    ratios = [0.2, 0.15, 0.15, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05]
    path = write(tmp_path / "rows.jsonl", make_rows(dict.fromkeys([*kinds, "unwanted"], 1600)))
    where = {"column": "kind", "values": kinds, "ratios": ratios, "total": 7500}
    parts = draw([source(path, where=where)], validation=0.25, test=0.25, seed=42)
    assert {name: len(prompts(of_split)) for name, of_split in parts.items()} == {
        "train": 3750,
        "validation": 1875,
        "test": 1875,
    }
    everything = [prompt for of_split in parts.values() for prompt in prompts(of_split)]
    assert len(set(everything)) == 7500
    found = Counter(prompt.rpartition(" ")[0] for prompt in everything)
    assert [found[kind] for kind in kinds] == [round(7500 * ratio) for ratio in ratios]


def test_values_alone_take_all_their_rows_and_sample_draws_from_them() -> None:
    rows = ListRows(make_rows({"poem": 4, "code": 3, 7: 2}), "hash")
    chosen = choose_rows(source(where={"column": "kind", "values": ["poem", 7]}), rows, 0, 1, "w")
    assert Counter(rows.take(chosen.tolist())[i]["kind"] for i in range(len(chosen))) == {"poem": 4, 7: 2}
    three = choose_rows(source(where={"column": "kind", "values": ["poem"]}, sample=3), rows, 0, 1, "w")
    assert [row["kind"] for row in rows.take(three.tolist())] == ["poem"] * 3


def test_values_are_of_any_plain_type() -> None:
    rows = ListRows([{"kind": kind} for kind in (True, 1, 1.0, 0.5, "1", None, [1])], "hash")
    for values, expected in (([True], [0]), ([1], [1, 2]), ([0.5, "1"], [3, 4])):
        chosen = choose_rows(source(where={"column": "kind", "values": values}), rows, 0, 1, "w")
        assert chosen.tolist() == expected


MIX = {"column": "kind", "values": ["poem", "code"], "ratios": [0.5, 0.5], "total": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratios": [0.5, 0.3, 0.2]}, "ratios are 3 and values 2: give one for each value"),
        ({"ratios": [0.5, 0.4]}, "add up to 0.9"),
        ({"total": None}, "ratios and total come together"),
        ({"ratios": None}, "ratios and total come together"),
        ({"values": ["poem", "poem"]}, "one twice: poem"),
    ],
)
def test_a_mix_that_does_not_match_itself_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        source(where=MIX | change)
    with pytest.raises(ValidationError, match="both say how many rows"):
        source(where=MIX, sample=3)


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"column": "sort"}, "column", "(?s)no column 'sort'.*kind"),
        ({"values": ["poem", "cod"]}, "values", "(?s)'cod' as its kind.*'code'"),
        ({"values": ["poem", 1]}, "values", "(?s)1 as its kind.*'1'"),
        ({"total": 12}, "ratios", "0.5 of 12 are 6 rows of 'code', and rows has 5"),
    ],
)
def test_a_mix_that_the_rows_cannot_give_is_refused(change: dict[str, Any], field: str, message: str) -> None:
    rows = ListRows(make_rows({"poem": 20, "code": 5, "1": 3}), "hash")
    with pytest.raises(UserError, match=message) as caught:
        choose_rows(source(where=MIX | change), rows, 0, 1, "data.train[0]")
    assert caught.value.where == f"data.train[0].where.{field}" and caught.value.exit_status == 2


@given(st.integers(1, 300), st.floats(0.01, 5.0), st.integers(0, 3))
def test_weight_is_how_often_rows_are_there(num_rows: int, weight: float, seed: int) -> None:
    indices = np.arange(0, 2 * num_rows, 2)
    repeated = repeat_rows(indices, weight, 0, seed)
    counts = Counter(repeated.tolist())
    assert len(repeated) == round(weight * num_rows) and set(counts) <= set(indices.tolist())
    assert all(int(weight) <= counts[i] <= int(weight) + 1 for i in indices.tolist())
    assert np.all(np.diff(repeated) >= 0)


def test_weights_mix_sources_and_leak_no_held_out_row(tmp_path: Path) -> None:
    poems = write(tmp_path / "poems.jsonl", make_rows({"poem": 40}))
    code = write(tmp_path / "code.jsonl", make_rows({"code": 20}))
    plain = draw([source(poems), source(code)], validation=0.2)
    parts = draw([source(poems, weight=0.5), source(code, weight=3.0)], validation=0.2)
    assert prompts(parts["validation"]) == prompts(plain["validation"]), "held out before rows are weighted"
    left = Counter(prompt.split()[0] for prompt in prompts(plain["train"]))
    found = Counter(prompt.split()[0] for prompt in prompts(parts["train"]))
    assert found == {"poem": round(0.5 * left["poem"]), "code": 3 * left["code"]}
    assert not set(prompts(parts["train"])) & set(prompts(parts["validation"]))


def test_weights_are_for_training_and_leave_something(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", make_rows({"poem": 4}))
    other = write(tmp_path / "other.jsonl", make_rows({"code": 4}))
    own = source(other, weight=2.0).model_dump(exclude_unset=True)
    with pytest.raises(UserError, match="trained on") as caught:
        draw([source(path)], validation=[own])
    assert caught.value.where == "data.split.validation[0].weight"
    with pytest.raises(UserError, match="leaves none"):
        draw([source(path, weight=0.01)])
