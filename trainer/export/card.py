"""The model card beside an adapter or a model: what is known of it, and fields left to fill for what is not.

It travels to strangers, so no path of this machine's is in it: of a local file or folder only the name is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.checkpoint.layout import UNFINISHED, RunDir, write_atomically
from trainer.config import RunConfig
from trainer.data.splits import all_sources
from trainer.metrics.trackers import read_metrics
from trainer.recipe_yaml import dump

if TYPE_CHECKING:
    from trainer.export.merge import MergeReport

CARD = "README.md"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
NOT_RECORDED = "not recorded"
MERGE_TITLE = "## Merge\n\n"  # as `_section` writes it
LICENCE = "# license: to fill in, by https://huggingface.co/docs/hub/repositories-licenses\n"
TO_FILL_IN = """\
## To fill in

- Licence: `license:` in the block at the top; the base model's and the data's licences apply
- Licence of the data:
- Intended use and limits:
- Contact:
"""


def write_card(folder: Path, record: dict[str, Any], run: RunDir | None, merged: MergeReport | None = None) -> None:
    """Writes `build_card` as ``README.md``. No manifest lists it: it is there to be edited.

    Args:
        folder: of an adapter or a model, under its own name or an unfinished one.
    """
    text = build_card(folder.name.removesuffix(UNFINISHED), record, run, merged)
    (folder / CARD).write_text(text, encoding="utf-8")


def write_merge_line(folder: Path, label: str, text: str) -> None:
    """Puts a line under the title ``Merge`` of a card, in place of the one of that label; a card without it stays."""
    card, start = folder / CARD, f"- {label}: "
    if not card.is_file():
        return
    lines = [line for line in card.read_text(encoding="utf-8").splitlines(True) if not line.startswith(start)]
    write_atomically(card, "".join(lines).replace(MERGE_TITLE, f"{MERGE_TITLE}{start}{text}\n", 1))


def build_card(name: str, record: dict[str, Any], run: RunDir | None, merged: MergeReport | None = None) -> str:
    """The card's text.

    Args:
        name: of the model, where no run has one.
        record: what its manifest says beside the files; ``kind`` is adapter, model or merged.
        run: where its name and losses come from.
        merged: what the merge did.
    """
    name = run.path.resolve().name if run else name
    config = RunConfig.model_validate(record["recipe"]) if record.get("recipe") else None
    sections = [
        f"---\n{dump(_front_matter(record, config))}{LICENCE}---\n",
        f"# {name}\n\n{_opening(record, config)}",
        _section("Base", _base(record, config)),
        _section("Data", _data(record, config)),
        _section("Training", _training(record, config, run)),
        _section("Merge", _merge(merged)),
        _recipe(config),
        TO_FILL_IN,
    ]
    return "\n".join(filter(None, sections))


def base_on_hub(record: dict[str, Any]) -> str | None:
    """The base's id on the hub; None where it is a folder of this machine's, or made of random numbers."""
    base = record.get("base") or {}
    path, revision = base.get("path"), base.get("revision", NOT_RECORDED)  # training records None of what is local
    return path if path and revision and HUB_ID.fullmatch(path) and not Path(path).exists() else None


def without_places(value: Any) -> Any:
    """A copy of a recipe's data in which local files and folders that are named in full have only their names left."""
    if isinstance(value, dict):
        return {key: without_places(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_places(item) for item in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~/")) else value


def _front_matter(record: dict[str, Any], config: RunConfig | None) -> dict[str, Any]:
    """As the hub reads it: https://huggingface.co/docs/hub/model-cards#model-card-metadata"""
    is_adapter = record["kind"] == "adapter"
    base = base_on_hub(record)
    tags = ["packtrain", *([config.method] if config else [])]
    relation = {"base_model": base, "base_model_relation": "adapter" if is_adapter else "finetune"}
    return {
        **(relation if base else {}),
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": [*tags, "lora"] if config and config.method == "qlora" else tags,
    }


def _opening(record: dict[str, Any], config: RunConfig | None) -> str:
    what = {"adapter": "An adapter (PEFT)", "merged": "An adapter merged into its base", "model": "A full fine-tune"}
    method = f" by {config.method}" if config else ""
    return f"{what[record['kind']]}, trained{method} with packtrain.\n"


def _base(record: dict[str, Any], config: RunConfig | None) -> Iterator[str]:
    base = record.get("base") or {}
    path = base.get("path") or (config.model.path if config else None)
    yield f"Model: `{without_places(path)}`" if path else f"Model: {NOT_RECORDED}"
    if base_on_hub(record):
        yield f"Revision: `{base.get('revision', NOT_RECORDED)}`"
    yield f"Content hash (blake3 of its weights' files): `{base.get('content_hash', NOT_RECORDED)}`"
    if config and config.quantization:
        double = ", double quantisation" if config.quantization.double_quant else ""
        yield f"Trained on its weights in {config.quantization.type}{double}"


def _data(record: dict[str, Any], config: RunConfig | None) -> Iterator[str]:
    if config is None:
        return
    hashes = record.get("sources") or {}
    for where, source in all_sources(config.data):
        revision = f", revision `{source.revision}`" if source.revision else ""
        found = hashes.get(where, NOT_RECORDED)
        yield f"`{where}`: `{without_places(source.path)}` ({source.format}){revision}, content hash (blake3) `{found}`"
    yield f"Fingerprint of all tokens, labels and packs: `{record.get('data', NOT_RECORDED)}`"
    yield f"Template: `{_one_line(without_places(config.data.template))}`; trained on: {config.data.train_on}"


def _training(record: dict[str, Any], config: RunConfig | None, run: RunDir | None) -> Iterator[str]:
    if config is None:
        return
    adapter = config.adapter
    yield f"Method: {config.method}" + (f", r {adapter.r}, alpha {adapter.alpha:g}" if adapter else "")
    yield f"Optimizer: {config.optim.name}, lr {config.optim.lr:g}, schedule {config.schedule.name}"
    yield f"Rows of at most {config.data.pack_length:,} tokens"
    if "step" in record:
        yield f"Weights of step {record['step']}"
    # A loss that was not a number is null there: it is no figure for a card.
    lines = [line for line in read_metrics(run.metrics) if line.get("loss") is not None] if run else []
    if steps := [line for line in lines if line["kind"] == "step"]:
        yield f"Training loss at step {steps[-1]['step']}: {steps[-1]['loss']:.4f}"
    if evaluations := [line for line in lines if line["kind"] == "eval"]:
        best = min(evaluations, key=lambda line: line["loss"])
        yield f"Lowest validation loss: {best['loss']:.4f} at step {best['step']}"


def _merge(merged: MergeReport | None) -> Iterator[str]:
    if merged is None:
        return
    weights = {"dequantized": "quantised weights it was trained on, dequantised", "original": "16- or 32-bit weights"}
    yield f"Merged onto the base's {weights[merged.base]}: {merged.changed} of {merged.tensors} tensors changed"
    if merged.not_trained_on:
        yield (
            f"The adapter was trained on the base in {merged.not_trained_on}, not on these weights: this is not the "
            "model that was trained, and answers otherwise"
        )
    if merged.checkpoint:
        yield f"Adapter: {merged.checkpoint}"
    if merged.untrained:
        yield f"Modules whose adapter is zero: {merged.untrained}"


def _recipe(config: RunConfig | None) -> str:
    """The whole of it, but for `slurm`: that is a cluster's and its users' affair, secrets included."""
    if config is None:
        return ""
    text = dump(without_places(config.model_dump(mode="json", exclude={"slurm"})))
    return f"## Recipe\n\nResolved; local places and the `slurm` section are left out.\n\n```yaml\n{text}```\n"


def _section(title: str, lines: Iterator[str]) -> str:
    listed = "".join(f"- {line}\n" for line in lines)
    return f"## {title}\n\n{listed}" if listed else ""


def _one_line(text: str) -> str:
    return text if text.isprintable() and len(text) <= 80 else "Jinja, see the recipe"
