"""Every recipe of the project runs: on a toy in place of its model, on a few rows with the columns of its data sets."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from launch.cli import main
from trainer.checkpoint.layout import RunDir
from trainer.config import RunConfig, Source
from trainer.metrics.trackers import read_metrics
from trainer.model.decilm import DeciLMConfig, DeciLMForCausalLM
from trainer.recipe import load_recipe
from trainer.run import train

RECIPES = sorted(path for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml") if "demo" not in path.name)
ANSWERED = ("llama2-7b-full", "llama2-7b-lora", "llama2-7b-qlora", "decilm-6b-platypus")
WEIGHTS = "adapter_model.safetensors"
NUM_ROWS = 120
PLATYPUS = {  # rows of each source of Open-Platypus, out of 24,926
    "MATH/PRM-800K": 12298,
    "reclor": 4530,
    "airoboros": 2605,
    "scienceqa": 1317,
    "leetcode_ne": 1100,
    "guanaco": 797,
    "ARB": 713,
    "scibench": 616,
    "theoremqa": 564,
    "tigerbot-kaggle": 386,
}
Rows = list[dict[str, Any]]


def words(rng: random.Random) -> str:
    return " ".join(rng.choices(["llama", "pack", "train", "rev", "a", "b", "c", "d"], k=rng.randint(1, 6)))


def dolly(rng: random.Random) -> Rows:
    return [
        {"instruction": words(rng), "context": rng.choice(["", words(rng)]), "response": words(rng), "category": "qa"}
        for _ in range(NUM_ROWS)
    ]


def guanaco(rng: random.Random) -> Rows:
    turn = "<s>[INST] {} [/INST] {} </s>"
    return [
        {"text": "".join(turn.format(words(rng), words(rng)) for _ in range(rng.randint(1, 3)))}
        for _ in range(NUM_ROWS)
    ]


def platypus(rng: random.Random) -> Rows:
    return [
        {"instruction": words(rng), "input": rng.choice(["", words(rng)]), "output": words(rng), "data_source": source}
        for source, count in PLATYPUS.items()
        for _ in range(count // 75)
    ]


def text_to_sql(rng: random.Random) -> Rows:
    return [
        {"id": i, "sql_prompt": words(rng), "sql_context": "CREATE TABLE a (b INT)", "sql": "SELECT b", "domain": "x"}
        for i in range(NUM_ROWS)
    ]


def bird(rng: random.Random) -> Rows:
    return [
        {
            "schema": "CREATE TABLE a (b INT)",
            "question": words(rng),
            "evidence": rng.choice(["", None]),
            "SQL": "SELECT b",
            "reasoning_trace": words(rng),
        }
        for _ in range(NUM_ROWS)
    ]


DATA_SETS: dict[str, Callable[[random.Random], Rows]] = {
    "databricks/databricks-dolly-15k": dolly,
    "mlabonne/guanaco-llama2-1k": guanaco,
    "garage-bAInd/Open-Platypus": platypus,
    "gretelai/synthetic_text_to_sql": text_to_sql,
    "meowterspace45/bird-sql-train-with-reasoning": bird,
}


@pytest.fixture(scope="session")
def data_sets(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """A file of rows for each data set, by its id; control tokens in their text are the toy's."""
    control = {"</s>": str(toy_tokenizer.eos_token), "<s>": str(toy_tokenizer.bos_token)}
    folder, files = tmp_path_factory.mktemp("data"), {}
    for name, make in DATA_SETS.items():
        files[name] = folder / f"{name.replace('/', '-')}.jsonl"
        text = "".join(json.dumps(row) + "\n" for row in make(random.Random(name)))
        for token, own in control.items():
            text = text.replace(token, own)
        files[name].write_text(text)
    return files


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, toy_model_dir: Path) -> Callable[[str], Path]:
    """The toy for a model's id: one whose layers differ in their heads for DeciLM."""
    decilm = tmp_path_factory.mktemp("models") / "decilm"
    shutil.copytree(toy_model_dir, decilm)
    config = DeciLMConfig.from_pretrained(toy_model_dir, num_key_value_heads_per_layer=[4, 1])
    DeciLMForCausalLM(config).save_pretrained(decilm)
    return lambda name: decilm if "DeciLM" in name else toy_model_dir


def small(config: RunConfig, model: Path, data_sets: dict[str, Path]) -> RunConfig:
    """`config` on the toy and the rows given, for few steps; all that a method depends on is the recipe's."""

    def local(source: Source) -> Source:
        where = source.where and source.where.model_copy(update={"total": source.where.total and 100})
        return source.model_copy(update={"path": str(data_sets[source.path]), "where": where})

    data, batch = config.data, config.train.global_batch
    # So small an effect as four steps have would drown in bfloat16's rounding when it is merged.
    dtype = config.model.dtype.replace("bfloat16", "float32")
    changes: dict[str, dict[str, Any]] = {
        "model": {"path": str(model), "dtype": dtype},
        "data": {
            "train": [local(source) for source in data.train],
            "pack_length": min(512, data.pack_length),
        },
        "train": {
            "max_steps": 4,
            "global_batch": batch.model_copy(update={"tokens": batch.tokens and 1024}),
        },
        "eval": {"every_steps": config.eval.every_steps and 2, "max_new_tokens": 4},
        "checkpoint": {"every_steps": 2},
    }
    if config.quantization:
        changes["quantization"] = {"compute_dtype": dtype}
    if config.optim.name.startswith("paged"):  # without a GPU there is nothing to page
        changes["optim"] = {"name": config.optim.name.removeprefix("paged_").replace("adamw_32bit", "adamw")}
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=fields) for name, fields in changes.items()}
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs_on_a_stand_in(
    path: Path, models: Callable[[str], Path], data_sets: dict[str, Path], tmp_path: Path
) -> None:
    recipe = load_recipe(path)
    config = RunConfig.model_validate(small(recipe, models(recipe.model.path), data_sets).model_dump())
    train(config, tmp_path / "run")
    run = RunDir(tmp_path / "run")
    records = list(read_metrics(run.metrics))
    steps = [record for record in records if record["kind"] == "step"]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert run.read_state()["state"] == "done"
    assert run.step_dir(4).is_dir() and (run.step_dir(4) / "adapter").is_dir() == (config.adapter is not None)
    assert (run.path / ("adapter" if config.adapter else "model")).is_dir()
    assert run.merged.is_dir() == config.export.merge
    if config.adapter and config.data.split.validation:
        evaluated = {record["step"]: record["loss"] for record in records if record["kind"] == "eval"}
        best = run.step_dir(min(evaluated, key=evaluated.__getitem__)) / "adapter" / WEIGHTS
        assert (run.path / "adapter" / WEIGHTS).read_bytes() == best.read_bytes(), "the best one is the result"
    if path.stem in ANSWERED:
        answer_prompts(tmp_path)


def answer_prompts(folder: Path) -> None:
    """By `packtrain generate`, each prompt with its own way of sampling."""
    asked = [
        {"prompt": "Name a llama.", "max_new_tokens": 4},
        {"prompt": "Name two.", "max_new_tokens": 4, "temperature": 0.7, "top_p": 0.9},
        {"messages": [{"role": "user", "content": "Name three."}], "max_new_tokens": 6, "num_beams": 4},
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(request) + "\n" for request in asked))
    answers = folder / "answers.jsonl"
    command = ["generate", str(folder / "run"), "--prompts", str(folder / "prompts.jsonl"), "--out", str(answers)]
    assert main(command) == 0
    records = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [record.items() >= request.items() for record, request in zip(records, asked, strict=True)] == [True] * 3
    assert all(isinstance(record["answer"], str) for record in records)
