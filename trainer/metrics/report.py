"""One offline HTML page about a run, made from nothing but the files in its run dir."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from trainer.checkpoint.layout import MANIFEST, RunDir, hash_file, read_manifest, write_atomically
from trainer.errors import PacktrainError
from trainer.metrics import page
from trainer.metrics.trackers import Record, read_metrics
from trainer.units import tell_size

if TYPE_CHECKING:  # matplotlib waits for the end, and for the one process that draws
    from trainer.metrics.curves import Points

STATE_CLASS = {"done": "good", "failed": "bad", "preempted": "warn", "cancelled": "warn", "running": "busy"}


@dataclass(frozen=True)
class Records:
    """The lines of metrics.jsonl by kind."""

    steps: list[Record]
    evals: list[Record]
    samples: list[Record]
    events: list[Record]

    @classmethod
    def read(cls, path: Path) -> Records:
        by_kind: dict[str, list[Record]] = {"step": [], "eval": [], "sample": [], "event": []}
        for record in read_metrics(path):
            by_kind.setdefault(record["kind"], []).append(record)
        return cls(by_kind["step"], by_kind["eval"], by_kind["sample"], by_kind["event"])

    def best_eval(self) -> int | None:
        """Index of the evaluation with the lowest loss."""
        losses = [(record["loss"], index) for index, record in enumerate(self.evals) if record.get("loss") is not None]
        return min(losses)[1] if losses else None

    def count(self, event: str) -> int:
        return sum(record.get("event") == event for record in self.events)


def write_report(run_dir: RunDir) -> Path:
    """Writes ``report.html``: summary, curves, throughput, evaluations, samples, events, hashes, recipe.

    What a run does not have (it failed early, has no validation rows, no GPU) is left out.

    Returns:
        Path of the page. It needs no network and no script.
    """
    records = Records.read(run_dir.metrics)
    name = run_dir.path.resolve().name
    body = [
        _header(name, run_dir, records),
        _cards(records),
        page.section("Curves", _curves(records)),
        page.section("Throughput and memory", _throughput(records)),
        page.section("Evaluations", _evaluations(records)),
        page.section("Samples", *_samples(records)),
        page.section("Events and restarts", _events(records)),
        page.section("Identity and hashes", *_identity(run_dir)),
        page.section("Recipe", _recipe(run_dir)),
        f"<footer>Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC from {page.escape(str(run_dir.path))}</footer>",
    ]
    write_atomically(run_dir.report, page.document(f"{name} · packtrain", body))
    return run_dir.report


def _header(name: str, run_dir: RunDir, records: Records) -> str:
    state = run_dir.read_state()
    word = state.get("state", "unknown state")
    css = STATE_CLASS.get(word, "soft")
    step = state.get("step", records.steps[-1]["step"] if records.steps else 0)
    facts = [*_recipe_facts(run_dir), f"{step:,} step{'s' * (step != 1)}"]
    for event, noun in (("resume", "restart"), ("skipped_step", "skipped step")):
        if count := records.count(event):
            facts.append(f"{count} {noun}{'s' * (count > 1)}")
    notice = ""
    if state.get("reason"):
        notice = f'<div class="notice {css}"><span>{page.escape(str(state["reason"]))}</span></div>'
    title = f'<h1>{page.escape(name)}</h1><span class="badge {css}">{page.escape(word)}</span>'
    subtitle = f'<p class="soft">{page.escape(" · ".join(facts))}</p>'
    return f'<header><div class="head">{title}</div>{subtitle}{notice}</header>'


def _recipe_facts(run_dir: RunDir) -> list[str]:
    """Model and method, as far as the recipe can be read."""
    try:
        recipe = yaml.safe_load(run_dir.recipe.read_text(encoding="utf-8"))
        method = "full" if not recipe.get("adapter") else "QLoRA" if recipe.get("quantization") else "LoRA"
        return [str(recipe["model"]["path"]), method]
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError):
        return []


def _cards(records: Records) -> str:
    steps, best = records.steps, records.best_eval()
    losses, speeds = _series(steps, "loss"), _values(steps, "tokens_per_second")
    tokens, trained = sum(_values(steps, "tokens")), sum(_values(steps, "trained_tokens"))
    mfu, memory = _values(steps, "mfu"), _values(steps, "gpu_memory_gib")
    in_steps, in_evals = sum(_values(steps, "seconds")), sum(_values(records.evals, "seconds"))

    cards = [page.card("Training loss", "–", note="no step was finished")]
    if losses:
        note = f"last step; first {losses[0][1]:.4g}"
        cards = [page.card("Training loss", f"{losses[-1][1]:.4f}", note=note)]
    if best is not None:
        at = records.evals[best]
        cards.append(page.card("Validation loss", f"{at['loss']:.4f}", note=f"lowest, at step {at['step']:,}"))
    if speeds:
        note = f"median; MFU {statistics.median(mfu):.1%}" if mfu else "median of all steps"
        cards.append(page.card("Throughput", _short(statistics.median(speeds)), "tok/s", note))
    if steps:
        peak = (f"{max(memory):.1f}", "GiB", "GPU, allocated") if memory else ("–", "", "no GPU")
        cards.append(page.card("Peak memory", *peak))
    if tokens:
        cards.append(
            page.card("Tokens seen", _short(tokens), note=f"{_short(trained)} trained ({trained / tokens:.0%})")
        )
    if in_steps + in_evals:
        note = f"{_duration(in_evals)} evaluating" if in_evals else "in training steps"
        cards.append(page.card("Wall time", _duration(in_steps + in_evals), note=note))
    return f'<div class="cards">{"".join(cards)}</div>'


def _throughput(records: Records) -> str:
    rows: list[list[page.Cell]] = []
    for key, title, form in (
        ("tokens_per_second", "tokens per second", ",.0f"),
        ("mfu", "MFU", ".1%"),
        ("seconds", "seconds per step", ".3g"),
        ("tokens", "tokens per step", ",.0f"),
        ("trained_tokens", "trained tokens per step", ",.0f"),
        ("gpu_memory_gib", "peak GPU memory (GiB)", ".2f"),
    ):
        if values := _values(records.steps, key):
            figures = (statistics.median(values), statistics.mean(values), min(values), max(values))
            rows.append([title, *(format(figure, form) for figure in figures)])
    return page.table([("", ""), ("median", "num"), ("mean", "num"), ("lowest", "num"), ("highest", "num")], rows)


def _evaluations(records: Records) -> str:
    columns = [("step", "num"), ("loss", "num"), ("perplexity", "num"), ("trained tokens", "num"), ("seconds", "num")]
    forms = {"step": ",", "loss": ".4f", "perplexity": ".4g", "trained_tokens": ",", "seconds": ".1f"}
    rows = [[_format(record.get(key), form) for key, form in forms.items()] for record in records.evals]
    return page.table(columns, rows, marked=records.best_eval())


def _samples(records: Records) -> list[str]:
    """A part for each step, the newest on top and unfolded, so that answers can be compared over time."""
    by_step: dict[int, list[Record]] = {}
    for record in records.samples:
        by_step.setdefault(record["step"], []).append(record)
    parts = []
    for index, step in enumerate(sorted(by_step, reverse=True)):
        rows = [[str(record.get("prompt", "")), str(record.get("answer", ""))] for record in by_step[step]]
        parts.append(
            page.details(f"Step {step:,}", page.table([("prompt", "text"), ("answer", "text")], rows), index == 0)
        )
    return parts


def _events(records: Records) -> str:
    rows = [
        [
            f"{r['step']:,}",
            str(r.get("time", "")).replace("T", " ")[:19],
            str(r.get("event", "")).replace("_", " "),
            str(r.get("text", "")),
        ]
        for r in records.events
    ]
    return page.table([("step", "num"), ("time (UTC)", "num"), ("event", "text"), ("", "text")], rows)


def _identity(run_dir: RunDir) -> list[str]:
    """What was trained on what (of the newest checkpoint), and every file with its hash."""
    best = run_dir.best_name()
    folders = [run_dir.step_dir(step) for step in reversed(run_dir.steps())]
    results = [f for f in (run_dir.adapter, run_dir.model, run_dir.merged) if (f / MANIFEST).exists()]
    manifests = [(folder, _manifest(folder)) for folder in [*folders, *results]]
    rows = _identity_rows(next((m for folder, m in manifests if m and folder in folders), {}))
    if run_dir.recipe.exists():
        rows.append(("recipe.yaml (blake3)", _mono(hash_file(run_dir.recipe))))
    files = [_files(folder, manifest, folder.name == best) for folder, manifest in manifests]
    return [page.key_values(rows), '<p class="soft">Files as the manifests record them:</p>' if files else "", *files]


def _identity_rows(manifest: Record) -> list[tuple[str, page.Cell]]:
    base = manifest.get("base") or {}
    named = [(f"base {key.replace('_', ' ')}", value) for key, value in base.items()]
    named += [("data fingerprint", manifest.get("data")), ("recipe hash", manifest.get("recipe"))]
    named += [("processes", manifest.get("world_size"))]
    return [(name, _mono(value)) for name, value in named if value is not None]


def _files(folder: Path, manifest: Record, is_best: bool) -> str:
    if not manifest:
        return page.details(f"{folder.name}: its manifest cannot be read", "")
    files = manifest.get("files", {})
    size = sum(entry["bytes"] for entry in files.values())
    title = f"{folder.name} · {len(files)} file{'s' * (len(files) != 1)}, {tell_size(size)}{' · best' * is_best}"
    rows = [[name, f"{entry['bytes']:,}", entry["blake3"]] for name, entry in files.items()]
    return page.details(title, page.table([("file", "mono"), ("bytes", "num"), ("blake3", "mono")], rows))


def _manifest(folder: Path) -> Record:
    try:
        return read_manifest(folder)
    except PacktrainError:
        return {}


def _recipe(run_dir: RunDir) -> str:
    """Without what it asks of a cluster: a page is handed on, and `slurm.env` may hold keys."""
    if not run_dir.recipe.exists():
        return ""
    recipe = re.sub(r"(?ms)^slurm:.*?(?=^\S|\Z)", "", run_dir.recipe.read_text(encoding="utf-8"))
    return f'<div class="box"><pre>{page.escape(recipe)}</pre></div>'


def _curves(records: Records) -> str:
    """The pictures; a quantity that was never measured gets none."""
    from trainer.metrics.curves import draw_curve

    restarts = [record["step"] for record in records.events if record.get("event") == "resume"]
    losses, validation = _series(records.steps, "loss"), _series(records.evals, "loss")
    figures = []
    if losses or validation:
        alt = f"training loss {_span(losses)}; validation loss {_span(validation)}"
        drawn = draw_curve(losses, restarts, validation=validation, smooth=True, wide=True)
        figures.append(page.picture("Loss", *drawn, alt, wide=True))
    for key, title in (
        ("lr", "Learning rate"),
        ("grad_norm", "Gradient norm"),
        ("tokens_per_second", "Tokens per second"),
        ("gpu_memory_gib", "Peak GPU memory (GiB)"),
    ):
        if points := _series(records.steps, key):
            drawn = draw_curve(points, restarts, smooth=key == "grad_norm")
            figures.append(page.picture(title, *drawn, f"{title} {_span(points)}"))
    return f'<div class="curves">{"".join(figures)}</div>' if figures else ""


def _series(records: Iterable[Record], key: str) -> Points:
    return [(record["step"], record[key]) for record in records if record.get(key) is not None]


def _values(records: Iterable[Record], key: str) -> list[float]:
    return [value for _, value in _series(records, key)]


def _span(points: Points) -> str:
    if not points:
        return "not measured"
    return f"from {points[0][1]:.4g} at step {points[0][0]} to {points[-1][1]:.4g} at step {points[-1][0]}"


def _format(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _mono(value: Any) -> page.Markup:
    text = value if isinstance(value, str) else json.dumps(value)
    return page.Markup(f'<span class="mono">{page.escape(text)}</span>')


def _short(value: float) -> str:
    """Four digits or so: 87, 9,120, 17.9k, 655M."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):,.4g}{unit}"
    return f"{value:,.0f}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{seconds / 60:.1f} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
