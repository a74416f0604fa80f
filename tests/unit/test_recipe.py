"""Recipes: what is read, what is refused and in which words, overrides, and the way back to YAML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.recipe import RecipeError, dump_recipe, json_schema, load_recipe, split_overrides

MINIMAL = "model: {path: m}\ndata: {train: [{path: a.jsonl, format: messages}]}\n"
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path


def problems(path: Path, text: str, **overrides: Any) -> list[str]:
    """What is said of `text` as a recipe, without the folder's name."""
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    found = caught.value.problems if isinstance(caught.value, RecipeError) else [caught.value]
    for problem in found:
        assert str(problem) in str(caught.value)
    return [str(problem).replace(f"{path.parent}/", "") for problem in found]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_of_the_project_loads(path: Path) -> None:
    assert load_recipe(path).data.train


@pytest.mark.parametrize("path", [path for path in RECIPES if "demo" not in path.name], ids=lambda path: path.name)
def test_every_recipe_says_what_hardware_it_is_for(path: Path) -> None:
    heading = path.read_text().split("\nmodel:")[0]
    assert "# hardware: " in heading and f"packtrain train recipes/{path.name}" in heading


def test_numbers_with_an_exponent_are_numbers(recipe: Path) -> None:
    recipe.write_text(MINIMAL + "optim: {lr: 1e-4, eps: 1.0e-8, weight_decay: 1E-2, max_grad_norm: 1}")
    optim = load_recipe(recipe).optim
    assert (optim.lr, optim.eps, optim.weight_decay, optim.max_grad_norm) == (1e-4, 1e-8, 1e-2, 1.0)


def test_all_that_is_wrong_is_reported_together_with_its_line(recipe: Path) -> None:
    text = """\
model: {path: m, dtipe: bfloat16}
adapter:
  r: "16"
  targets: [q_proj, 1]
data:
  train:
    - {path: a.jsonl, format: chat}
    - path: b.jsonl
  split:
    validation: 1.5
optim:
  lr: -1.0
  betas: [0.9]
train: {micro_batch: 0, global_batch: {tokens: 1, rows: 1}}
learning_rate: 1e-4
export: [merge]
"""
    formats = "one of alpaca, messages, sharegpt, prompt_completion, input_output, text, templated"
    assert problems(recipe, text) == [
        "recipe.yaml:1: model.dtipe: unknown field\n"
        "  allowed: path, revision, tokenizer, dtype, attention, trust_remote_code, init\n"
        "  fix: did you mean model.dtype?",
        'recipe.yaml:3: adapter.r: found "16"\n'
        "  allowed: a whole number of at least 1\n  fix: take the quotes away: 16",
        'recipe.yaml:4: adapter.targets[1]: found 1\n  allowed: text\n  fix: put it in quotes: "1"',
        f'recipe.yaml:7: data.train[0].format: found "chat"\n  allowed: {formats}',
        f"recipe.yaml:8: data.train[1].format: missing\n  allowed: {formats}",
        "recipe.yaml:10: data.split.validation: found 1.5\n  allowed: a number of at least 0 and below 1, "
        "or a list, each a section with path, name, revision, split, format, columns, where, sample, weight",
        "recipe.yaml:12: optim.lr: found -1.0\n  allowed: a number above 0",
        "recipe.yaml:13: optim.betas[1]: missing\n  allowed: a number of at least 0 and below 1",
        "recipe.yaml:14: train.global_batch: give either tokens or rows",
        "recipe.yaml:14: train.micro_batch: found 0\n  allowed: auto, or a whole number of at least 1",
        "recipe.yaml:15: learning_rate: unknown field\n  allowed: model, quantization, adapter, data, strategy, optim, "
        "schedule, train, eval, checkpoint, tracking, slurm, export\n  fix: did you mean optim.lr?",
        'recipe.yaml:16: export: found ["merge"]\n  allowed: a section with merge, base, verify',
    ]


@pytest.mark.parametrize(
    ("line", "nearest"),
    [
        ("optim: {learning_rate: 1}", "optim.lr"),
        ("adapter: {lora_alpha: 1}", "adapter.alpha"),
        ("adapter: {rank_r: 1}", "adapter.r"),
        ("max_seq_length: 1", "data.pack_length"),
        ("optims: {lr: 1}", "optim"),
        ("warmup: 1", "schedule.warmup"),
        ("train: {warmup_ratio: 0.1}", "schedule.warmup"),
    ],
)
def test_unknown_fields_name_the_nearest(recipe: Path, line: str, nearest: str) -> None:
    (problem,) = problems(recipe, MINIMAL + line)
    assert problem.endswith(f"fix: did you mean {nearest}?")


@pytest.mark.parametrize(
    ("line", "found", "allowed"),
    [
        ("optim: {lr: yes}", '"yes"', "a number above 0"),
        ("optim: {lr: true}", "true", "a number above 0"),
        ('optim: {lr: "1e-4"}', '"1e-4"', "a number above 0"),
        ("optim: {lr: .inf}", '".inf"', "a number above 0"),
        ("optim: {lr: 1e999}", "1e999", "a number above 0"),
        ("optim: {lr: null}", "null", "a number above 0"),
        ("optim: {lr: }", "null", "a number above 0"),
        (
            "optim: {betas: 0.9}",
            "0.9",
            "a list of 2: a number of at least 0 and below 1, a number of at least 0 and below 1",
        ),
        ("train: {max_steps: 10.0}", "10.0", "a whole number of at least 1, or null"),
        ("train: {seed: true}", "true", "a whole number"),
        ("train: {seed: 04:00:00}", '"04:00:00"', "a whole number"),
        ("data: {train: [{path: a, format: text}], packing: yes}", '"yes"', "true or false"),
        ("data: {train: [{path: a, format: text}], packing: 1}", "1", "true or false"),
        (
            "data: {train: []}",
            "[]",
            "a list of at least 1, each a section with path, name, revision, split, format, columns, where, sample, "
            "weight",
        ),
        ("tracking: {project: 2024}", "2024", "text"),
        ("tracking: {project: 12e4567}", "12e4567", "text"),
        ("eval: {samples: hello}", '"hello"', "a list, each text"),
        ("strategy: single", '"single"', "a section with kind, offload, reshard, shard_size"),
        ("optim: {lr: !!python/name:os.system x}", "the tag !!python/name:os.system", "plain YAML without tags"),
        ("optim: {lr: !!float x}", "x, which is no float", "plain YAML without tags"),
        ("eval: {samples: &a [*a]}", "", ""),
    ],
)
def test_values_are_taken_strictly(recipe: Path, line: str, found: str, allowed: str) -> None:
    base = "model: {path: m}\n" if line.startswith("data") else MINIMAL
    (problem,) = problems(recipe, base + line)
    if found:
        assert re.search(rf": found {re.escape(found)}\n  allowed: {re.escape(allowed)}(\n  fix: |$)", problem)
    else:
        assert "contains itself" in problem


def test_a_key_given_twice_is_refused(recipe: Path) -> None:
    assert problems(recipe, MINIMAL + "optim:\n  lr: 1\n  eps: 1\n  lr: 2\n") == [
        "recipe.yaml:6: optim.lr: given twice, first at recipe.yaml:4\n  fix: keep one of them"
    ]


def test_a_broken_rule_is_reported_at_the_field_it_is_about(recipe: Path) -> None:
    found = problems(recipe, MINIMAL + "quantization:\n  type: nf4\nschedule:\n  name: plateau\n")
    assert [problem.split(" ")[0] for problem in found] == ["recipe.yaml:3:", "recipe.yaml:6:"]
    assert "quantization needs an adapter" in found[0]


def test_a_section_whose_lines_are_all_comments_is_left_out(recipe: Path) -> None:
    recipe.write_text(MINIMAL + "optim:\n  # lr: 1\nadapter:\ntrain:\n  global_batch:\n    # rows: 1\n")
    assert load_recipe(recipe) == load_recipe_text(recipe, MINIMAL)


def load_recipe_text(path: Path, text: str) -> RunConfig:
    path.write_text(text)
    return load_recipe(path)


def test_anchors_are_shared(recipe: Path) -> None:
    text = "model: {path: &m m, tokenizer: *m}\ndata: {train: [&s {path: a, format: text}], split: {test: [*s]}}"
    config = load_recipe_text(recipe, text)
    assert config.model.tokenizer == "m" and config.data.split.test == config.data.train


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("# only a comment\n", "the file is empty"),
        ("- a\n- b\n", "recipe.yaml:1: found a list"),
        ("hello\n", "recipe.yaml:1: found a single value"),
        ("model: {path: m}\ndata: [\n", "recipe.yaml:3: not valid YAML"),
        ("model: {path: m}\n\tdata: x\n", "recipe.yaml:2: not valid YAML"),
        ("a: 1\n---\nb: 1\n", "recipe.yaml:2: not valid YAML"),
        ("a: b: c\n", "recipe.yaml:1: not valid YAML"),
        ("[a]: 1\n", "recipe.yaml:1: has a key that is not a name"),
    ],
)
def test_what_is_no_recipe_is_said_with_its_line(recipe: Path, text: str, message: str) -> None:
    assert message in problems(recipe, text)[0]


def test_files_that_cannot_be_read(tmp_path: Path, recipe: Path) -> None:
    with pytest.raises(UserError, match=r"recipes\.yaml: no such file\n  fix: did you mean .*recipe\.yaml\?"):
        load_recipe(tmp_path / "recipes.yaml")
    with pytest.raises(UserError, match="no such file\n  fix: packtrain init"):
        load_recipe(tmp_path / "nowhere" / "x.yaml")
    with pytest.raises(UserError, match="is a folder"):
        load_recipe(tmp_path)
    recipe.write_bytes(b"model: \xff")
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(recipe)


@pytest.mark.parametrize(
    ("overrides", "field", "value"),
    [
        ({"optim.lr": "1e-4"}, "optim.lr", 1e-4),
        ({"optim.lr": 3}, "optim.lr", 3.0),
        ({"optim.betas": "[0.8, 0.9]"}, "optim.betas", (0.8, 0.9)),
        ({"optim.max_grad_norm": "null"}, "optim.max_grad_norm", None),
        ({"data.packing": "true"}, "data.packing", True),
        ({"data.train[0].path": "b.jsonl"}, "data.train.0.path", "b.jsonl"),
        ({"data.train.0.columns.output": "answer"}, "data.train.0.columns", {"output": "answer"}),
        ({"adapter.r": "8"}, "adapter.r", 8),
        ({"eval.every_steps": 5, "eval.early_stopping.patience": "2"}, "eval.early_stopping.patience", 2),
        ({"train.global_batch.rows": "4"}, "train.global_batch.rows", 4),
        ({"adapter": "{r: 4, targets: [q_proj]}"}, "adapter.targets", ["q_proj"]),
        ({"adapter.r": "8", "adapter": "null"}, "adapter", None),
        ({"model.revision": "1234567"}, "model.revision", "1234567"),
        ({"model.revision": "12e4567"}, "model.revision", "12e4567"),
        ({"model.revision": "null"}, "model.revision", None),
        ({"model.path": "a: [b"}, "model.path", "a: [b"),
        ({"model.path": Path("folder")}, "model.path", "folder"),
        ({"eval.samples": '["a, b", c]'}, "eval.samples", ["a, b", "c"]),
    ],
)
def test_overrides(recipe: Path, overrides: dict[str, Any], field: str, value: Any) -> None:
    found: Any = load_recipe(recipe, overrides)
    for key in field.split("."):
        found = found[int(key)] if key.isdigit() else getattr(found, key)
    assert found == value


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("optim.lrr", "1", "--optim.lrr: unknown field\n  allowed: name, lr, .*\n  fix: did you mean optim.lr?"),
        ("optims.lr", "1", "--optims.lr: optims: unknown field\n  .*\n  fix: did you mean optim?"),
        ("optim..lr", "1", "--optim..lr: .*unknown field"),
        ("optim.lr.x", "1", "--optim.lr.x: unknown field\n  allowed: no fields below optim.lr"),
        ("optim.lr", "fast", '--optim.lr: found "fast"\n  allowed: a number above 0'),
        ("optim.lr", "", "--optim.lr: found null\n  allowed: a number above 0"),
        ("optim.betas", "[0.9", "--optim.betas: not valid YAML"),
        ("adapter", "{rank: 8}", "--adapter: adapter.rank: unknown field"),
        ("data.train[1].path", "b", "--data.train\\[1\\].path: data.train has 1 entries in the recipe, counted from 0"),
        ("data.split.test[0].path", "b", "--data.split.test\\[0\\].path: data.split.test is no list in the recipe"),
        ("train.micro_batch", "99", "--train.micro_batch: train.micro_batch is 99"),
    ],
)
def test_a_wrong_override_is_named(recipe: Path, name: str, value: str, message: str) -> None:
    found = problems(recipe, MINIMAL, **{name: value})
    assert len(found) == 1
    assert re.match(message.replace("?", r"\?"), found[0]), found[0]


def test_an_override_mends_what_the_file_has_wrong(recipe: Path) -> None:
    recipe.write_text(MINIMAL + "optim: {lr: fast}\n")
    assert load_recipe(recipe, {"optim.lr": "1"}).optim.lr == 1


def test_overrides_are_taken_out_of_the_command_line() -> None:
    tokens = [
        "--optim.lr",
        "1e-4",
        "r.yaml",
        "--run-dir=a.b",
        "--x",
        "y.z",
        "--data.train[0].path=b=c",
        "--adapter",
        "null",
    ]
    assert split_overrides(tokens) == (
        {"optim.lr": "1e-4", "data.train[0].path": "b=c", "adapter": "null"},
        ["r.yaml", "--run-dir=a.b", "--x", "y.z"],
    )
    assert split_overrides(["--optim.lr=-1", "--", "--optim.lr", "2"]) == (
        {"optim.lr": "-1"},
        ["--", "--optim.lr", "2"],
    )
    assert split_overrides(["--optim.lr", "-1"]) == ({"optim.lr": "-1"}, [])


@pytest.mark.parametrize("tokens", [["--optim.lr"], ["--optim.lr", "--run-dir"], ["--optim.lr=1", "--optim.lr=2"]])
def test_overrides_without_a_value_or_given_twice(tokens: list[str]) -> None:
    with pytest.raises(UserError, match=r"--optim\.lr"):
        split_overrides(tokens)


# dump_recipe and load_recipe

TEXT = st.text(max_size=12) | st.sampled_from(
    ["yes", "1e-4", "null", "~", "12", "0o7", "04:00:00", " x ", "a: b", "- a", "é\n"]
)
FLOAT = st.floats(min_value=1e-12, max_value=1e12)
SOURCE = st.fixed_dictionaries(
    {"path": TEXT, "format": st.sampled_from(["alpaca", "messages", "prompt_completion", "text"])},
    optional={"columns": st.dictionaries(TEXT, TEXT, max_size=2), "sample": st.none() | st.integers(1, 10**9)},
)
SHARES = st.floats(0, 0.5) | st.lists(SOURCE, max_size=2)
CONFIG = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries({"path": TEXT}, optional={"revision": st.none() | TEXT}),
        "data": st.fixed_dictionaries(
            {"train": st.lists(SOURCE, min_size=1, max_size=2)},
            optional={"template": TEXT, "split": st.fixed_dictionaries({"validation": SHARES, "test": SHARES})},
        ),
    },
    optional={
        "adapter": st.none()
        | st.fixed_dictionaries({"alpha": FLOAT, "targets": st.just("all-linear") | st.lists(TEXT, max_size=2)}),
        "optim": st.fixed_dictionaries({"lr": FLOAT, "eps": FLOAT, "max_grad_norm": st.none() | FLOAT}),
        "eval": st.fixed_dictionaries({"samples": st.lists(TEXT, max_size=3)}),
        "train": st.fixed_dictionaries({"seed": st.integers(-(10**17), 10**17), "epochs": st.floats(1e-12, 1e5)}),
    },
).map(RunConfig.model_validate)


@settings(max_examples=60, deadline=None)
@given(config=CONFIG)
def test_a_dumped_recipe_loads_to_the_same_config(tmp_path_factory: pytest.TempPathFactory, config: RunConfig) -> None:
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_recipe(config), encoding="utf-8")
    assert load_recipe(path) == config


def test_every_field_is_described_for_editors() -> None:
    schema = json_schema()
    assert schema["required"] == ["model", "data"]
    sections = [schema, *schema["$defs"].values()]
    assert all(section["additionalProperties"] is False for section in sections)
    undescribed = [
        name
        for section in sections[1:]
        for name, field in section["properties"].items()
        if "description" not in field and "$ref" not in field and "anyOf" not in field
    ]
    assert undescribed == []
    assert schema["$defs"]["OptimConfig"]["properties"]["lr"]["exclusiveMinimum"] == 0
