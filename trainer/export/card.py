"""The model card that travels with a merged model: what is known, and fields left to fill for what is not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trainer.checkpoint.layout import UNFINISHED, RunDir, newest_manifest
from trainer.checkpoint.result import Result
from trainer.metrics.trackers import read_metrics

if TYPE_CHECKING:
    from trainer.export.merge import MergeReport

CARD, TO_FILL_IN = "README.md", "## To fill in"


def write_card(folder: Path, result: Result, report: MergeReport) -> None:
    """Writes ``README.md`` into a merged model's folder."""
    config, run_dir = result.config, result.run_dir
    base = config.model.path if config else "as adapter_config.json says"
    on_hub = config is not None and not Path(config.model.path).exists()
    lines = [
        "---",
        *([f"base_model: {base}"] if on_hub else []),
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "license: # to fill in; the base model's licence applies",
        "---",
        "",
        f"# {folder.name.removesuffix(UNFINISHED) if run_dir is None else run_dir.path.resolve().name}",
        "",
        "Trained and merged with packtrain. `manifest.json` has the hash of every file.",
        "",
        f"- Base: `{base}`, content hash `{(result.base or {}).get('content_hash', 'not recorded')}`",
        f"- Merged onto the {report.base} weights: {report.changed} of {report.tensors} tensors changed",
    ]
    if config:
        sources = ", ".join(f"`{source.path}` ({source.format})" for source in config.data.train)
        lines += [
            f"- Method: {config.method}"
            + (f", r {config.adapter.r}, alpha {config.adapter.alpha:g}" if config.adapter else ""),
            f"- Data: {sources}",
            f"- Data fingerprint: `{_data_fingerprint(run_dir) or 'not recorded'}`",
            f"- Template: {config.data.template}; trained on: {config.data.train_on}",
            f"- Optimizer: {config.optim.name}, lr {config.optim.lr:g}, schedule {config.schedule.name}",
            *[f"- {line}" for line in _losses(run_dir)],
        ]
    lines += ["", TO_FILL_IN, "", "- Licence of the data:", "- Intended use and limits:", "- Contact:", ""]
    (folder / CARD).write_text("\n".join(lines), encoding="utf-8")


def _data_fingerprint(run_dir: RunDir | None) -> str | None:
    return newest_manifest(run_dir).get("data") if run_dir else None


def _losses(run_dir: RunDir | None) -> list[str]:
    """The last training loss and the lowest validation loss of the run's metrics."""
    if run_dir is None:
        return []
    # A loss that was not a number is null there: it is no figure for a card.
    records = [record for record in read_metrics(run_dir.metrics) if record.get("loss") is not None]
    lines = []
    if steps := [r for r in records if r["kind"] == "step"]:
        lines.append(f"Training loss at step {steps[-1]['step']}: {steps[-1]['loss']:.4f}")
    if evaluations := [r for r in records if r["kind"] == "eval"]:
        best = min(evaluations, key=lambda r: r["loss"])
        lines.append(f"Lowest validation loss: {best['loss']:.4f} at step {best['step']}")
    return lines
