"""Merging against PEFT's own `merge_and_unload` in float32, and a folder that is whole or not there."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.unit.export_toys import make_run, peft_merge
from trainer.checkpoint.layout import UNFINISHED, RunDir, find_damage, read_manifest, write_manifest
from trainer.config import RunConfig
from trainer.errors import PacktrainError, UserError
from trainer.export.merge import merge_adapter
from trainer.export.verify import verify_export

LORA: dict[str, Any] = {"r": 4, "alpha": 16.0}
NF4 = {"type": "nf4", "double_quant": True}
CASES: dict[str, dict[str, Any]] = {
    "lora": {"adapter": LORA},
    "rslora on some": {"adapter": {**LORA, "rslora": True, "targets": ["q_proj", "down_proj"]}},
    "dora": {"adapter": {**LORA, "dora": True}},
    "head and embeddings": {"adapter": {**LORA, "modules_to_save": ["embed_tokens", "lm_head"]}},
    "qlora": {"adapter": LORA, "quantization": NF4},
    "qlora on some": {"adapter": {**LORA, "targets": ["q_proj"]}, "quantization": NF4},
    "qlora, plain scales": {"adapter": LORA, "quantization": {**NF4, "double_quant": False}},
    "int8": {"adapter": LORA, "quantization": {"type": "int8"}},
    "qlora, dora": {"adapter": {**LORA, "dora": True}, "quantization": NF4},
}


def merged_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.parametrize("case", CASES)
def test_equals_peft(case: str, tmp_path: Path, toy_recipe: Callable[..., RunConfig]) -> None:
    config = toy_recipe(**CASES[case])
    run = make_run(tmp_path / "run", config)
    report = merge_adapter(run, tmp_path / "out")

    truth, found = peft_merge(config, run / "adapter"), merged_tensors(tmp_path / "out")
    assert set(found) == set(truth)
    for name, tensor in truth.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)
    targets = config.adapter.targets if config.adapter else []
    per_layer = 7 if targets == "all-linear" else len(targets)
    assert report.changed == 2 * per_layer + len(config.adapter.modules_to_save if config.adapter else [])
    assert report.base == ("dequantized" if config.quantization else "original")
    assert find_damage(tmp_path / "out") is None


def test_original_base_is_a_choice(tmp_path: Path, toy_recipe: Callable[..., RunConfig]) -> None:
    config = toy_recipe(**CASES["qlora"])
    run = make_run(tmp_path / "run", config)
    merge_adapter(run, tmp_path / "original", "original")
    merge_adapter(run, tmp_path / "dequantized")

    original, dequantized = merged_tensors(tmp_path / "original"), merged_tensors(tmp_path / "dequantized")
    for name, tensor in peft_merge(config, run / "adapter", "original").items():
        torch.testing.assert_close(original[name], tensor, rtol=1e-6, atol=1e-6)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(original[name], dequantized[name], atol=1e-4)


def test_rounds_to_the_models_dtype(tmp_path: Path, toy_recipe: Callable[..., RunConfig], toy_model_dir: Path) -> None:
    config = toy_recipe(model={"path": str(toy_model_dir), "dtype": "bfloat16"}, **CASES["qlora"])
    run = make_run(tmp_path / "run", config)
    merge_adapter(run, tmp_path / "out")

    found = merged_tensors(tmp_path / "out")
    for name, tensor in peft_merge(config, run / "adapter").items():
        assert found[name].dtype == torch.bfloat16
        assert (found[name] == tensor.bfloat16()).float().mean() > 0.999  # ties may fall the other way
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert not hasattr(loaded.config, "quantization_config")


def test_tied_head_stays_tied(tmp_path: Path, toy_recipe: Callable[..., RunConfig], toy_tied_model_dir: Path) -> None:
    config = toy_recipe(model={"path": str(toy_tied_model_dir), "dtype": "float32"}, **CASES["qlora"])
    run = make_run(tmp_path / "run", config)
    merge_adapter(run, tmp_path / "out")

    assert "lm_head.weight" not in merged_tensors(tmp_path / "out")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_adapter_made_by_peft_with_added_tokens(tmp_path: Path, toy_model_dir: Path) -> None:
    """No run of ours: PEFT resized the embeddings and saved them, and named the base itself."""
    from peft import LoraConfig, get_peft_model

    tokenizer: Any = AutoTokenizer.from_pretrained(toy_model_dir)
    tokenizer.add_tokens(["<|new|>", "<|newer|>"])
    model: Any = AutoModelForCausalLM.from_pretrained(toy_model_dir)
    model.resize_token_embeddings(len(tokenizer))
    peft_config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], alpha_pattern={"layers.0.self_attn.q_proj": 3}
    )
    model = get_peft_model(model, peft_config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")

    merge_adapter(tmp_path / "adapter", tmp_path / "out")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.vocab_size == len(tokenizer) == len(AutoTokenizer.from_pretrained(tmp_path / "out"))
    ids = tokenizer("a <|new|> b", return_tensors="pt").input_ids
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert verify_export(tmp_path / "out").merged_onto == "original"


def test_only_the_embeddings_of_a_tied_model_changed(tmp_path: Path, toy_tied_model_dir: Path) -> None:
    """PEFT then trains embeddings apart from the head: merged, the head needs a tensor of its own."""
    from peft import LoraConfig, get_peft_model

    model: Any = AutoModelForCausalLM.from_pretrained(toy_tied_model_dir)
    model = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    )
    with torch.no_grad():
        model.base_model.model.model.embed_tokens.modules_to_save["default"].weight.mul_(1.5)
    model.save_pretrained(tmp_path / "adapter")

    merge_adapter(tmp_path / "adapter", tmp_path / "out")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert verify_export(tmp_path / "out").merged_onto == "original"


@pytest.fixture
def sharded_run(tmp_path: Path, toy_recipe: Callable[..., RunConfig], toy_model_dir: Path) -> Path:
    """A run on the toy cut into many files."""
    base = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(toy_model_dir).save_pretrained(base, max_shard_size="60KB")
    AutoTokenizer.from_pretrained(toy_model_dir).save_pretrained(base)
    assert len(list(base.glob("*.safetensors"))) > 3
    return make_run(tmp_path / "run", toy_recipe(model={"path": str(base), "dtype": "float32"}, **CASES["qlora"]))


def test_keeps_the_bases_shards(tmp_path: Path, sharded_run: Path) -> None:
    merge_adapter(sharded_run, tmp_path / "out")
    index = "model.safetensors.index.json"
    found, base = (json.loads((f / index).read_text()) for f in (tmp_path / "out", tmp_path / "sharded"))
    assert found["weight_map"] == base["weight_map"]
    assert found["metadata"]["total_size"] == base["metadata"]["total_size"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_random_base_needs_no_files(tmp_path: Path, toy_recipe: Callable[..., RunConfig], toy_model_dir: Path) -> None:
    base = tmp_path / "shape"
    base.mkdir()
    shutil.copy(toy_model_dir / "config.json", base)
    model = {"path": str(base), "tokenizer": str(toy_model_dir), "init": "random", "dtype": "float32"}
    config = toy_recipe(model=model, **CASES["qlora"])
    run = make_run(tmp_path / "run", config)
    merge_adapter(run, tmp_path / "out")

    from trainer.generate import load_for_inference

    ids = torch.tensor([[5, 6, 7, 8]])
    cpu = torch.device("cpu")
    tuned, merged = load_for_inference(run, cpu).model, load_for_inference(tmp_path / "out", cpu).model
    torch.testing.assert_close(merged(ids).logits, tuned(ids).logits, rtol=1e-4, atol=1e-4)


def test_serves_with_the_template_and_stop_token_trained_with(
    tmp_path: Path, toy_recipe: Callable[..., RunConfig], toy_rows_file: Path, toy_model_dir: Path
) -> None:
    template = tmp_path / "own.jinja"
    template.write_text(
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}<|pad|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    config = toy_recipe(adapter=LORA, data={"template": str(template)})
    merge_adapter(make_run(tmp_path / "run", config), tmp_path / "out")

    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|begin|>[user]hi<|pad|>[assistant]"
    ends = GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    assert set(ends) >= {tokenizer.convert_tokens_to_ids("<|pad|>"), tokenizer.eos_token_id}


def test_a_loss_that_was_no_number_is_not_on_the_card(tmp_path: Path, toy_recipe: Callable[..., RunConfig]) -> None:
    run = make_run(tmp_path / "run", toy_recipe(adapter=LORA))
    lines = [
        {"kind": "step", "step": 1, "loss": 2.5},
        {"kind": "eval", "step": 1, "loss": 2.25},
        {"kind": "step", "step": 2, "loss": None},  # a skipped step
        {"kind": "eval", "step": 2, "loss": None},
    ]
    RunDir(run).metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "st')
    merge_adapter(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Training loss at step 1: 2.5000" in card and "Lowest validation loss: 2.2500 at step 1" in card


def test_card_and_manifest_say_what_it_is(tmp_path: Path, toy_recipe: Callable[..., RunConfig]) -> None:
    config = toy_recipe(**CASES["qlora"])
    merge_adapter(make_run(tmp_path / "run", config), tmp_path / "out")
    manifest, card = read_manifest(tmp_path / "out"), (tmp_path / "out" / "README.md").read_text()
    assert RunConfig.model_validate(manifest["recipe"]) == config
    assert manifest["merged_onto"] == "dequantized"
    assert manifest["base"]["content_hash"] in card
    assert "qlora, r 4, alpha 16" in card


class TestRefusals:
    """Each with a message that names the cause, before anything is written."""

    @pytest.fixture
    def run(self, tmp_path: Path, toy_recipe: Callable[..., RunConfig], toy_model_dir: Path) -> Path:
        base = tmp_path / "base"
        shutil.copytree(toy_model_dir, base)
        return make_run(tmp_path / "run", toy_recipe(model={"path": str(base), "dtype": "float32"}, adapter=LORA))

    def refuse(self, source: Path, out: Path, match: str) -> None:
        with pytest.raises(UserError, match=match):
            merge_adapter(source, out)
        assert not out.exists()
        assert not out.with_name(out.name + UNFINISHED).exists()

    def test_existing_folder_is_not_written_over(self, run: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("precious")
        with pytest.raises(UserError, match="exists"):
            merge_adapter(run, tmp_path / "out")
        assert [f.name for f in (tmp_path / "out").iterdir()] == ["mine"]

    def test_changed_base(self, run: Path, tmp_path: Path) -> None:
        file = tmp_path / "base" / "model.safetensors"
        tensors = load_file(file)
        tensors["model.norm.weight"][0] += 1
        save_file(tensors, file, metadata={"format": "pt"})
        self.refuse(run, tmp_path / "out", "content hash .* trained on")

    @pytest.mark.parametrize(("old", "new"), [("base_model.model.", "model."), (".layers.1.", ".layers.7.")])
    def test_keys_that_find_no_place(self, run: Path, tmp_path: Path, old: str, new: str) -> None:
        file = run / "adapter" / "adapter_model.safetensors"
        save_file({k.replace(old, new): v for k, v in load_file(file).items()}, file)
        self.refuse(run, tmp_path / "out", "keys that begin with|have no place in the base.*layers.7")

    def test_base_of_another_shape(self, run: Path, tmp_path: Path) -> None:
        file = run / "adapter" / "adapter_model.safetensors"
        save_file({k: (v[:, :-2].contiguous() if "lora_A" in k else v) for k, v in load_file(file).items()}, file)
        self.refuse(run, tmp_path / "out", "by the base")

    def test_truncated_adapter(self, run: Path, tmp_path: Path) -> None:
        file = run / "adapter" / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        self.refuse(run, tmp_path / "out", "truncated")

    def test_adapter_kind_that_is_more_than_low_rank(self, run: Path, tmp_path: Path) -> None:
        file = run / "adapter" / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": "pissa"}))
        self.refuse(run, tmp_path / "out", "pissa")

    def test_full_model_needs_no_merge(self, toy_model_dir: Path, tmp_path: Path) -> None:
        self.refuse(toy_model_dir, tmp_path / "out", "whole model already")

    def test_nothing_there(self, tmp_path: Path) -> None:
        self.refuse(tmp_path / "nowhere", tmp_path / "out", "no such folder")


def test_untrained_adapter_is_said(
    tmp_path: Path, toy_recipe: Callable[..., RunConfig], caplog: pytest.LogCaptureFixture
) -> None:
    report = merge_adapter(make_run(tmp_path / "run", toy_recipe(adapter=LORA), size=0.0), tmp_path / "out")
    assert report.untrained == 14
    assert "14 of 14 adapters are zero" in caplog.text


def test_other_bytes_than_trained_on_are_refused(tmp_path: Path, toy_recipe: Callable[..., RunConfig]) -> None:
    run = make_run(tmp_path / "run", toy_recipe(adapter=LORA, quantization=NF4))
    step = run / "checkpoints" / "step_00000001"
    manifest = read_manifest(step)
    write_manifest(step, {**manifest, "base": {**manifest["base"], "nf4_fingerprint": "another"}})
    with pytest.raises(PacktrainError, match="was another in training"):
        merge_adapter(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_killed_merge_leaves_nothing_that_looks_whole(tmp_path: Path, sharded_run: Path) -> None:
    script = textwrap.dedent(f"""
        import torch
        from pathlib import Path
        from trainer.export.merge import merge_adapter
        torch.set_num_threads(1)
        for i in range(1000):
            merge_adapter(Path({str(sharded_run)!r}), Path({str(tmp_path)!r}) / f"out{{i}}")
    """)
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("out2.unfinished/*00002-of*.safetensors")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()

    finished = [f for f in tmp_path.glob("out*") if f.suffix != UNFINISHED]
    assert len(finished) >= 2
    assert all(find_damage(folder) is None for folder in finished)
    interrupted = list(tmp_path.glob("out*.unfinished"))
    assert interrupted
    assert all(find_damage(folder) is not None for folder in interrupted)
    merge_adapter(sharded_run, interrupted[0].with_suffix(""))
    assert not interrupted[0].exists()
