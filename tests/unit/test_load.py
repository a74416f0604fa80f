"""Loading: what transformers would load, in the dtypes asked for, tensor by tensor; or a message that says why not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from trainer.config import ModelConfig, RunConfig
from trainer.errors import UserError
from trainer.launchers import World
from trainer.model import source, weights
from trainer.model.build import build_model
from trainer.model.load import load_model, load_weights
from trainer.model.nf4 import FourBit
from trainer.model.quantized import QuantizedLinear, fingerprint
from trainer.model.recompute import set_recompute
from trainer.model.shapes import SHAPES, published_shape
from trainer.model.source import TensorReader, list_tensors
from trainer.model.tokenizer import load_tokenizer
from trainer.model.weights import base_content_hash, build_on_meta, load_base_config, random_tensor
from trainer.planning.levels import read_levels
from trainer.processes import Processes

CPU = torch.device("cpu")
IDS = torch.arange(5, 25)[None]
Recipe = Callable[..., RunConfig]
QLORA: dict[str, Any] = {"adapter": {"r": 4}, "quantization": {"type": "nf4", "double_quant": True}}


@pytest.fixture
def model_dir(toy_model_dir: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(toy_model_dir, tmp_path / "model"))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def reference_logits(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


# ------------------------------------------------------------------------------------------------------ what comes back


def test_equals_from_pretrained(toy_recipe: Recipe, toy_model_dir: Path) -> None:
    torch.testing.assert_close(logits(load_model(toy_recipe(), CPU).model), reference_logits(toy_model_dir))


def test_sharded_files(toy_recipe: Recipe, toy_model_dir: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(toy_model_dir).save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model = load_model(toy_recipe(model={"path": str(tmp_path)}), CPU).model
    torch.testing.assert_close(logits(model), reference_logits(toy_model_dir))


@pytest.mark.parametrize("head_in_file", [False, True])
def test_tied_embeddings(toy_recipe: Recipe, toy_tied_model_dir: Path, tmp_path: Path, head_in_file: bool) -> None:
    folder = Path(shutil.copytree(toy_tied_model_dir, tmp_path / "tied"))
    if head_in_file:
        tensors = load_file(folder / "model.safetensors")
        save_file(
            {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors"
        )
    model: Any = load_model(toy_recipe(model={"path": str(folder)}), CPU).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits(model), reference_logits(toy_tied_model_dir))


def test_llama3_rotary_frequencies_and_biases(toy_recipe: Recipe, tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=64, rope_parameters=rope, attention_bias=True, mlp_bias=True, **shape)
    reference = LlamaForCausalLM(config).eval()
    for name, parameter in reference.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    reference.save_pretrained(tmp_path)

    model: Any = load_model(toy_recipe(model={"path": str(tmp_path)}), CPU).model
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, reference.model.rotary_emb.inv_freq)
    torch.testing.assert_close(logits(model), logits(reference))
    quantized = load_model(toy_recipe(model={"path": str(tmp_path)}, **QLORA), CPU).model
    assert (logits(quantized) - logits(reference)).abs().max() < 0.3 * logits(reference).abs().max()


def test_mistral_without_a_window_and_stale_rotary_buffers(toy_recipe: Recipe, tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    reference = MistralForCausalLM(MistralConfig(vocab_size=64, num_key_value_heads=1, sliding_window=None, **shape))
    reference.eval().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    stale = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file({**tensors, **stale}, tmp_path / "model.safetensors")

    model = load_model(toy_recipe(model={"path": str(tmp_path)}), CPU).model

    torch.testing.assert_close(logits(model), logits(reference))


def test_dtypes_and_what_is_trained(toy_recipe: Recipe) -> None:
    half = {"dtype": "bfloat16"}
    full = load_model(toy_recipe(model=half, train={"param_dtype": "float32"}), CPU).model
    assert {(p.dtype, p.requires_grad) for p in full.parameters()} == {(torch.float32, True)}
    low = load_model(toy_recipe(model=half, train={"param_dtype": "bfloat16"}), CPU).model
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    lora = load_model(toy_recipe(model=half, adapter={"r": 4}), CPU).model
    for name, parameter in lora.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)
    qlora = load_model(toy_recipe(model=half, **QLORA), CPU).model
    kinds = {name.rpartition(".")[2]: p.dtype for name, p in qlora.named_parameters() if "lora_" not in name}
    assert kinds == {"packed": torch.uint8, "scales": torch.uint8, "weight": torch.bfloat16}


def test_quantised_base_is_the_file_quantised(toy_recipe: Recipe, toy_model_dir: Path) -> None:
    loaded = load_model(toy_recipe(**QLORA), CPU)
    base: Any = loaded.model.get_base_model()  # type: ignore[operator]
    layer = base.model.layers[1].mlp.down_proj.base_layer
    weight = load_file(toy_model_dir / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]

    packed, scales = FourBit("nf4", True).quantize(weight)

    assert torch.equal(layer.packed, packed)
    assert torch.equal(layer.scales, scales)
    assert sum(isinstance(module, QuantizedLinear) for module in base.modules()) == 14
    assert isinstance(base.lm_head, nn.Linear)
    assert loaded.base.nf4_fingerprint == fingerprint(base)


def test_training_never_writes_to_the_files(toy_recipe: Recipe, model_dir: Path) -> None:
    model = load_model(toy_recipe(model={"path": str(model_dir)}), CPU).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    (model_dir / "model.safetensors").write_bytes(b"")  # a model that still read from it would crash
    assert logits(model).isfinite().all()


def test_identity(toy_recipe: Recipe, model_dir: Path) -> None:
    config = toy_recipe(model={"path": str(model_dir)}, **QLORA)
    first = load_model(config, CPU).base
    assert first == load_model(config, CPU).base
    assert first.path == str(model_dir)
    assert first.quantization == {"type": "nf4", "double_quant": True, "compute_dtype": "float32"}
    tensors = load_file(model_dir / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, model_dir / "model.safetensors")
    assert load_model(config, CPU).base.content_hash != first.content_hash


def test_hub_snapshot_of_the_cache(toy_recipe: Recipe, toy_model_dir: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import huggingface_hub.constants

    commit = "a" * 40
    repository = tmp_path / "models--owner--toy"
    shutil.copytree(toy_model_dir, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    loaded = load_model(toy_recipe(model={"path": "owner/toy"}), CPU)

    torch.testing.assert_close(logits(loaded.model), reference_logits(toy_model_dir))
    assert loaded.base.revision == commit


EVERYTHING: dict[str, Any] = {**QLORA, "adapter": {"r": 4, "dora": True, "modules_to_save": ["lm_head"]}}


@pytest.mark.parametrize(
    ("sections", "tied"),
    [({}, False), ({}, True), ({"adapter": {"r": 4}}, False), ({"adapter": {"r": 4}}, True), (EVERYTHING, False)],
    ids=["full", "tied", "lora", "tied lora", "everything"],
)
def test_built_without_storage_and_every_parameter_placed_once(
    toy_recipe: Recipe, toy_model_dir: Path, toy_tied_model_dir: Path, sections: dict[str, Any], tied: bool
) -> None:
    model = {"path": str(toy_tied_model_dir if tied else toy_model_dir), "dtype": "bfloat16"}
    config = toy_recipe(model=model, **sections)
    loaded = load_model(config, CPU)

    built = build_model(config, CPU)
    layout = [(name, p.shape, p.dtype, p.requires_grad, p.device.type) for name, p in built.model.named_parameters()]
    placed: dict[nn.Parameter, torch.Tensor] = {}
    marks: list[str] = []

    def place(owner: nn.Module, leaf: str, whole: torch.Tensor) -> None:
        parameter = owner.get_parameter(leaf)
        assert parameter not in placed
        assert parameter.shape == whole.shape
        placed[parameter] = whole.clone()

    identity = load_weights(built, config, place, Processes(World(), CPU), marks.append)

    wanted = dict(loaded.model.named_parameters())
    assert layout == [(name, p.shape, p.dtype, p.requires_grad, "meta") for name, p in wanted.items()]
    for name, parameter in built.model.named_parameters():
        assert torch.equal(placed.pop(parameter).to(parameter.dtype), wanted[name])
    assert not placed
    assert set(built.adapter_init) == {name for name in wanted if "lora_A" in name or "lora_B" in name}
    assert identity == loaded.base
    assert {f"loading {stored.name}" for stored in list_tensors(config.model)} <= set(marks)


def test_tensors_larger_than_a_read(toy_recipe: Recipe, toy_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "READ_BYTES", 1000)
    torch.testing.assert_close(logits(load_model(toy_recipe(), CPU).model), reference_logits(toy_model_dir))


def test_tensors_come_in_the_order_of_the_files(toy_model_dir: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(toy_model_dir).save_pretrained(tmp_path, max_shard_size="50KB")
    places = [(stored.file, stored.offset) for stored in list_tensors(ModelConfig(path=str(tmp_path)))]
    assert places == sorted(places)
    assert len({file for file, _ in places}) > 2


@pytest.mark.parametrize("sharded", [False, True])
def test_content_hash_while_loading_is_that_of_the_files(
    toy_recipe: Recipe, toy_model_dir: Path, tmp_path: Path, sharded: bool
) -> None:
    folder = toy_model_dir
    if sharded:
        AutoModelForCausalLM.from_pretrained(toy_model_dir).save_pretrained(tmp_path, max_shard_size="50KB")
        folder = tmp_path
    config = toy_recipe(model={"path": str(folder)})
    assert load_model(config, CPU).base.content_hash == base_content_hash(config.model, config.train.seed)


@pytest.mark.parametrize("sections", [{}, {"adapter": {"r": 4}}, QLORA], ids=["full", "lora", "qlora"])
def test_recompute_keeps_little(toy_recipe: Recipe, sections: dict[str, Any]) -> None:
    model = load_model(toy_recipe(**sections), CPU).model.train()

    def kept() -> int:
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(input_ids=IDS, use_cache=False).logits.sum().backward()
        return sum(sizes.values())

    everything = kept()
    set_recompute(model, read_levels("full", 2))
    # Inside a checkpoint its own hooks see the tensors: what reaches ours is the layers' inputs, embeddings and head.
    assert kept() < 0.5 * everything
    set_recompute(model, read_levels("none", 2))
    assert kept() == everything


# --------------------------------------------------------------------------------------------------------------- memory

MEASURE = """
import sys, threading, time, torch
from trainer.config import RunConfig
from trainer.model.load import load_model

def anonymous_bytes():
    status = open("/proc/self/status").read()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024

def load(method, path):
    config = RunConfig.model_validate({
        "model": {"path": path, "dtype": "float16"}, "adapter": {"r": 1},
        "quantization": {} if method == "qlora" else None,
        "data": {"train": [{"path": "x", "format": "messages"}]},
    })
    return load_model(config, torch.device("cpu")).model

def measure(method, path):
    start, peak, done = anonymous_bytes(), 0, False

    def watch():
        nonlocal peak
        while not done:
            peak = max(peak, anonymous_bytes())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    model = load(method, path)
    done = True
    thread.join()
    print("MEASURED", peak - start - sum(p.numel() * p.element_size() for p in model.parameters()))

torch.set_num_threads(1)
load("qlora", sys.argv[1])  # imports, and what a first load allocates for good
for method, path in zip(("qlora", "lora"), sys.argv[2:]):
    measure(method, path)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_host_memory_while_loading(toy_model_dir: Path, tmp_path: Path) -> None:
    """Beside the model itself (the device is the CPU here) there are a tensor or two and the quantiser's work."""
    folders, allowed = [], 0
    for layers in (8, 24):
        shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": layers}
        config = LlamaConfig(vocab_size=512, num_attention_heads=8, architectures=["LlamaForCausalLM"], **shape)
        folders.append(tmp_path / str(layers))
        config.save_pretrained(folders[-1])
        sizes = _write_zeros(folders[-1], config)
        allowed = 2 * max(sizes) + 2**27
        assert sum(sizes) > allowed  # a loader that holds the model fails below

    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(toy_model_dir), *map(str, folders)],
        capture_output=True,
        text=True,
        check=False,
    )

    beside = [int(line.split()[1]) for line in result.stdout.splitlines() if line.startswith("MEASURED")]
    assert len(beside) == 2, result.stderr
    assert max(beside) < allowed


def _write_zeros(folder: Path, config: LlamaConfig) -> list[int]:
    """A sparse safetensors file of float16 zeros; sizes of its tensors in bytes."""
    header, offset, sizes = {}, 0, []
    for name, parameter in build_on_meta(config, torch.float16, "eager").named_parameters():
        sizes.append(parameter.numel() * 2)
        header[name] = {"dtype": "F16", "shape": list(parameter.shape), "data_offsets": [offset, offset + sizes[-1]]}
        offset += sizes[-1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return sizes


# -------------------------------------------------------------------------------------------------------------- refusal


def _edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def _edit_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def _shard(folder: Path) -> Path:
    """Splits the single file, and returns the first shard."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    return sorted(folder.glob("model-*.safetensors"))[0]


def _drop_from_shard(folder: Path) -> None:
    shard = _shard(folder)
    tensors = load_file(shard)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, shard)


def _only_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


NORM = "model.norm.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda folder: _truncate(folder / "model.safetensors"), r"model\.safetensors: truncated"),
    "truncated shard": (lambda folder: _truncate(_shard(folder)), r"model-00001-of-\d+\.safetensors: truncated"),
    "empty file": (lambda folder: (folder / "model.safetensors").write_bytes(b""), r"model\.safetensors: truncated"),
    "missing shard": (lambda folder: _shard(folder).unlink(), r"model-00001-of-\d+\.safetensors: .*missing"),
    "tensor not in shard": (_drop_from_shard, r"model-00001-of-\d+\.safetensors: tensor .* is missing"),
    "broken index": (lambda folder: [_shard(folder), (folder / weights.INDEX).write_text("{}")], "index"),
    "tensor missing": (lambda folder: _edit_tensors(folder, lambda t: t.pop(NORM)), f"no tensor {NORM}"),
    "tensor unexpected": (lambda folder: _edit_tensors(folder, lambda t: t.update(odd=torch.ones(1))), "tensor odd"),
    "tensor of another shape": (
        lambda folder: _edit_tensors(folder, lambda t: t.update({NORM: torch.ones(7)})),
        rf"{NORM} of shape \[7\]",
    ),
    "tensor of integers": (
        lambda folder: _edit_tensors(folder, lambda t: t.update({NORM: t[NORM].to(torch.int8)})),
        "of I8",
    ),
    "NaN": (lambda folder: _edit_tensors(folder, lambda t: t[NORM].fill_(torch.nan)), f"{NORM} holds NaN"),
    "weights in a pickle": (_only_bin, "convert"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"no config\.json"),
    "config no json": (lambda folder: (folder / "config.json").write_text("{"), "not a model config"),
    "another family": (lambda folder: _edit_config(folder, model_type="gpt2"), "model_type gpt2"),
    "quantised already": (
        lambda folder: _edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4}),
        "already quantised",
    ),
    "sliding window": (lambda folder: _edit_config(folder, model_type="mistral", sliding_window=16), "16 back"),
    "tied but different": (
        lambda folder: _edit_config(folder, tie_word_embeddings=True),
        "differs from the embeddings",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("sections", [{}, QLORA], ids=["full", "qlora"])
def test_refuses_a_broken_base(toy_recipe: Recipe, model_dir: Path, damage: str, sections: dict[str, Any]) -> None:
    spoil, message = DAMAGES[damage]
    spoil(model_dir)
    with pytest.raises(UserError, match=message):
        load_model(toy_recipe(model={"path": str(model_dir)}, **sections), CPU)


@pytest.mark.parametrize(
    ("path", "message"), [("./nowhere", "no folder"), ("nobody/nothing", "hub did not give it"), ("a/b/c", "no folder")]
)
def test_refuses_a_base_that_is_nowhere(toy_recipe: Recipe, path: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_model(toy_recipe(model={"path": path}), CPU)
    assert error.value.where == "model.path"


# --------------------------------------------------------------------------------------------------------------- random


PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-chat-hf": 13_015_864_320,
    "NousResearch/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
}


@pytest.mark.parametrize("hub_id", PUBLISHED)
def test_published_shapes_have_the_published_size(hub_id: str) -> None:
    config = load_base_config(ModelConfig(path=hub_id, init="random"))
    model = build_on_meta(config, torch.bfloat16, "eager")
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[hub_id]


def test_unknown_shapes() -> None:
    assert published_shape("somebody/Llama-2-7b-hf") is None
    assert published_shape("meta-llama/Llama-9-7b") is None
    assert all("/" not in name for name in SHAPES)
    with pytest.raises(UserError, match="Llama-2-7b"):
        load_base_config(ModelConfig(path="Llama-7", init="random"))


@pytest.mark.parametrize("name", ["", "config.json"])
@pytest.mark.parametrize("sections", [{}, QLORA], ids=["full", "qlora"])
def test_random_base_needs_a_config_alone(toy_recipe: Recipe, model_dir: Path, sections: Any, name: str) -> None:
    (model_dir / "model.safetensors").unlink()
    random = {"path": str(model_dir / name), "init": "random"}
    first, again = (load_model(toy_recipe(model=random, **sections), CPU) for _ in range(2))
    other = load_model(toy_recipe(model=random, train={"seed": 7}, **sections), CPU)

    assert torch.equal(logits(first.model), logits(again.model))
    assert first.base == again.base
    assert not torch.allclose(logits(first.model), logits(other.model), atol=1e-3)
    assert first.base.content_hash != other.base.content_hash


def test_random_base_can_be_had_again_from_its_seed(toy_recipe: Recipe) -> None:
    config = toy_recipe(model={"init": "random"})
    model = load_model(config, CPU).model
    with TensorReader(config.model, config.train.seed, CPU) as reader:
        tensors = {stored.name: reader.read(stored) for stored in list_tensors(config.model)}
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == {
        n: t.shape for n, t in tensors.items()
    }
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in tensors.items())


def test_random_numbers_look_normal_and_do_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(name: str = "w", seed: int = 0) -> torch.Tensor:
        return random_tensor(name, torch.Size([500, 400]), 0.02, seed, torch.float32, CPU)

    values = draw()
    assert abs(values.mean()) < 2e-4
    assert abs(values.std() - 0.02) < 2e-4
    assert 0.66 < (values.abs() < 0.02).float().mean() < 0.70
    assert abs(torch.corrcoef(torch.stack([values.view(-1)[:-1], values.view(-1)[1:]]))[0, 1]) < 0.01
    assert not torch.equal(values, draw(seed=1))
    assert abs(torch.corrcoef(torch.stack([values.view(-1), draw("v").view(-1)]))[0, 1]) < 0.01
    monkeypatch.setitem(weights.RANDOM_CHUNK, "cpu", 777)
    assert torch.equal(values, draw())


def test_random_numbers_are_pinned() -> None:
    """A run is resumed and merged on weights made from its seed: they may never change."""
    values = random_tensor("w", torch.Size([2, 2]), 1.0, 42, torch.float32, CPU)
    assert values.view(-1).tolist() == pytest.approx([-1.7786451, 0.9896603, -1.2303756, -0.4133760], abs=1e-7)


def test_content_hash_of_a_random_base_does_not_depend_on_the_folder(model_dir: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(model_dir, tmp_path / "copy")
    first, second = (base_content_hash(ModelConfig(path=str(p), init="random"), 1) for p in (model_dir, copied))
    assert first == second


# ------------------------------------------------------------------------------------------------------------ tokenizer


def test_tokenizer_gets_a_pad_token_and_nothing_else(toy_model_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(toy_model_dir)
    tokenizer = load_tokenizer(ModelConfig(path=str(toy_model_dir)))
    assert tokenizer.pad_token is not None
    assert len(tokenizer) == len(plain)
    assert tokenizer.chat_template == plain.chat_template
    assert tokenizer("some text").input_ids == plain("some text").input_ids


@pytest.mark.parametrize(
    ("special", "pad"),
    [
        ({"eos_token": "</s>", "unk_token": "<unk>"}, "<unk>"),
        ({"eos_token": "</s>", "extra": "<|finetune_right_pad_id|>"}, "<|finetune_right_pad_id|>"),
        ({"eos_token": "</s>", "extra": "<|reserved_special_token_0|>"}, "<|reserved_special_token_0|>"),
        ({"eos_token": "</s>"}, "</s>"),
        ({"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}, "<pad>"),
    ],
)
def test_choice_of_the_pad_token(special: dict[str, str], pad: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tokens = ["word", *special.values()]
    raw = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="word"))
    named = {key: value for key, value in special.items() if key != "extra"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **named).save_pretrained(tmp_path)

    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path)))

    assert tokenizer.pad_token == pad
    assert len(tokenizer) == len(tokens)


def test_no_tokenizer(tmp_path: Path, toy_model_dir: Path) -> None:
    with pytest.raises(UserError, match=r"model\.path"):
        load_tokenizer(ModelConfig(path=str(tmp_path)))
    with pytest.raises(UserError, match=r"model\.tokenizer"):
        load_tokenizer(ModelConfig(path=str(toy_model_dir), tokenizer="nobody/nothing"))
