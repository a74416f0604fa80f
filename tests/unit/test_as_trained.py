"""What is merged, asked and served is what was trained, whatever its base and its files have become since."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from launch import cli
from tests.unit.export_toys import make_run, two_step_recipe
from tests.unit.test_bad_input import edit_json, edit_tensors, flip_a_bit, write
from trainer.checkpoint.layout import RunDir, find_damage, hash_file, read_manifest, write_manifest
from trainer.checkpoint.result import find_result
from trainer.config import RunConfig
from trainer.evaluate import evaluate, find_candidates
from trainer.export.merge import merge_adapter
from trainer.export.verify import verify_export
from trainer.generate import load_for_inference

pytestmark = pytest.mark.usefixtures("log_to_this_test")
Change = Callable[[Path], object]
Run = Callable[..., str]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CHAT = [{"role": "user", "content": "Sort d c b a."}, {"role": "assistant", "content": "a b c d"}]
AS_TRAINED = "is the model that was trained"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, toy_model_dir: Path, toy_rows_file: Path) -> Path:
    """A folder with ``base/``, ``run/``, trained in 4 bits by a relative path, and ``reference/``, its merge."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(toy_model_dir, folder / "base")
    recipe = two_step_recipe("base", toy_rows_file, merge=False)
    with chdir(folder):
        assert cli.main(["train", str(write(folder / "recipe.yaml", recipe)), "--run-dir", "run"]) == 0
        assert cli.main(["merge", "run", "--out", "reference"]) == 0
    return folder


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A test's own copy, and the working directory."""
    folder = shutil.copytree(trained, tmp_path / "place")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def packtrain(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command that must end with `status`; returns what it printed or, of a failure, its message."""

    def run(*arguments: Any, status: int = 0) -> str:
        capsys.readouterr()
        assert cli.main([str(argument) for argument in arguments]) == status
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return said.err if status else said.out

    return run


def _swap_ids(base: Path) -> None:
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = sorted(vocabulary, key=vocabulary.get)[200:202]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))


def _edit_template(change: Callable[[str], str]) -> Change:
    def edit(base: Path) -> None:
        file = base / "chat_template.jinja"
        before = file.read_text()
        file.write_text(change(before))
        assert file.read_text() != before

    return edit


SINCE: dict[str, Change] = {
    "second BOS": _edit_template(lambda text: "{{ bos_token }}" + text),
    "another role": _edit_template(lambda text: text.replace("<|' + ", "<|my' + ").replace("<|{{", "<|my{{")),
    "no template": lambda base: (base / "chat_template.jinja").unlink(),
    "another end token": lambda base: edit_json(base / "tokenizer_config.json", eos_token="<|pad|>"),
    "ids swapped": _swap_ids,
    "other ends": lambda base: (base / "generation_config.json").write_text('{"eos_token_id": 7}'),
    "no tokenizer": lambda base: [file.unlink() for file in base.glob("tokenizer*")],
}


@pytest.mark.parametrize("change", SINCE)
def test_what_the_base_has_become_since_is_not_taken(change: str, place: Path, trained: Path, packtrain: Run) -> None:
    SINCE[change](place / "base")
    assert AS_TRAINED in packtrain("merge", "run")
    wanted: Any = AutoTokenizer.from_pretrained(trained / "base")
    found: Any = AutoTokenizer.from_pretrained(place / "run" / "merged")
    text = wanted.apply_chat_template(CHAT, tokenize=False)
    assert found.apply_chat_template(CHAT, tokenize=False) == text and text.count(wanted.bos_token) == 1
    assert found(text).input_ids == wanted(text).input_ids
    assert (found.eos_token, found.pad_token) == (wanted.eos_token, wanted.pad_token)
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (place / "run/merged" / name).read_bytes() == (trained / "reference" / name).read_bytes()
    # on the same tokens, with the same of them trained
    of = [read_manifest(folder)["validation_loss"] for folder in (place / "run/merged", trained / "reference")]
    assert of[0] == of[1]
    prompt = wanted.apply_chat_template(CHAT[:1], add_generation_prompt=True)
    assert load_for_inference(place / "run").prompt_ids(CHAT[:1]) == list(prompt["input_ids"])


def test_a_base_whose_config_computes_otherwise_is_refused(place: Path, packtrain: Run) -> None:
    packtrain("merge", "run")
    config = json.loads((place / "base/config.json").read_text())
    edit_json(place / "base/config.json", eos_token_id=7, use_cache=False)
    assert AS_TRAINED in packtrain("verify", "run")
    edit_json(place / "base/config.json", rms_norm_eps=0.01)
    commands = [["merge", "run", "--out", "out"], ["verify", "run"], ["generate", "run", "--prompt", "a"]]
    for command in [*commands, ["serve", "run/adapter", "--print"], ["evaluate", "run"]]:
        said = packtrain(*command, status=2)
        assert f"rms_norm_eps is 0.01, and was {config['rms_norm_eps']!r} in training" in said
    assert "another base model" in packtrain("train", "recipe.yaml", "--run-dir", "run", status=2)


def test_a_template_file_that_was_edited_since(tmp_path: Path, toy_recipe: Callable[..., RunConfig]) -> None:
    file = tmp_path / "own.jinja"
    text = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}"
    file.write_text(text + "{% if add_generation_prompt %}[assistant]{% endif %}")
    run = make_run(tmp_path / "run", toy_recipe(adapter={"r": 4}, data={"template": str(file)}))
    merge_adapter(run, tmp_path / "before")
    losses = [verify_export(tmp_path / "before").validation]
    totals = [evaluate(find_candidates([run], None, "validation")[0], max_rows=2).total]

    file.write_text("{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>\n{% endfor %}")
    merge_adapter(run, tmp_path / "after")
    assert (tmp_path / "after/chat_template.jinja").read_text() == (tmp_path / "before/chat_template.jinja").read_text()
    losses.append(verify_export(tmp_path / "after").validation)
    totals += [
        evaluate(find_candidates([folder], None, "validation")[0], max_rows=2).total
        for folder in (run, tmp_path / "after")
    ]
    assert losses[0] == losses[1]
    assert totals[0] == totals[1] and totals[2].tokens == totals[0].tokens


@pytest.mark.parametrize("where", ["adapter", "checkpoints/step_00000001/adapter"])
def test_a_tokenizer_that_was_changed_in_the_adapter_is_refused(where: str, place: Path, packtrain: Run) -> None:
    file = place / "run" / where / "chat_template.jinja"
    file.write_text("{{ bos_token }}" + file.read_text())
    for command in (["merge", "--out", "out"], ["generate", "--prompt", "a"], ["evaluate"]):
        said = packtrain(command[0], file.parent, *command[1:], status=2)
        assert str(file) in said and "its manifest says" in said and "fix: copy it again" in said
    assert not (place / "out").exists()


@pytest.mark.parametrize("where", ["adapter", "checkpoints/step_00000002/adapter", "checkpoints/step_00000002"])
def test_a_copied_adapter_is_merged_as_in_its_run(where: str, place: Path, packtrain: Run) -> None:
    shutil.copytree(place / "run" / where, place / "lone")
    shutil.rmtree(place / "run")
    assert f"{AS_TRAINED}" in packtrain("merge", "lone", "--out", "out")
    assert read_manifest(place / "out")["merged_onto"] == "dequantized"
    wanted, found = (load_file(place / name / "model.safetensors") for name in ("reference", "out"))
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    flip_a_bit(place / "base" / "model.safetensors")
    assert "content hash" in packtrain("merge", "lone", "--out", "other", status=2)


def test_an_old_checkpoint_copied_without_its_recipe_is_not_merged(place: Path, packtrain: Run) -> None:
    step = place / "run/checkpoints/step_00000002"
    _as_earlier_versions_wrote(step)
    shutil.copytree(step, place / "lone")
    assert "trained on a base in nf4, and its recipe is not here" in packtrain(
        "merge", "lone", "--out", "out", status=2
    )


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("lora_alpha", 64, "8, by the recipe"),
        ("use_rslora", True, "not set"),
        ("rank_pattern", {"q_proj": 4}, "not set"),
        ("alpha_pattern", {"q_proj": 64}, "not set"),
        ("fan_in_fan_out", True, "not set"),
    ],
)
def test_a_config_that_the_recipe_did_not_make_is_refused(
    field: str, value: Any, allowed: str, place: Path, packtrain: Run
) -> None:
    packtrain("merge", "run")
    edit_json(place / "run/adapter" / CONFIG, **{field: value})
    manifest = read_manifest(place / "run/merged")
    merged_of = manifest["adapter"]["files"]
    merged_of[CONFIG] = hash_file(place / "run/adapter" / CONFIG)  # as an earlier version merged it
    write_manifest(place / "run/merged", manifest)
    commands = [["merge", "run", "--out", "out"], ["verify", "run"], ["generate", "run/adapter", "--prompt", "a"]]
    for command in [*commands, ["serve", "run/adapter", "--print"], ["push", "run/adapter", "--repo", "a/b"]]:
        said = packtrain(*command, status=2)
        assert f"{CONFIG}: {field} {value}" in said and allowed in said, command


def test_on_the_original_base_it_is_not_said_to_be_what_was_trained(place: Path, packtrain: Run) -> None:
    for command in (["merge", "run", "--base", "original", "--out", "out"], ["verify", "out"]):
        said = packtrain(*command)
        assert AS_TRAINED not in said
        assert "the adapter on the original base, on which it was not trained: that was the base in nf4" in said
    assert "not the model that was trained" in " ".join((place / "out/README.md").read_text().split())
    edit_tensors(place / "out/model.safetensors", lambda tensors: tensors["model.norm.weight"].add_(1))
    write_manifest(place / "out", read_manifest(place / "out"))
    assert "is not the adapter on the original base" in packtrain("verify", "out", status=1)


def test_of_an_adapter_without_a_record_nothing_is_claimed(place: Path, packtrain: Run) -> None:
    lone = shutil.copytree(place / "run/adapter", place / "lone")
    (lone / "manifest.json").unlink()
    said = packtrain("merge", "lone", "--out", "out")
    assert AS_TRAINED not in said and "how it was trained is not recorded" in said


def test_the_base_is_found_where_it_was_in_training(
    place: Path, packtrain: Run, monkeypatch: pytest.MonkeyPatch, trained: Path
) -> None:
    run, lone = place / "run", shutil.copytree(place / "run/adapter", place / "lone")
    assert read_manifest(run / "adapter")["base"]["path"] == str(trained / "base")
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert AS_TRAINED in packtrain("merge", run, "--out", "out")
    flip_a_bit(Path(shutil.copytree(trained / "base", "base"), "model.safetensors"))
    said = packtrain("merge", run, "--out", "another", status=2)
    assert "content hash" in said and f"{run / 'recipe.yaml'} to {trained / 'base'}, where it was in training" in said
    shutil.rmtree("base")

    moved, gone = (trained / "base").rename(trained / "moved"), str(trained / "base")
    try:
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
        for folder, fix in ((run, run / "recipe.yaml"), (lone, lone / CONFIG)):
            for command in (["merge", "--out", "other"], ["generate", "--prompt", "a"], ["evaluate"]):
                said = packtrain(command[0], folder, *command[1:], status=2)
                assert "model.path" in said and f"no folder 'base' in {elsewhere}" in said
                assert f"nor {gone}, where it was in training" in said and str(fix) in said
        edit_json(lone / CONFIG, base_model_name_or_path=str(moved))
        (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("path: base", f"path: {moved}"))
        for number, folder in enumerate((run, lone)):
            assert AS_TRAINED in packtrain("merge", folder, "--out", f"moved_{number}")
    finally:
        moved.rename(trained / "base")


def test_an_adapter_of_another_run_is_not_this_runs(place: Path, packtrain: Run) -> None:
    """Trained to the same step, and copied into the run dir whole."""
    recipe = (place / "recipe.yaml").read_text().replace("lr: 0.01", "lr: 0.02")
    (place / "other.yaml").write_text(recipe)
    packtrain("train", "other.yaml", "--run-dir", "other")
    shutil.rmtree(place / "run/adapter")
    shutil.copytree(place / "other/adapter", place / "run/adapter")
    for command in (["merge"], ["generate", "--prompt", "a"], ["push", "--repo", "a/b", "--base", "a/b", "--dry-run"]):
        said = packtrain(command[0], "run", *command[1:], status=2)
        assert "run/adapter: made by another training than" in said and "fix: delete" in said
    assert AS_TRAINED in packtrain("merge", "other")
    shutil.rmtree(place / "run/adapter")
    assert AS_TRAINED in packtrain("merge", "run")


@pytest.mark.parametrize("kind", ["merged", "model"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "another template"])
def test_a_model_that_is_not_as_written_does_not_answer(
    kind: str, damage: str, place: Path, packtrain: Run, caplog: pytest.LogCaptureFixture
) -> None:
    folder = place / "reference"
    write_manifest(folder, read_manifest(folder) | {"kind": kind})
    file = folder / ("chat_template.jinja" if damage == "another template" else "model.safetensors")
    if damage == "flipped":
        flip_a_bit(file)
    elif damage == "truncated":
        os.truncate(file, 1000)
    else:
        file.write_text("{{ bos_token }}" + file.read_text())
    for command in (["generate", "--prompt", "a"], ["serve", "--print"], ["evaluate"]):
        said = packtrain(command[0], folder, *command[1:], status=2)
        assert str(file) in said and "fix: " in said
    (folder / "manifest.json").write_text('{"name": "of another program"}')
    if damage == "another template":
        packtrain("generate", folder, "--prompt", "a", "--max-new-tokens", "1")


def test_a_merge_of_a_run_that_goes_on_says_of_which_step_it_is(
    place: Path, packtrain: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDir(place / "run")
    shutil.rmtree(run.adapter)
    run.write_state("running", 2)
    run.best.write_text("step_00000001\n")
    taken = "the best checkpoint, step_00000001, of a run that was running"
    assert f"taken from {taken}" in packtrain("merge", "run", "--out", "best")
    assert f"- Adapter: {taken}" in (place / "best/README.md").read_text()
    assert read_manifest(place / "best")["step"] == 1

    flip_a_bit(run.step_dir(1) / "adapter" / WEIGHTS)
    assert "taken from the newest checkpoint, step_00000002" in packtrain("merge", "run", "--out", "newest")
    assert caplog.text.count("Trying another checkpoint") == 1

    shutil.rmtree(run.step_dir(2))
    said = packtrain("verify", "newest", status=2)
    assert f"its adapter is not at {run.step_dir(2) / 'adapter'}" in said and "made room for newer" in said
    assert f"packtrain merge {run.path} --out DIR" in said


def _as_earlier_versions_wrote(step: Path) -> None:
    """A checkpoint whose adapter is PEFT's files alone, of a base by the recipe's path."""
    for file in (step / "adapter").iterdir():
        if file.name not in (WEIGHTS, CONFIG):
            file.unlink()
    manifest = read_manifest(step)
    base = {name: value for name, value in manifest["base"].items() if name != "config"}
    write_manifest(step, manifest | {"base": base | {"path": "base"}})


def test_checkpoints_of_earlier_versions_go_on(place: Path, packtrain: Run, caplog: pytest.LogCaptureFixture) -> None:
    run = RunDir(place / "run")
    shutil.rmtree(run.adapter)
    for step in run.steps():
        _as_earlier_versions_wrote(run.step_dir(step))
    assert AS_TRAINED in packtrain("merge", "run", "--out", "out")
    assert caplog.text.count("has no tokenizer of its own") == 1
    packtrain("train", "recipe.yaml", "--run-dir", "run")
    assert "resumed at step 2 of 2" in caplog.text
    found = find_result(run.path)
    assert found.folder == run.adapter and find_damage(run.adapter) is None
    assert found.config is not None and (run.adapter / "chat_template.jinja").exists()


def test_a_tokenizer_without_its_words_is_named(place: Path, packtrain: Run) -> None:
    lone = shutil.copytree(place / "run/adapter", place / "lone")
    for name in ("manifest.json", "tokenizer.json"):
        (lone / name).unlink()
    for command in (["merge", "--out", "out"], ["generate", "--prompt", "a"]):
        said = packtrain(command[0], lone, *command[1:], status=2)
        assert f"{lone / 'tokenizer.json'}: no such file" in said and "fix: copy it there again" in said
