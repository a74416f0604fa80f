"""Wrong input ends with a message and the right exit status: no traceback, nothing written over, no run dir left."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import cli
from tests.unit.export_toys import two_step_recipe
from trainer.checkpoint.layout import RunDir, find_damage
from trainer.errors import EXIT_FAILURE, EXIT_USER_ERROR, explain_os_error

pytestmark = pytest.mark.usefixtures("log_to_this_test")
Change = Callable[[Path], object]
Refuses = Callable[..., str]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def recipe(toy_model_dir: Path, toy_rows_file: Path) -> dict[str, Any]:
    """Two QLoRA steps with a checkpoint at each, merged."""
    return two_step_recipe(toy_model_dir, toy_rows_file, merge=True)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory, recipe: dict[str, Any]) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert cli.main(["train", str(write(folder / "recipe.yaml", recipe)), "--run-dir", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> RunDir:
    """A copy of a finished run."""
    return RunDir(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def base(toy_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the toy model."""
    return shutil.copytree(toy_model_dir, tmp_path / "base")


def write(path: Path, recipe: dict[str, Any], **sections: Any) -> Path:
    """A recipe with some fields changed; None takes a section out."""
    merged = {**recipe, **{name: {**recipe.get(name, {}), **(value or {})} for name, value in sections.items()}}
    path.write_text(yaml.safe_dump({k: v for k, v in merged.items() if sections.get(k, {}) is not None}))
    return path


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


# --------------------------------------------------------------------------------------------------------------- recipe


@pytest.mark.parametrize(
    ("sections", "texts"),
    [
        ({"data": {"train": [{"path": "missing.jsonl", "format": "messages"}]}}, ["data.train[0].path", "missing"]),
        ({"data": {"train": [{"path": "no such", "format": "messages"}]}}, ["data.train[0]"]),
        ({"data": {"split": {}}}, ["eval.every_steps needs validation rows"]),
        ({"data": {"pack_length": 8, "long_rows": "drop"}}, ["data.pack_length", "too long"]),
        ({"data": {"template": "missing.jinja"}}, ["data.template", "missing.jinja"]),
        ({"optim": {"lrr": 1}}, ["optim.lrr: unknown field", "did you mean optim.lr?"]),
        ({"optim": {"lr": "0.1"}}, ["optim.lr", "take the quotes away"]),
        ({"optim": {"lr": float("nan")}}, ["optim.lr"]),
        ({"optin": {"lr": 1}}, ["did you mean optim?"]),
        ({"schedule": {"warmup": 2.5}}, ["schedule.warmup is 2.5", "whole number"]),
        ({"train": {"micro_batch": 3}}, ["train.micro_batch is 3"]),
        ({"train": {"max_steps": None, "epochs": 1e308}}, ["train.epochs: found 1.0e+308", "at most 100000"]),
        ({"adapter": {"r": 0}}, ["adapter.r: found 0"]),
        ({"adapter": {"r": 10**6}}, ["adapter.r: 1000000", "1 to 160"]),
        ({"adapter": {"targets": ["nope_proj"]}}, ["adapter.targets: nope_proj", "q_proj"]),
        ({"adapter": None, "quantization": None}, ["export.merge"]),
        ({"model": {"path": "nowhere/at/all"}}, ["model.path", "is no folder"]),
        ({"model": {"tokenizer": "nowhere/at/all"}}, ["model.tokenizer"]),
        ({"model": {"path": "s3://bucket/llama"}}, ["model.path is s3://bucket/llama, an address", "Download it"]),
        ({"model": {"tokenizer": "hf://owner/name"}}, ["model.tokenizer is hf://owner/name, an address"]),
        (
            {"data": {"train": [{"path": "gs://bucket/rows.jsonl", "format": "messages"}]}},
            ["data.train[0].path is gs://bucket/rows.jsonl, an address", "Download it"],
        ),
        (
            {"data": {"split": {"test": [{"path": "https://host/rows.jsonl", "format": "messages"}]}}},
            ["data.split.test[0].path is https://host/rows.jsonl, an address"],
        ),
    ],
)
def test_a_wrong_recipe_is_refused_before_a_run_dir_is_made(
    sections: dict[str, Any], texts: list[str], recipe: dict[str, Any], tmp_path: Path, refuses: Refuses
) -> None:
    path = write(tmp_path / "recipe.yaml", recipe, **sections)
    refuses(["train", path, "--run-dir", tmp_path / "run"], *texts)
    assert not (tmp_path / "run").exists()


def test_settings_that_may_be_meant_are_warned_of(
    recipe: dict[str, Any], base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_json(base / "config.json", max_position_embeddings=64)
    path = write(tmp_path / "recipe.yaml", recipe, model={"path": str(base)}, schedule={"warmup": 100})
    assert cli.main(["train", str(path), "--run-dir", str(tmp_path / "run")]) == 0
    assert "data.pack_length is 128, and the model knows 64 positions" in caplog.text
    assert "schedule.warmup is 100 steps and the run has 2" in caplog.text


# ----------------------------------------------------------------------------------------------------------------- data


def test_rows_that_cannot_be_read_are_dropped_and_counted(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ['{"prompt": "p", "completion": "a"}'] * 4
    lines += ['{"prompt": "half a \\ud83d", "completion": "a"}', '{"prompt": "p", "completion": NaN}']
    lines += ['{"prompt": null, "completion": "a"}', '{"prompt": ["p"], "completion": "a"}', '{"completion": "a"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    source = {"path": str(tmp_path / "rows.jsonl"), "format": "prompt_completion"}
    path = write(tmp_path / "recipe.yaml", recipe, data={"train": [source], "split": {}}, eval=None)
    assert cli.main(["preprocess", str(path), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])["summary"]
    assert summary["rows"] == 4
    assert summary["dropped"] == {
        "prompt is not text": 3,
        "it holds half a character (a lone surrogate)": 1,
        "completion is not text": 1,
    }


def test_pandas_empty_cells_are_empty() -> None:
    from trainer.config import Source
    from trainer.data.formats import read_example

    source = Source(path="p", format="alpaca")
    row = {"instruction": "i", "input": float("nan"), "output": "o"}
    assert read_example(row, 0, source, {name: (name,) for name in row}).messages[0]["content"] == "i"


@pytest.mark.parametrize(
    ("content", "suffix", "text"),
    [
        (b'{"text": " "}\n' * 5, ".jsonl", "text is empty (5)"),
        (b'{"text": "a"}\n{"text": \n', ".jsonl", "line 2 is not JSON"),
        (b'{"text": ' + b"[" * 100_000, ".jsonl", "line 1 is not JSON"),
        (b"[" * 100_000, ".json", "nests too deep"),
        (b"\n\n", ".jsonl", "has no rows"),
        (bytes(range(128, 255)), ".jsonl", "line 1 is not JSON"),
        (bytes(range(128, 255)), ".csv", "cannot read"),
        (b"no parquet", ".parquet", "is not Parquet"),
        (b'{"txt": "a"}\n', ".jsonl", "has no column 'text'"),
        (b"a", ".txt", "no ending that tells its format"),
    ],
)
def test_broken_data_is_named(
    content: bytes, suffix: str, text: str, recipe: dict[str, Any], tmp_path: Path, refuses: Refuses
) -> None:
    rows = tmp_path / f"rows{suffix}"
    rows.write_bytes(content)
    data = {"train": [{"path": str(rows), "format": "text"}], "train_on": "all", "split": {}}
    path = write(tmp_path / "recipe.yaml", recipe, data=data, eval=None)
    refuses(["train", path, "--run-dir", tmp_path / "run"], text)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", ["meta.json", "train/rows.arrow", "train/packs.arrow"])
def test_a_damaged_data_cache_is_named(
    file: str, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: Refuses
) -> None:
    monkeypatch.setenv("PACKTRAIN_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path / "recipe.yaml", recipe)
    assert cli.main(["preprocess", str(path)]) == 0
    (folder,) = [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]
    (folder / file).write_text("{")
    refuses(["preprocess", path], f"{folder}: this data cache is damaged", "delete the folder", status=EXIT_FAILURE)


# ---------------------------------------------------------------------------------------------------------------- model


def _cut_vocabulary(base: Path) -> None:
    edit_json(base / "config.json", vocab_size=300)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    edit_tensors(base / WEIGHTS, lambda tensors: tensors.update({n: tensors[n][:300] for n in names}))


def _set_weight(value: float) -> Change:
    def change(base: Path) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        edit_tensors(base / WEIGHTS, lambda tensors: tensors[name].view(-1)[:1].fill_(value))

    return change


def _index(text: str) -> Change:
    return lambda base: ((base / WEIGHTS).rename(base / "model-1.safetensors"), (base / INDEX).write_text(text))


BROKEN_BASES: dict[str, tuple[Change, str]] = {
    "tokenizer larger than the embeddings": (_cut_vocabulary, "has id 364, and the model has 300 embeddings"),
    "NaN": (_set_weight(float("nan")), "up_proj.weight holds NaN or Inf"),
    "Inf": (_set_weight(float("inf")), "up_proj.weight holds NaN or Inf"),
    "truncated": (lambda base: (base / WEIGHTS).write_bytes((base / WEIGHTS).read_bytes()[:-9]), "truncated"),
    "index of a list": (_index("[]"), "not a safetensors index"),
    "index of lists": (_index('{"weight_map": ["a"]}'), "not a safetensors index"),
    "index of numbers": (_index('{"weight_map": {"a": 5}}'), "not a safetensors index"),
    "missing shard": (_index('{"weight_map": {"a": "model-2.safetensors"}}'), "this file and it is missing"),
    "config of a list": (lambda base: (base / "config.json").write_text("[]"), "model.path"),
    "impossible config": (lambda base: edit_json(base / "config.json", num_attention_heads=5), "multiple"),
    "config of text": (lambda base: edit_json(base / "config.json", hidden_size="64"), "hidden_size"),
    "unknown rotary embedding": (
        lambda base: edit_json(base / "config.json", rope_parameters={"rope_type": "odd", "rope_theta": 1.0}),
        "makes no model",
    ),
}


@pytest.mark.parametrize("damage", BROKEN_BASES)
@pytest.mark.parametrize("quantization", [None, {}], ids=["lora", "qlora"])
def test_a_broken_base_is_refused_before_a_run_dir_is_made(
    damage: str, quantization: Any, recipe: dict[str, Any], base: Path, tmp_path: Path, refuses: Refuses
) -> None:
    change, text = BROKEN_BASES[damage]
    change(base)
    path = write(tmp_path / "recipe.yaml", recipe, model={"path": str(base)}, quantization=quantization)
    refuses(["train", path, "--run-dir", tmp_path / "run"], text)
    assert not (tmp_path / "run").exists()


def test_weights_too_large_for_float16_are_refused(
    recipe: dict[str, Any], base: Path, tmp_path: Path, refuses: Refuses
) -> None:
    _set_weight(1e6)(base)
    path = write(tmp_path / "recipe.yaml", recipe, model={"path": str(base), "dtype": "float16"})
    refuses(["train", path, "--run-dir", tmp_path / "run"], "NaN or Inf as float16", "model.dtype: bfloat16")


# -------------------------------------------------------------------------------------------------------------- run dir


def test_a_folder_that_no_run_made_is_left_alone(recipe: dict[str, Any], tmp_path: Path, refuses: Refuses) -> None:
    path = write(tmp_path / "recipe.yaml", recipe)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").touch()
    before = path.read_text()
    refuses(["train", path, "--run-dir", tmp_path], "no run made this folder", "recipe.yaml, model")
    assert path.read_text() == before
    assert (tmp_path / "model" / "mine").exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "recipe.yaml"]


def test_a_run_dir_that_cannot_be(recipe: dict[str, Any], tmp_path: Path, refuses: Refuses) -> None:
    path = write(tmp_path / "recipe.yaml", recipe)
    refuses(["train", path, "--run-dir", path], "is a file")
    refuses(["train", path, "--run-dir", path / "run"], "cannot be written")


def test_a_run_continues_from_the_checkpoint_before_a_damaged_one(
    run: RunDir, recipe: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["train", str(write(tmp_path / "recipe.yaml", recipe)), "--run-dir", str(run.path)]
    damages: dict[str, Callable[[Path], object]] = {
        "no readable manifest": lambda newest: (newest / "manifest.json").write_text("{"),
        "it lists no files": lambda newest: (newest / "manifest.json").write_text("[]"),
        "manifest.json is missing": lambda newest: (newest / "manifest.json").unlink(),
        "does not have the hash": lambda newest: flip_a_bit(next((newest / "dcp").glob("*.distcp"))),
    }
    run.state.write_text("{")
    run.best.write_bytes(b"\xff\xfe")
    with run.metrics.open("a") as file:
        file.write('{"kind": "st')
    for text, damage in damages.items():
        caplog.clear()
        damage(run.step_dir(2))
        assert cli.main(arguments) == 0
        assert text in caplog.text and "resumed at step 1 of 2" in caplog.text
        assert run.steps() == [1, 2]


def test_a_damaged_best_checkpoint_is_never_the_result(
    run: RunDir, recipe: dict[str, Any], tmp_path: Path, refuses: Refuses, caplog: pytest.LogCaptureFixture
) -> None:
    run.best.write_text("step_00000001\n")
    newest = json.loads((run.step_dir(2) / "manifest.json").read_text())
    (run.step_dir(2) / "manifest.json").write_text(json.dumps(newest | {"is_best": False}))
    flip_a_bit(run.step_dir(1) / "adapter" / "adapter_model.safetensors")
    path = write(tmp_path / "recipe.yaml", recipe)
    refuses(["train", path, "--run-dir", run.path], "the best checkpoint is damaged", status=EXIT_FAILURE)
    shutil.rmtree(run.adapter)
    assert cli.main(["generate", str(run.path), "--prompt", "a", "--max-new-tokens", "1"]) == 0
    assert "Trying another checkpoint" in caplog.text


def test_checkpoints_without_their_recipe_are_not_continued(
    run: RunDir, recipe: dict[str, Any], tmp_path: Path, refuses: Refuses
) -> None:
    run.recipe.unlink()
    path = write(tmp_path / "recipe.yaml", recipe)
    refuses(["train", path, "--run-dir", run.path], "recipe.yaml: no such file", "put it back")


def test_a_checkpoint_that_does_not_fit_on_the_disk_is_a_failure_with_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    import torch.distributed.checkpoint as dcp

    from trainer.checkpoint.manager import CheckpointManager
    from trainer.config import CheckpointConfig
    from trainer.errors import PacktrainError
    from trainer.launchers import World
    from trainer.processes import Processes

    write_data = dcp.FileSystemWriter.write_data

    def is_full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    alone = Processes(World(), torch.device("cpu"))
    manager = CheckpointManager(RunDir(tmp_path), CheckpointConfig(), {}, alone, lambda folder, saved: None)
    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", is_full)
    with pytest.raises(PacktrainError, match="could not be saved.*No space left"):
        manager.save(1, {"a": torch.ones(2)}, {})
        manager.wait()
    assert RunDir(tmp_path).steps() == []
    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", write_data)
    manager.save(1, {"a": torch.ones(2)}, {})
    manager.close()
    assert RunDir(tmp_path).steps() == [1]
    with pytest.raises(PacktrainError, match="cannot be read into this model"):
        manager.open(1).load({"a": torch.ones(2), "b": torch.ones(2)})


# ------------------------------------------------------------------------------------------------------------ inference


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{", "not JSON"),
        ("[1]", "prompt or messages"),
        ('{"prompt": null}', "content is not text"),
        ('{"prompt": 5}', "content is not text"),
        ('{"prompt": "\\ud83d"}', "half a character"),
        ('{"messages": "a"}', "not a list of messages"),
        ('{"messages": []}', "not a list of messages"),
        ('{"messages": [{"role": "user"}]}', "content is not text"),
        ('{"messages": [5]}', "a message has no role"),
        ('{"prompt": "a", "max_new_tokens": "5"}', "max_new_tokens: found '5'"),
        ('{"prompt": "a", "max_new_tokens": true}', "max_new_tokens: found True"),
        ('{"prompt": "a", "temperature": NaN}', "temperature: found nan"),
        ('{"prompt": "a", "top_p": 0}', "top_p: found 0"),
        ('{"prompt": "a", "num_beams": [1]}', "num_beams: found [1]"),
        ('{"prompt": "a", "top_k": 1}', "unknown key 'top_k'"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "an answer without a question"),
    ],
)
def test_a_wrong_line_of_prompts_is_named(line: str, text: str, tmp_path: Path, refuses: Refuses) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n' + line + "\n")
    refuses(["generate", tmp_path, "--prompts", prompts], f"{prompts}:2: ", text)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens: found 0"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature: found -1.0"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature: found nan"),
        (["--prompt", "a", "--temperature", "1e-38"], "--temperature: found 1e-38"),
        (["--prompt", "a", "--top-p", "2"], "--top-p: found 2.0"),
        (["--prompt", "a", "--num-beams", "0"], "--num-beams: found 0"),
        (["--prompt", "a", "--seed", "-1"], "--seed"),
        (["--prompt", "\udcff"], "half a character"),
        (["--prompts", "."], "is no file"),
        (["--prompts", __file__], "no ending that tells its format"),
        ([], "no prompt is given"),
    ],
)
def test_wrong_options_of_generate(options: list[str], text: str, tmp_path: Path, refuses: Refuses) -> None:
    refuses(["generate", tmp_path, *options], text)


def test_other_wrong_options(finished_run: Path, recipe: dict[str, Any], tmp_path: Path, refuses: Refuses) -> None:
    refuses(["chat", tmp_path, "--max-new-tokens", "0"], "--max-new-tokens: found 0")
    refuses(["evaluate", finished_run, "--max-rows", "0"], "--max-rows")
    refuses(["preprocess", write(tmp_path / "recipe.yaml", recipe), "--show", "-1"], "--show")
    refuses(["init", "--model", "m", "--data", "d", "--gpu-memory", "-5", "--out", tmp_path / "new"], "--gpu-memory")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["train", "r.yaml", "--gpus"],
        ["plan", "r.yaml", "--gpus"],
        ["preprocess", "r.yaml", "--show"],
        ["logs", "run", "--lines"],
        ["generate", "run", "--prompt", "a", "--max-new-tokens"],
        ["generate", "run", "--prompt", "a", "--num-beams"],
        ["chat", "run", "--seed"],
        ["evaluate", "run", "--max-rows"],
        ["serve", "run", "--gpus"],
        ["serve", "run", "--port"],
        ["serve", "run", "--max-length"],
    ],
    ids=lambda words: f"{words[0]} {words[-1]}",
)
def test_no_number_is_rounded(words: list[str], refuses: Refuses) -> None:
    for value in ("1.5", "2.0", "two"):
        message = refuses([*words, value])
        assert message.splitlines() == [
            f"{words[-1]}: found '{value}'",
            "  allowed: a whole number",
            "  fix: write digits alone, such as 4",
        ]


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["generate", "s3://bucket/run", "--prompt", "a"], "path: s3://bucket/run"),
        (["evaluate", ".", "s3://bucket/run"], "path: s3://bucket/run"),
        (["merge", ".", "--out=s3://bucket/run"], "--out: s3://bucket/run"),
        (["train", "r.yaml", "--run-dir", "s3://bucket/run"], "--run-dir: s3://bucket/run"),
        (["init", "--model", "s3://bucket/run", "--data", "d"], "--model: s3://bucket/run"),
        (["init", "--model", "m", "--data", "s3://bucket/run", "--gpu-memory", "24"], "--data: s3://bucket/run"),
    ],
)
def test_an_address_is_no_path(
    words: list[str], where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: Refuses
) -> None:
    monkeypatch.chdir(tmp_path)
    refuses(words, f"{where} is an address\n  allowed: a path on this host", "  fix: ")
    assert not list(tmp_path.iterdir())


def test_a_file_of_prompts_without_any(tmp_path: Path, refuses: Refuses) -> None:
    for name in ("none.txt", "none.jsonl"):
        (tmp_path / name).write_text("\n \n")
        refuses(["generate", tmp_path, "--prompts", tmp_path / name], f"--prompts: {tmp_path / name} has no prompt")


def test_a_line_that_the_template_refuses_is_named(toy_model_dir: Path, tmp_path: Path, refuses: Refuses) -> None:
    model, prompts = shutil.copytree(toy_model_dir, tmp_path / "model"), tmp_path / "prompts.jsonl"
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    template = model / "chat_template.jinja"
    template.write_text(refusal + template.read_text())
    prompts.write_text('{"prompt": "a"}\n{"messages": [{"role": "system", "content": "a"}]}\n')
    refuses(["generate", model, "--prompts", prompts], f"{prompts}:2: the template refuses it: no system message")


def test_an_answer_that_a_conversation_ends_with_is_its_reference(
    finished_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    question = {"role": "user", "content": "Sort d c b a."}
    rows = [[question], [question, {"role": "assistant", "content": "a b c d"}]]
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    options = ["--prompts", prompts, "--max-new-tokens", "8", "--out", out]
    assert cli.main(["generate", str(finished_run), *map(str, options)]) == 0
    assert "1 of 2 end with an answer" in caplog.text
    asked, answered = (json.loads(line) for line in out.read_text().splitlines())
    assert answered == asked | {"reference": "a b c d"}


def test_prompts_keep_every_character(finished_run: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('\ufeff{"prompt": "a\u2028b"}\n{"prompt": ""}\n', encoding="utf-8")
    options = ["--prompts", prompts, "--max-new-tokens", "1", "--out", tmp_path / "answers.jsonl"]
    assert cli.main(["generate", str(finished_run), *map(str, options)]) == 0
    answers = (tmp_path / "answers.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["prompt"] for line in answers[:2]] == ["a\u2028b", ""]


def test_an_empty_prompt_is_shown(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", str(finished_run), "--prompt", "", "--max-new-tokens", "1"]) == 0
    assert capsys.readouterr().out.startswith("> \n")


def test_chat_without_input_ends(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert cli.main(["chat", str(finished_run)]) == 0


@pytest.mark.parametrize("command", [["generate", "--prompt", "a"], ["chat"], ["evaluate"], ["merge"], ["verify"]])
def test_a_folder_without_a_model(command: list[str], tmp_path: Path, refuses: Refuses) -> None:
    name, *options = command
    refuses([name, tmp_path, *options], str(tmp_path))
    refuses([name, tmp_path / "missing", *options], "missing")


def test_a_base_that_changed_after_training_does_not_answer(
    recipe: dict[str, Any], base: Path, tmp_path: Path, refuses: Refuses
) -> None:
    run = tmp_path / "run"
    path = write(tmp_path / "recipe.yaml", recipe, model={"path": str(base)}, export={"merge": False})
    assert cli.main(["train", str(path), "--run-dir", str(run)]) == 0
    commands: list[list[Any]] = [
        ["generate", run, "--prompt", "a"],
        ["evaluate", run],
        ["merge", run, "--out", tmp_path / "out"],
        ["train", path, "--run-dir", run],
    ]
    _set_weight(0.5)(base)
    for command in commands:
        refuses(command, "content_hash" if command[0] == "train" else "content hash", "trained")
    shutil.rmtree(base)
    for command in commands:
        refuses(command, "model.path", "no folder")
    assert not (tmp_path / "out").exists()


def _missing_tensor(folder: Path) -> None:
    edit_tensors(folder / WEIGHTS, lambda tensors: tensors.pop("model.norm.weight"))


BROKEN_MODELS: dict[str, tuple[Change, str]] = {
    "missing tensor": (_missing_tensor, "no tensor model.norm.weight"),
    "truncated": (lambda folder: (folder / WEIGHTS).write_bytes(b"0" * 50), "cannot be loaded"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "cannot be loaded"),
    "tokenizer larger than the embeddings": (_cut_vocabulary, "has 300 embeddings"),
}


@pytest.mark.parametrize("damage", BROKEN_MODELS)
def test_a_broken_model_does_not_answer(damage: str, base: Path, refuses: Refuses) -> None:
    change, text = BROKEN_MODELS[damage]
    change(base)
    refuses(["generate", base, "--prompt", "a"], text)


CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
BROKEN_ADAPTERS: dict[str, Change] = {
    "config no json": lambda folder: (folder / CONFIG).write_text("{"),
    "config of a list": lambda folder: (folder / CONFIG).write_text("[]"),
    "base gone": lambda folder: edit_json(folder / CONFIG, base_model_name_or_path="/nowhere/at/all"),
    "base not named": lambda folder: edit_json(folder / CONFIG, base_model_name_or_path=None),
    "another method": lambda folder: edit_json(folder / CONFIG, peft_type="IA3"),
    "another rank": lambda folder: edit_json(folder / CONFIG, r=5),
    "truncated": lambda folder: (folder / ADAPTER).write_bytes(b"0" * 50),
    "no weights": lambda folder: (folder / ADAPTER).unlink(),
}


@pytest.mark.parametrize("damage", BROKEN_ADAPTERS)
def test_a_broken_adapter_neither_answers_nor_merges(
    damage: str, finished_run: Path, tmp_path: Path, refuses: Refuses
) -> None:
    adapter = shutil.copytree(finished_run / "adapter", tmp_path / "adapter")
    (adapter / "manifest.json").unlink()  # PEFT's files alone
    BROKEN_ADAPTERS[damage](adapter)
    refuses(["generate", adapter, "--prompt", "a"])
    refuses(["merge", adapter, "--out", tmp_path / "out"])
    assert not (tmp_path / "out").exists()


def test_an_adapter_with_a_flipped_bit_neither_answers_nor_merges(run: RunDir, refuses: Refuses) -> None:
    said = (str(run.adapter / ADAPTER), "does not have the hash its manifest says", f"delete {run.adapter}")
    flip_a_bit(run.adapter / ADAPTER)
    refuses(["generate", run.path, "--prompt", "a"], *said)
    refuses(["merge", run.path, "--out", run.path.parent / "out"], *said)
    assert not list(run.path.glob("out*"))
    shutil.rmtree(run.adapter)
    checkpoint = run.step_dir(run.steps()[-1])
    flip_a_bit(checkpoint / "adapter" / ADAPTER)
    refuses(["merge", checkpoint, "--out", run.path.parent / "out"], "does not have the hash")


def test_missing_adapter_weights_are_no_adapter(finished_run: Path, tmp_path: Path, refuses: Refuses) -> None:
    adapter = shutil.copytree(finished_run / "adapter", tmp_path / "adapter")
    (adapter / "manifest.json").unlink()
    edit_tensors(adapter / ADAPTER, lambda tensors: [tensors.pop(name) for name in list(tensors) if "q_proj" in name])
    refuses(["generate", adapter, "--prompt", "a"], "missing adapter keys")


# --------------------------------------------------------------------------------------------------------------- export


def test_verify_finds_what_changed(run: RunDir, refuses: Refuses) -> None:
    (run.merged / "extra.safetensors").write_bytes(b"")
    refuses(["verify", run.path], "extra.safetensors is not of this merge", status=EXIT_FAILURE)
    flip_a_bit(run.merged / WEIGHTS)
    refuses(["verify", run.path], f"{WEIGHTS} does not have the hash", status=EXIT_FAILURE)
    (run.merged / "manifest.json").write_text("[]")
    refuses(["verify", run.path], "no readable manifest", status=EXIT_FAILURE)


def test_outputs_that_cannot_be_written(finished_run: Path, tmp_path: Path, refuses: Refuses) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    refuses(["merge", finished_run, "--out", file], "exists")
    refuses(["merge", finished_run, "--out", file / "out"], str(file))
    refuses(["generate", finished_run, "--prompt", "a", "--max-new-tokens", "1", "--out", file / "out"], str(file))
    refuses(["evaluate", finished_run, "--no-exact-match", "--json", tmp_path], "Is a directory")
    refuses(["init", "--model", "m", "--data", "d", "--out", file / "out"], str(file))
    assert file.read_text() == "mine"


def test_a_merge_lies_where_no_training_writes(
    run: RunDir, recipe: dict[str, Any], tmp_path: Path, refuses: Refuses
) -> None:
    shutil.rmtree(run.merged)
    shutil.rmtree(run.adapter)  # as of a run that is still training: a checkpoint's is merged
    (tmp_path / "link").symlink_to(run.path)
    before = sorted(run.path.rglob("*"))
    checkpoint = run.step_dir(2).relative_to(run.path)
    places = ["adapter", "adapter/merged", "checkpoints/x", f"{checkpoint}/x", "logs/x", "model", "model/x", "new"]
    places += ["merged.unfinished", "merged-x.unfinished", "../link/adapter", "../link/tensorboard/x/y"]
    for place in places:
        refuses(["merge", run.path, "--out", run.path / place], "--out: ", "allowed: ", "fix: ")
    assert sorted(run.path.rglob("*")) == before

    original = run.path / "merged-original"
    assert cli.main(["merge", str(run.path), "--base", "original", "--no-verify", "--out", str(original)]) == 0
    path = write(tmp_path / "recipe.yaml", recipe)
    assert cli.main(["train", str(path), "--run-dir", str(run.path), "--export.verify", "false"]) == 0
    assert run.merged.is_dir() and find_damage(original) is None


def test_a_merge_lies_neither_in_its_base_nor_in_its_adapter(
    recipe: dict[str, Any], run: RunDir, base: Path, tmp_path: Path, refuses: Refuses
) -> None:
    edit_json(run.adapter / "adapter_config.json", base_model_name_or_path=str(base))
    adapter = run.adapter.rename(tmp_path / "adapter")
    (tmp_path / "link").symlink_to(base)
    for place in (base / "x", tmp_path / "link" / "x" / "y", adapter / "merged"):
        refuses(["merge", adapter, "--out", place], f"--out: {place} lies inside")
    assert not list(tmp_path.rglob("*.safetensors.unfinished")) and not (base / "x").exists()


def test_an_out_that_cannot_become_a_folder_is_refused_before_the_work(run: RunDir, refuses: Refuses) -> None:
    flip_a_bit(run.adapter / "adapter_model.safetensors")  # which reading it would find
    nowhere, file = run.path.parent / "nowhere", run.path.parent / "file"
    nowhere.symlink_to("/not/there")
    file.write_text("mine")
    refuses(["merge", run.path, "--out", nowhere], f"--out: {nowhere} is a link to /not/there", "fix: ")
    for parent in (nowhere, file):
        refuses(["merge", run.path, "--out", parent / "a" / "b"], f"--out: {parent}, ", "is no folder")
    refuses(["merge", run.path, "--out", "/proc/sys/a"], "--out: /proc/sys cannot be written")  # not even by root


def test_a_merge_that_is_there_already_says_of_what(run: RunDir, refuses: Refuses) -> None:
    text = f"{run.merged} exists: merged from this adapter onto the dequantized base, "
    refuses(["merge", run.path], text + "verified\n", "use it")
    shutil.rmtree(run.merged)
    assert cli.main(["merge", str(run.path), "--no-verify"]) == 0
    refuses(["merge", run.path], text + "not verified\n", f"`packtrain verify {run.merged}`")
    assert cli.main(["verify", str(run.path)]) == 0
    refuses(["merge", run.path], text + "verified\n")
    edit_tensors(run.adapter / "adapter_model.safetensors", lambda tensors: [t.mul_(2) for t in tensors.values()])
    (run.adapter / "manifest.json").unlink()
    refuses(["merge", run.path], "merged from another adapter", "name another --out")


@contextlib.contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """The system writes no larger ones, as if a quota were used up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_disk_too_full_for_the_result_ends_a_training_that_goes_on(
    method: str, recipe: dict[str, Any], tmp_path: Path, refuses: Refuses
) -> None:
    """At first there is room for the checkpoints, and not for what is made of them."""
    full = {"adapter": None, "quantization": None, "export": {"merge": False}}
    run, changes = RunDir(tmp_path / "run"), full if method == "full" else {}
    path = write(tmp_path / "recipe.yaml", recipe, **changes)
    command = ["train", str(path), "--run-dir", str(run.path)]
    result = run.merged if method == "lora" else run.model
    assert cli.main(command) == 0
    shutil.rmtree(result)
    with files_of_at_most(300_000):
        file = result.with_name(result.name + ".unfinished") / WEIGHTS
        refuses(
            command, f"{file}: File too large: {result.name} takes somewhat more than", "are free", "fix: make room"
        )
    assert run.read_state()["state"] == "failed" and run.steps()
    assert not list(run.path.glob("*.unfinished*"))
    assert cli.main(command) == 0
    assert find_damage(result) is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, of which a folder's tensors take the half."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_a_merge_fills_is_named_with_what_it_takes(run: RunDir, small_disk: Path, refuses: Refuses) -> None:
    """Where even the weights do not fit, where they do and the rest does not, and where it is the weights after all."""
    fill, out = small_disk / "fill", small_disk / "out"
    size = (run.merged / WEIGHTS).stat().st_size
    for left, file in ((size // 2, "out.unfinished: "), (size + 6_000, "out.unfinished/"), (size, "out.unfinished")):
        fill.unlink(missing_ok=True)
        fill.write_bytes(bytes(2**20 - left // 4096 * 4096))
        texts = [f"{small_disk}/{file}", ": No space left on device: out takes ", "are free", "fix: make room"]
        message = refuses(["merge", run.path, "--out", out], *texts)
        assert len(message.splitlines()) == 2 and "Errno" not in message
        assert [path.name for path in small_disk.iterdir()] == ["fill"]
    fill.unlink()
    assert cli.main(["merge", str(run.path), "--out", str(out), "--no-verify"]) == 0


def test_what_the_system_refuses_has_a_name_and_a_status() -> None:
    wrong = explain_os_error(FileNotFoundError(errno.ENOENT, "No such file or directory", "a.yaml"))
    assert wrong.exit_status == EXIT_USER_ERROR
    assert str(wrong).startswith("a.yaml: No such file or directory")
    full = explain_os_error(OSError(errno.ENOSPC, "No space left on device"))
    assert full.exit_status == EXIT_FAILURE
    assert "No space left on device" in str(full)
