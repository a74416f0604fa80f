"""The report of runs that ended in every way, made from run dirs that MetricsLog and RunDir wrote."""

from __future__ import annotations

import base64
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from launch.report import report
from trainer.checkpoint.layout import RunDir, write_atomically, write_manifest
from trainer.errors import UserError
from trainer.metrics.report import write_report
from trainer.metrics.trackers import MetricsLog

RECIPE = """model:
  path: meta-llama/Llama-2-7b-hf
quantization:
  type: nf4
adapter:
  r: 16
data:
  train:
  - {path: "rows <b>&amp;.jsonl", format: messages}
train:
  epochs: 1
"""
PROMPTS = ["Write a b c d backwards.", "What is <b>bold</b> & 'quoted'?\nAnswer briefly."]


def write_run(
    path: Path, steps: int = 200, restart_at: int | None = 120, gpu: bool = True, evals: bool = True
) -> RunDir:
    """A run as the loop leaves it: noisy falling loss, cosine rate, evaluations, samples, a restart, checkpoints."""
    run_dir = RunDir(path)
    write_atomically(run_dir.recipe, RECIPE)
    draw = random.Random(0)
    with MetricsLog(run_dir) as log:
        log.write({"kind": "event", "step": 0, "event": "start", "text": "micro-batch 4, recompute none"})
        for step in range(1, steps + 1):
            write_step(log, step, steps, draw, gpu)
            if step == restart_at:
                log.write({"kind": "event", "step": step, "event": "preempted", "text": "SIGTERM: saved and stopped"})
                log.write({"kind": "event", "step": step, "event": "resume", "text": f"resumed from step {step}"})
            if evals and step % 25 == 0:
                write_evaluation(log, step)
    for step in (100, 200)[: steps // 100]:
        write_checkpoint(run_dir, step)
    write_atomically(run_dir.best, "step_00000200\n")
    run_dir.write_state("done", steps)
    return run_dir


def write_step(log: MetricsLog, step: int, steps: int, draw: random.Random, gpu: bool) -> None:
    seconds = 0.92 + draw.gauss(0, 0.02) + 4 * (step == 1)
    skipped = step == 60
    log.write(
        {
            "kind": "step",
            "step": step,
            "loss": math.nan if skipped else 0.9 + 1.3 * math.exp(-step / 40) + draw.gauss(0, 0.06),
            "lr": 2e-4 * min(step / 6, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
            "grad_norm": math.inf if skipped else 0.4 + math.exp(-step / 15) + abs(draw.gauss(0, 0.08)),
            "tokens": 16384,
            "trained_tokens": 6120 + draw.randrange(300),
            "tokens_per_second": 16384 / seconds,
            "mfu": 0.452 / seconds if gpu else None,
            "gpu_memory_gib": min(81.1, 60 + step * 2) if gpu else None,
            "seconds": seconds,
        }
    )
    if skipped:
        log.write(
            {"kind": "event", "step": step, "event": "skipped_step", "text": "loss is nan: step skipped (1 in a row)"}
        )


def write_evaluation(log: MetricsLog, step: int) -> None:
    loss = 0.95 + 1.1 * math.exp(-step / 45) + max(0, step - 150) * 0.002
    log.write(
        {
            "kind": "eval",
            "step": step,
            "loss": loss,
            "perplexity": math.exp(loss),
            "trained_tokens": 48211,
            "seconds": 6.2,
        }
    )
    for prompt in PROMPTS:
        answer = "d c b a" if step > 100 else "<script>alert(1)</script> a a a"
        log.write({"kind": "sample", "step": step, "prompt": prompt, "answer": answer})


def write_checkpoint(run_dir: RunDir, step: int) -> None:
    folder = run_dir.step_dir(step)
    write_atomically(folder / "adapter" / "adapter_model.safetensors", "weights" * step)
    write_atomically(folder / "dcp" / "__0_0.distcp", "moments" * step)
    base = {
        "path": "meta-llama/Llama-2-7b-hf",
        "revision": "01c7f73d771dfac7d292323805ebc428287df4f9",
        "content_hash": "ba5e" * 16,
        "quantization": {"type": "nf4", "double_quant": True},
        "nf4_fingerprint": None,
    }
    write_manifest(folder, {"step": step, "base": base, "data": "da7a" * 16, "recipe": "4ec1" * 16, "world_size": 1})


class PageParser(HTMLParser):
    """Collects what a browser would see, load and run; notices tags that do not match."""

    VOID = frozenset({"meta", "img", "source", "br", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.seen = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.seen += data


def read_page(run_dir: RunDir) -> PageParser:
    path = write_report(run_dir)
    assert path == run_dir.report
    return PageParser(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return write_run(tmp_path_factory.mktemp("runs") / "llama2-7b-qlora")


@pytest.fixture(scope="module")
def full_page(full_run: RunDir) -> PageParser:
    return read_page(full_run)


def test_page_needs_no_network_and_no_script(full_run: RunDir, full_page: PageParser) -> None:
    assert full_page.addresses and all(address.startswith("data:") for address in full_page.addresses)
    assert not {"script", "link", "iframe"} & set(full_page.tags)
    assert not re.search(r"url\(|@import", full_run.report.read_text(encoding="utf-8"))


def test_summary_says_what_metrics_say(full_page: PageParser) -> None:
    for text in ("llama2-7b-qlora", "done", "QLoRA", "200 steps", "1 restart", "1 skipped step", "3.277M", "81.1 GiB"):
        assert text in full_page.seen, text
    best = 0.95 + 1.1 * math.exp(-150 / 45)  # every later evaluation of the synthetic run is higher
    assert f"{best:.4f}" in full_page.seen and "step 150" in full_page.seen


def test_shows_recipe_samples_events_and_hashes_literally(full_run: RunDir, full_page: PageParser) -> None:
    assert RECIPE in full_page.seen
    assert "<script>alert(1)</script> a a a" in full_page.seen and PROMPTS[1] in full_page.seen
    assert "SIGTERM: saved and stopped" in full_page.seen and "resumed from step 120" in full_page.seen
    assert "ba5e" * 16 in full_page.seen and "da7a" * 16 in full_page.seen
    assert "step_00000200" in full_page.seen and "· best" in full_page.seen
    from blake3 import blake3

    adapter = full_run.step_dir(100) / "adapter" / "adapter_model.safetensors"
    assert blake3(adapter.read_bytes()).hexdigest() in full_page.seen


def test_draws_five_curves_for_light_and_dark(full_page: PageParser) -> None:
    assert full_page.tags.count("figure") == 5
    assert len(full_page.addresses) == 10
    drawings = {base64.b64decode(address.partition(",")[2]) for address in full_page.addresses}
    assert len(drawings) == 10 and all(b"</svg>" in drawing for drawing in drawings)


def test_run_without_evaluations_and_gpu_leaves_those_out(tmp_path: Path) -> None:
    page = read_page(write_run(tmp_path / "cpu", steps=30, restart_at=None, gpu=False, evals=False))
    assert "no GPU" in page.seen and page.tags.count("figure") == 4
    for absent in ("Evaluations", "Samples", "MFU", "Validation loss"):
        assert absent not in page.seen, absent


@pytest.mark.parametrize("steps", [0, 1])
def test_shortest_runs_have_a_page(tmp_path: Path, steps: int) -> None:
    page = read_page(write_run(tmp_path / "short", steps=steps, restart_at=None))
    assert f"{steps} step{'s' * (steps != 1)}" in page.seen
    assert page.tags.count("figure") == (5 if steps else 0)


def test_failed_run_says_why(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "failed")
    run_dir.write_state("failed", 0, "data.train[0].path: rows.jsonl <missing>\n  fix: name a file that exists")
    page = read_page(run_dir)
    assert "failed" in page.seen and "rows.jsonl <missing>\n  fix: name a file" in page.seen


def test_damaged_pieces_do_not_stop_the_report(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "damaged", steps=100, restart_at=None)
    (run_dir.step_dir(100) / "manifest.json").write_text("{ half")
    with open(run_dir.metrics, "a") as file:
        file.write('{"kind": "step", "st')
    run_dir.recipe.write_text("model: [unclosed")
    page = read_page(run_dir)
    assert "step_00000100: its manifest cannot be read" in page.seen and "model: [unclosed" in page.seen


def test_long_run_keeps_its_spike_and_a_small_page(tmp_path: Path) -> None:
    from trainer.metrics.curves import MAX_POINTS, _thin_out

    points = [(step, 1.0) for step in range(1, 100_001)]
    points[54_321] = (54_322, 99.0)
    thin = _thin_out(points)
    assert (54_322, 99.0) in thin and len(thin) <= MAX_POINTS and thin == sorted(thin)


def test_command_prints_the_page_and_refuses_another_folder(
    full_run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report(full_run.path)
    assert capsys.readouterr().out.strip() == str(full_run.report)
    with pytest.raises(UserError, match=r"has no recipe\.yaml"):
        report(tmp_path)
    assert not (tmp_path / "report.html").exists()
