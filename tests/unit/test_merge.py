"""Merging against PEFT's own `merge_and_unload` in float32, and a folder that is whole or not there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from socket import gethostname
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from tests.unit.export_toys import make_run, peft_merge
from tests.unit.test_decilm import random_weights, write_config
from trainer.checkpoint.layout import (
    UNFINISHED,
    RunDir,
    find_damage,
    read_manifest,
    write_atomically,
    write_manifest,
)
from trainer.checkpoint.result import find_result
from trainer.config import ModelConfig, RunConfig
from trainer.errors import PacktrainError, Preempted, UserError
from trainer.export.merge import merge_adapter
from trainer.export.verify import verify_export
from trainer.model.weights import base_content_hash
from trainer.recipe import dump_recipe
from trainer.servable import why_only_merged

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


@pytest.mark.parametrize("base", ["toy_model_dir", "toy_tied_model_dir"])
def test_adapter_made_by_peft_with_added_tokens(base: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """No run of ours: PEFT resized the embeddings and saved them, and named the base itself."""
    from peft import LoraConfig, get_peft_model

    toy_model_dir = request.getfixturevalue(base)
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
def sharded_base(tmp_path: Path, toy_model_dir: Path) -> Path:
    """The toy cut into many files."""
    base = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(toy_model_dir).save_pretrained(base, max_shard_size="60KB")
    AutoTokenizer.from_pretrained(toy_model_dir).save_pretrained(base)
    assert len(list(base.glob("*.safetensors"))) > 3
    return base


@pytest.fixture
def sharded_run(tmp_path: Path, toy_recipe: Callable[..., RunConfig], sharded_base: Path) -> Path:
    """A run on the toy cut into many files."""
    model = {"path": str(sharded_base), "dtype": "float32"}
    return make_run(tmp_path / "run", toy_recipe(model=model, **CASES["qlora"]))


@pytest.fixture(params=["nf4", "int8", "decilm"])
def stoppable_run(request: pytest.FixtureRequest, tmp_path: Path, toy_recipe: Callable[..., RunConfig]) -> Path:
    """A run whose merge has several files and more to do than to add: quantised bases, and heads to repeat."""
    if request.param == "nf4":
        return request.getfixturevalue("sharded_run")
    if request.param == "int8":
        base, sections = request.getfixturevalue("sharded_base"), CASES["int8"]
    else:
        base, sections = tmp_path / "sharded", CASES["qlora"]
        write_decilm_in_files(base, request.getfixturevalue("toy_model_dir"))
    return make_run(tmp_path / "run", toy_recipe(model={"path": str(base), "dtype": "float32"}, **sections))


def write_decilm_in_files(folder: Path, toy: Path) -> None:
    """A DeciLM with a file a layer."""
    folder.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(toy)
    tokenizer.save_pretrained(folder)
    write_config(folder, len(tokenizer))
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in random_weights(len(tokenizer)).items():
        number = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{number}.safetensors", {})[name] = tensor
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


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


@pytest.mark.parametrize("case", ["qlora", "rslora on some", "dora", "head and embeddings"])
def test_what_vllm_serves_without_a_merge_is_known(
    case: str, tmp_path: Path, toy_recipe: Callable[..., RunConfig]
) -> None:
    """Its PEFTHelper needs these fields, and refuses DoRA and modules_to_save."""
    run = make_run(tmp_path / "run", toy_recipe(model={"dtype": "bfloat16"}, **CASES[case]))
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 16) and isinstance(config["target_modules"], list)
    assert config["use_rslora"] == (case == "rslora on some")
    reason = {"dora": "use_dora", "head and embeddings": r"modules_to_save: \['embed_tokens', 'lm_head'\]"}.get(case)
    found = why_only_merged(find_result(run))
    assert found is None if reason is None else re.search(reason, found or "")


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

    @pytest.mark.parametrize("number", [float("nan"), float("-inf")])
    def test_a_number_that_is_none(self, run: Path, tmp_path: Path, number: float) -> None:
        file = run / "adapter" / "adapter_model.safetensors"
        tensors = load_file(file)
        name = sorted(name for name in tensors if "lora_B" in name)[3]
        tensors[name][1, 2] = number
        save_file(tensors, file)
        self.refuse(run, tmp_path / "out", f"adapter_model.safetensors: tensor {re.escape(name)} holds NaN or Inf")

    @pytest.mark.parametrize("length", [0, 100, -100])
    def test_truncated_base(self, run: Path, tmp_path: Path, length: int) -> None:
        file = tmp_path / "base" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:length])
        self.refuse(run, tmp_path / "out", "truncated")

    @pytest.mark.parametrize("name", ["r", "lora_alpha"])
    def test_adapter_without_a_scale(self, run: Path, tmp_path: Path, name: str) -> None:
        file = run / "adapter" / "adapter_config.json"
        config = json.loads(file.read_text())
        for value in (None, 0, "8"):
            file.write_text(json.dumps({**config, name: value}))
            self.refuse(run, tmp_path / "out", f"{name} {value}")

    def test_generation_config_that_is_none(self, run: Path, tmp_path: Path) -> None:
        (run / "adapter" / "generation_config.json").write_text("{\n")
        self.refuse(run, tmp_path / "out", r"generation_config\.json.*no JSON object")

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
    assert (report.untrained, report.changed) == (14, 0)
    assert "14 of 14 adapters are zero" in caplog.text


def test_only_the_modules_that_were_trained_count_as_changed(
    tmp_path: Path, toy_recipe: Callable[..., RunConfig], toy_model_dir: Path
) -> None:
    run = make_run(tmp_path / "run", toy_recipe(adapter=LORA))
    file = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k: t * 0 if "lora_B" in k and ".layers.1." in k else t for k, t in tensors.items()}, file)
    report = merge_adapter(run, tmp_path / "out")
    base, merged = load_file(toy_model_dir / "model.safetensors"), merged_tensors(tmp_path / "out")
    assert report.changed == sum(not torch.equal(tensor, base[name]) for name, tensor in merged.items()) == 7
    assert f"7 of {len(base)} tensors changed" in (tmp_path / "out" / "README.md").read_text()


def test_other_bytes_than_trained_on_are_refused(tmp_path: Path, toy_recipe: Callable[..., RunConfig]) -> None:
    run = make_run(tmp_path / "run", toy_recipe(adapter=LORA, quantization=NF4))
    step = run / "checkpoints" / "step_00000001"
    manifest = read_manifest(step)
    write_manifest(step, {**manifest, "base": {**manifest["base"], "nf4_fingerprint": "another"}})
    with pytest.raises(PacktrainError, match="was another in training"):
        merge_adapter(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def assert_as_the_library_writes(folder: Path) -> None:
    """Every file has the very bytes that safetensors makes of its tensors."""
    for file in folder.glob("*.safetensors"):
        again = folder.with_name("again.safetensors")
        save_file(load_file(file), again, metadata={"format": "pt"})
        assert file.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("case", ["lora", "qlora, dora", "head and embeddings"])
def test_files_are_the_librarys_own_bytes(
    case: str, tmp_path: Path, sharded_base: Path, toy_recipe: Callable[..., RunConfig]
) -> None:
    model = {"path": str(sharded_base), "dtype": "bfloat16"}
    run = make_run(tmp_path / "run", toy_recipe(model=model, **CASES[case]))
    merge_adapter(run, tmp_path / "out")
    assert_as_the_library_writes(tmp_path / "out")
    assert find_damage(tmp_path / "out") is None  # hashed while they were written


def test_a_base_of_several_dtypes_that_another_program_ordered(tmp_path: Path, toy_tied_model_dir: Path) -> None:
    """Its tensors are neither read nor written in the order of their file; the head that comes apart lies nowhere."""
    from peft import LoraConfig, get_peft_model

    base = tmp_path / "base"
    shutil.copytree(toy_tied_model_dir, base)
    tensors = {n: t if "norm" in n else t.bfloat16() for n, t in load_file(base / "model.safetensors").items()}
    header, data = {"junk": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}, b"abc"
    for name in sorted(tensors, key=lambda name: name[::-1]):
        start, data = len(data), data + tensors[name].view(torch.uint8).numpy().tobytes()
        dtype = "F32" if "norm" in name else "BF16"
        header[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [start, len(data)]}
    header["x.rotary_emb.inv_freq"] = header.pop("junk")
    text = json.dumps(header).encode()
    (base / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)

    plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model: Any = get_peft_model(
        plain, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["o_proj"], modules_to_save=["embed_tokens"])
    )
    with torch.no_grad():
        model.base_model.model.model.embed_tokens.modules_to_save["default"].weight.mul_(1.5)
    model.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "out")

    found = merged_tensors(tmp_path / "out")
    assert torch.equal(found["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert found["model.norm.weight"].dtype == torch.float32 and found["lm_head.weight"].dtype == torch.bfloat16
    assert_as_the_library_writes(tmp_path / "out")
    record = read_manifest(tmp_path / "out")
    assert record["base"]["content_hash"] == base_content_hash(ModelConfig.model_validate(record["model"]), 0)


MEASURE = """
import sys
from pathlib import Path
import torch
from trainer.export.merge import merge_adapter

def mib(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) / 1024

torch.set_num_threads(1)
for run in map(Path, sys.argv[1:]):
    Path("/proc/self/clear_refs").write_text("5")  # the peak is forgotten
    before = mib("VmRSS")
    merge_adapter(run, run / "merged")
    print(mib("VmHWM") - before)
"""


def test_memory_is_at_most_twice_the_largest_file(
    tmp_path: Path, toy_recipe: Callable[..., RunConfig], toy_model_dir: Path
) -> None:
    """Every resident page counts, mapped ones too; the first merge, of a toy, has what is made once and kept."""

    def make(name: str, base: Path, quantization: Any) -> Path:
        run, size = RunDir(tmp_path / name), AutoConfig.from_pretrained(base).hidden_size
        model = {"path": str(base), "dtype": "bfloat16"}
        write_atomically(run.recipe, dump_recipe(toy_recipe(model=model, adapter=LORA, quantization=quantization)))
        run.write_state("done", 1)
        run.adapter.mkdir()
        prefix = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
        pair = {prefix + "A.weight": torch.ones(4, size), prefix + "B.weight": torch.ones(size, 4)}
        save_file(pair, run.adapter / "adapter_model.safetensors")
        (run.adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 16.0}')
        return run.path

    write_constants(tmp_path / "six", toy_model_dir, num_files=6, layers=2)
    write_constants(tmp_path / "one", toy_model_dir, num_files=1, layers=4)
    runs = [
        make("toy", toy_model_dir, NF4),
        make("lora", tmp_path / "six", None),
        make("qlora", tmp_path / "one", NF4),
        make("int8", tmp_path / "one", {"type": "int8"}),
    ]
    used = subprocess.run([sys.executable, "-c", MEASURE, *map(str, runs)], capture_output=True, text=True)
    assert used.returncode == 0, used.stderr
    _, lora, qlora, int8 = map(float, used.stdout.split())
    assert 8 < lora < 2 * 65
    assert 8 < qlora < 2 * 129
    assert 8 < int8 < 2 * 129


def write_constants(folder: Path, toy: Path, num_files: int, layers: int) -> None:
    """A model of 0.5 everywhere in 16 bit: so many layers a file, of 32 MiB each."""
    shutil.copytree(toy, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = AutoConfig.from_pretrained(toy)
    config.update({"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": num_files * layers})
    config.update({"head_dim": 256, "num_key_value_heads": 4, "dtype": "bfloat16"})
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, shape in shapes.items():
        number = int(name.split(".")[2]) // layers if ".layers." in name else 0
        shards.setdefault(f"model-{number}.safetensors", {})[name] = torch.full(shape, 0.5, dtype=torch.bfloat16)
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
        assert (folder / file).stat().st_size < (32 * layers + 2) * 2**20
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


KILLS = 4
KILL = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from trainer.export.merge import merge_adapter

torch.set_num_threads(1)
run, folder, number_of_kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

def begin(out):
    if (pid := os.fork()) == 0:
        merge_adapter(run, out)
        os._exit(0)
    while not out.exists() and not out.with_name(out.name + ".unfinished").exists():
        time.sleep(0.0002)
    return pid, time.monotonic()

pid, began = begin(folder / "whole")
os.waitpid(pid, 0)
seconds = time.monotonic() - began
for number in range(number_of_kills):  # each is killed at another moment of its merge
    pid, began = begin(folder / f"out{number}")
    moment = random.uniform(number, number + 1) / number_of_kills * seconds
    time.sleep(max(0, moment - (time.monotonic() - began)))
    os.kill(pid, signal.SIGTERM if number % 2 else signal.SIGKILL)
    os.waitpid(pid, 0)
"""


@pytest.mark.parametrize("stoppable_run", ["nf4", "decilm"], indirect=True)
def test_killed_anywhere_a_merge_goes_on_and_makes_the_same_bytes(tmp_path: Path, stoppable_run: Path) -> None:
    merge_adapter(stoppable_run, tmp_path / "wanted")
    named = ("README.md", "manifest.json")  # these say the folder's name
    wanted = {file.name: file.read_bytes() for file in (tmp_path / "wanted").iterdir() if file.name not in named}
    command = [sys.executable, "-c", KILL, str(stoppable_run), str(tmp_path), str(KILLS)]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == 0, killed.stderr

    unfinished = list(tmp_path.glob("out*.unfinished"))
    assert len(unfinished) >= 2
    for number in range(KILLS):
        out = tmp_path / f"out{number}"
        if not out.exists():
            merge_adapter(stoppable_run, out)
        assert find_damage(out) is None
        assert {name: (out / name).read_bytes() for name in wanted} == wanted
        assert {file.name for file in out.iterdir()} == {*wanted, *named}
    assert not list(tmp_path.glob("*.unfinished"))


class TestGoingOn:
    @pytest.fixture
    def stopped(self, tmp_path: Path, sharded_run: Path) -> Path:
        """The run, with an unfinished merge into out/ of which some files are whole."""
        return self.stop(sharded_run, tmp_path / "out")

    def stop(self, run: Path, out: Path) -> Path:
        with pytest.raises(Preempted):
            merge_adapter(run, out, check=raise_at(24))
        assert not out.exists()
        return run

    def went_on(self, run: Path, out: Path, base: Any = "dequantized") -> int:
        """Merges to the end; how many files were left as they were."""
        unfinished = out.with_name("out.unfinished")
        before = {file.name: file.stat().st_ino for file in unfinished.glob("*.safetensors")}
        times = {file.name: file.stat().st_mtime_ns for file in unfinished.glob("*.safetensors")}
        merge_adapter(run, out, base)
        after = {file.name: file.stat() for file in out.glob("*.safetensors")}
        assert find_damage(out) is None and not unfinished.exists()
        assert verify_export(out).merged_onto == base
        return sum(after[n].st_ino == before[n] and after[n].st_mtime_ns == times[n] for n in before)

    def test_after_the_files_that_are_whole(self, stoppable_run: Path, tmp_path: Path) -> None:
        self.stop(stoppable_run, tmp_path / "out")
        merge_adapter(stoppable_run, tmp_path / "wanted")
        whole = self.went_on(stoppable_run, tmp_path / "out")
        assert 0 < whole < len(list((tmp_path / "out").glob("*.safetensors")))
        for file in (tmp_path / "wanted").glob("*.safetensors"):
            assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()

    def test_not_of_a_merge_onto_the_other_base(self, stopped: Path, tmp_path: Path) -> None:
        assert self.went_on(stopped, tmp_path / "out", "original") == 0

    def test_not_of_another_adapter(self, stopped: Path, tmp_path: Path) -> None:
        file = stopped / "adapter" / "adapter_model.safetensors"
        save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
        assert self.went_on(stopped, tmp_path / "out") == 0

    def test_not_of_another_base(self, stopped: Path, tmp_path: Path) -> None:
        step = stopped / "checkpoints" / "step_00000001"
        record = read_manifest(step)
        write_manifest(step, {**record, "base": {}})  # a run that knows no hash of its base
        file = sorted((tmp_path / "sharded").glob("*.safetensors"))[0]
        with pytest.raises(Preempted):
            merge_adapter(stopped, tmp_path / "out", check=raise_at(24))
        save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
        assert self.went_on(stopped, tmp_path / "out") == 0

    def test_not_of_a_file_that_was_cut(self, stopped: Path, tmp_path: Path) -> None:
        file = sorted((tmp_path / "out.unfinished").glob("*.safetensors"))[0]
        file.write_bytes(file.read_bytes()[:-1])
        assert self.went_on(stopped, tmp_path / "out") == 0

    def test_an_error_leaves_nothing(self, sharded_run: Path, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="Input/output"):
            merge_adapter(sharded_run, tmp_path / "out", check=raise_at(24, OSError(5, "Input/output error")))
        assert not list(tmp_path.glob("out*"))

    def test_without_what_else_the_earlier_start_left(self, sharded_run: Path, tmp_path: Path) -> None:
        def stop(folder: Path) -> None:
            assert (folder / "README.md").exists()
            raise Preempted("stop")

        with pytest.raises(Preempted):
            merge_adapter(sharded_run, tmp_path / "out", approve=stop)
        files = len(list((tmp_path / "out.unfinished").glob("*.safetensors")))
        (tmp_path / "out.unfinished" / ".shards.unfinished.123.tmp").write_text("{")  # as a kill leaves it
        assert self.went_on(sharded_run, tmp_path / "out") == files > 1
        assert not list((tmp_path / "out").glob(".*"))
        (tmp_path / "out" / "README.md").write_text("license: mit")
        assert find_damage(tmp_path / "out") is None

    def test_what_is_not_approved_does_not_appear(self, sharded_run: Path, tmp_path: Path) -> None:
        def refuse(folder: Path) -> None:
            assert find_damage(folder) is None and verify_export(folder).tensors
            raise PacktrainError("no")

        with pytest.raises(PacktrainError, match="no"):
            merge_adapter(sharded_run, tmp_path / "out", approve=refuse)
        assert not list(tmp_path.glob("out*"))


def raise_at(call: int, error: BaseException | None = None) -> Callable[[], None]:
    """A check that stops the merge at its n-th call."""
    calls = iter(range(1, 10**6))

    def check() -> None:
        if next(calls) == call:
            raise error or Preempted("stop")

    return check


TWO = """
import os, signal, sys, time
from pathlib import Path
import torch
from trainer.errors import UserError
from trainer.export.merge import merge_adapter

torch.set_num_threads(1)
run, folder, rounds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

def begin(out, approve=lambda folder: None):
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        try:
            merge_adapter(run, out, approve=approve)
            os._exit(0)
        except UserError as error:
            print(str(error).splitlines()[0], flush=True)
            os._exit(error.exit_status)
    return pid

def status(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

began = time.monotonic()
assert status(begin(folder / "alone")) == 0
seconds = time.monotonic() - began
for number in range(rounds):  # the second comes at another moment of the first's merge each time
    first = begin(folder / f"out{number}")
    time.sleep(seconds * number / rounds)
    second = begin(folder / f"out{number}")
    print(first, second, status(first), status(second), flush=True)

out, unfinished = folder / "killed", folder / "killed.unfinished"
first = begin(out, approve=lambda folder: time.sleep(60))
while not (unfinished / "README.md").exists():
    time.sleep(0.01)
before = {file: file.stat().st_mtime_ns for file in unfinished.iterdir()}
second = begin(out)
try:
    assert status(second) == 2
    assert {file: file.stat().st_mtime_ns for file in unfinished.iterdir()} == before
finally:
    os.kill(first, signal.SIGKILL)
print(first, second, status(first), status(begin(out)), flush=True)
"""
ROUNDS = 6


def test_of_two_merges_at_once_one_writes_and_the_other_is_told(tmp_path: Path, sharded_run: Path) -> None:
    """Each is a process of its own. None touches what the other writes, and a killed one holds nobody up."""
    command = [sys.executable, "-c", TWO, str(sharded_run), str(tmp_path), str(ROUNDS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = {file.name for file in (tmp_path / "alone").iterdir()}
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * ROUNDS + 2, lines
    for number, (told, ended) in enumerate(zip(lines[:-2:2], lines[1:-2:2], strict=True)):
        first, second, *statuses = ended.split()
        assert sorted(statuses) == ["0", "2"], lines
        winner, out = first if statuses[0] == "0" else second, tmp_path / f"out{number}"
        holder = f"(process {winner} on {gethostname()}|another process)"
        assert re.match(f"{out}: {holder} is writing|.*{out}:? exists", told), told
        assert find_damage(out) is None and {file.name for file in out.iterdir()} == files
    assert any("is writing this folder" in line for line in lines)

    first, _, *statuses = lines[-1].split()
    assert f"killed: process {first} on {gethostname()} is writing" in lines[-2] and statuses == ["-9", "0"]
    assert find_damage(tmp_path / "killed") is None
    assert not list(tmp_path.glob("*.unfinished*"))
