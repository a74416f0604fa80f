"""vLLM itself, on a GPU or built for CPUs: merged and unmerged, proven by the gate, and asked by `generate`.

An engine starts four times, each a minute or so. Where vLLM lacks flashinfer, set ``VLLM_USE_FLASHINFER_SAMPLER=0`` as
for vLLM alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from launch.cli import main
from launch.demo import chat_rows, llama_config, write_jsonl
from tests.unit.export_toys import make_run, teach
from trainer.config import RunConfig
from trainer.errors import PacktrainError
from trainer.export.merge import merge_adapter
from trainer.export.parity import MAX_MEAN_DIFFERENCE, check_parity
from trainer.servable import vllm_is_usable
from trainer.vllm_job import Job, Served, serve_in_child

pytestmark = pytest.mark.skipif(not vllm_is_usable(), reason="needs vLLM, and a GPU or vLLM's build for CPUs")
Make = Callable[..., Path]
LORA: dict[str, Any] = {"r": 8, "alpha": 16.0}
ANSWER = "no, no"
NUM_ROWS = 120


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: Any) -> Path:
    """A Llama with heads of 64, taught to follow instructions somewhat."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(toy_tokenizer, hidden=256, layers=2, heads=4, kv_heads=2, tied=False))
    teach(model, toy_tokenizer, list(chat_rows(NUM_ROWS, seed=2)), steps=60, lr=3e-3)
    model.to(torch.bfloat16).save_pretrained(folder)
    toy_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run_of(base: Path, tmp_path: Path, toy_tokenizer: Any, toy_recipe: Callable[..., RunConfig]) -> Make:
    """Trains a run with an adapter that answers everything with `ANSWER`, and merges it."""

    def make(quantization: dict[str, Any] | None = None) -> Path:
        rows = list(chat_rows(NUM_ROWS, seed=3))
        for row in rows:
            row["messages"][-1]["content"] = ANSWER
        source = {"path": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "format": "messages"}
        config = toy_recipe(
            model={"path": str(base), "dtype": "bfloat16"},
            adapter=LORA,
            quantization=quantization,
            data={"train": [source], "split": {"validation": 0.25}, "pack_length": 128},
        )
        run = make_run(
            tmp_path / "run", config, train=lambda model: teach(model, toy_tokenizer, rows, steps=40, lr=1e-2)
        )
        merge_adapter(run, run / "merged")
        return run

    return make


def test_verify_proves_a_merged_qlora(run_of: Make, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of({"type": "nf4", "double_quant": True})
    assert main(["verify", str(run), "--vllm"]) == 0
    printed = capsys.readouterr().out
    print(printed)
    assert f"serves {run / 'merged'} as it was trained" in printed
    assert "ends at the trained stop token: 100% of the answers" in printed


def test_unmerged_adapter_is_applied_and_missed_where_vllm_passes_it_over(run_of: Make, tmp_path: Path) -> None:
    run = run_of()
    report = check_parity(run / "adapter")
    print(report)
    assert report.served == "the adapter, unmerged" and report.conversations >= 100
    assert report.effect is not None and report.effect > 10 * MAX_MEAN_DIFFERENCE
    assert report.stopped == 1.0

    wrong = tmp_path / "wrong"
    shutil.copytree(run / "adapter", wrong)
    file = wrong / "adapter_model.safetensors"
    save_file({name.replace("model.layers", "other.layers"): t for name, t in load_file(file).items()}, file)

    def serve(job: Job) -> Served:
        return serve_in_child(replace(job, servable=replace(job.servable, adapter=str(wrong))))

    with pytest.raises(PacktrainError) as caught:  # vLLM refuses the keys, or the gate sees that it ignores them
        check_parity(run / "adapter", serve)
    print(caught.value)


def test_generate_answers_as_under_transformers(run_of: Make, tmp_path: Path) -> None:
    run = run_of()
    prompts = [{"prompt": row["messages"][0]["content"]} for row in chat_rows(8, seed=5)]
    prompts += [{**prompts[0], "num_beams": 2}, {**prompts[0], "temperature": 0.7, "top_p": 0.9}]
    file = write_jsonl(tmp_path / "prompts.jsonl", prompts)
    answers = {}
    for engine in ("vllm", "transformers"):
        out = tmp_path / f"{engine}.jsonl"
        command = ["generate", str(run), "--prompts", str(file), "--max-new-tokens", "16", "--out", str(out)]
        assert main([*command, "--engine", engine]) == 0
        answers[engine] = [json.loads(line)["answer"] for line in out.read_text().splitlines()]
    assert answers["vllm"][:9] == answers["transformers"][:9]
    assert answers["vllm"][:8] == [ANSWER] * 8
