"""The model card: what it says of a training is what was trained, and nothing on it is of this machine."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from blake3 import blake3

from trainer.checkpoint.layout import RunDir, read_manifest, write_manifest
from trainer.config import RunConfig
from trainer.export.card import build_card
from trainer.export.merge import merge_adapter
from trainer.run import train

Recipe = Callable[..., RunConfig]
BASE = {"path": "meta-llama/Llama-2-7b-hf", "revision": "c" * 40, "content_hash": "d" * 64}


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def recipe_on(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])


@pytest.mark.parametrize("adapter", [None, {"r": 4}])
def test_a_training_ends_with_a_card(
    adapter: Any, tmp_path: Path, toy_recipe: Recipe, toy_rows_file: Path, toy_model_dir: Path
) -> None:
    rows = tmp_path / "private" / "chats.jsonl"
    rows.parent.mkdir()
    shutil.copy(toy_rows_file, rows)
    source = {"path": str(rows), "format": "messages"}
    other = {"path": str(toy_rows_file.parent / "*.jsonl"), "format": "messages"}
    config = toy_recipe(
        adapter=adapter,
        data={"train": [source, other]},
        train={"max_steps": 2},
        slurm={"env": {"WANDB_API_KEY": "0123456789abcdef"}, "account": "secretive"},
    )
    run = RunDir(tmp_path / "hum")
    train(config, run.path)
    card = ((run.adapter if adapter else run.model) / "README.md").read_text()

    assert card.splitlines()[0] == "---" and "# hum" in card.splitlines()
    assert blake3(rows.read_bytes()).hexdigest() in card
    assert read_manifest(run.step_dir(2))["sources"].keys() == {"data.train[0]", "data.train[1]"}
    assert read_manifest(run.step_dir(2))["base"]["content_hash"] in card
    assert "Weights of step 2" in card and "Training loss at step 2" in card and "Lowest validation loss" in card
    assert not any(str(place) in card for place in (tmp_path, toy_rows_file.parent, toy_model_dir))
    assert "0123456789abcdef" not in card and "secretive" not in card
    written = recipe_on(card)
    assert [source["path"] for source in written["data"]["train"]] == ["chats.jsonl", "*.jsonl"]
    assert written["optim"] == config.model_dump(mode="json")["optim"]
    assert set(written) == set(config.model_dump()) - {"slurm"}
    metadata = front_matter(card)
    assert "base_model" not in metadata  # the toy is a folder
    assert metadata["library_name"] == ("peft" if adapter else "transformers")
    assert metadata["pipeline_tag"] == "text-generation" and "packtrain" in metadata["tags"]

    if adapter:
        report = merge_adapter(run.path, tmp_path / "out")
        merged = (tmp_path / "out" / "README.md").read_text()
        assert blake3(rows.read_bytes()).hexdigest() in merged
        assert f"{report.changed} of {report.tensors} tensors changed" in merged


@pytest.mark.parametrize(("kind", "relation"), [("adapter", "adapter"), ("merged", "finetune"), ("model", "finetune")])
def test_a_base_of_the_hub_is_in_the_metadata(kind: str, relation: str, toy_recipe: Recipe) -> None:
    config = toy_recipe(model={"path": BASE["path"]}, adapter=None if kind == "model" else {"r": 4})
    card = build_card("hum", {"kind": kind, "base": BASE, "recipe": config.model_dump(mode="json")}, None)
    metadata = front_matter(card)
    assert metadata["base_model"] == BASE["path"] and metadata["base_model_relation"] == relation
    assert BASE["revision"] in card and BASE["content_hash"] in card


@pytest.mark.parametrize("path", ["/home/me/models/llama", "models/llama", "./llama"])
def test_a_folder_is_no_base_of_the_hub(path: str, toy_recipe: Recipe) -> None:
    """Not even one that is gone, or looks like an id: the training recorded that no commit of the hub's was read."""
    record = {"kind": "adapter", "base": {**BASE, "path": path, "revision": None}, "recipe": None}
    card = build_card("hum", record, None)
    assert "base_model" not in front_matter(card) and "/home" not in card and "llama" in card


def test_editing_the_card_is_no_damage(tmp_path: Path, toy_recipe: Recipe) -> None:
    from trainer.checkpoint.layout import find_damage
    from trainer.export.card import write_card

    (tmp_path / "config.json").write_text("{}")
    record: dict[str, Any] = {"kind": "model", "recipe": None}
    write_manifest(tmp_path, record)
    write_card(tmp_path, record, None)
    (tmp_path / "README.md").write_text("license: mit")
    assert find_damage(tmp_path) is None
    (tmp_path / "config.json").write_text("[]")
    assert find_damage(tmp_path)
