"""DeciLM against a reference written here in plain torch from the published description: files in, files out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tests.unit.test_gradients import Row, gradients, make_rows, packed_gradients, randomize_adapter, relative_error
from tests.unit.test_run import assert_same_run, records, saved_tensors, train
from trainer.checkpoint.layout import RunDir, read_manifest, write_manifest
from trainer.config import ModelConfig, RunConfig
from trainer.data.types import IGNORE_INDEX
from trainer.errors import PacktrainError, UserError
from trainer.evaluate import evaluate, find_candidates
from trainer.export.verify import verify_export
from trainer.generate import load_for_inference
from trainer.metrics.meters import flops_per_token
from trainer.model.load import load_model
from trainer.model.quantized import QuantizedLinear
from trainer.model.weights import load_base_config
from trainer.preflight import result_bytes

CPU = torch.device("cpu")
IDS = list(range(5, 45))
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, THETA, EPS = 64, 96, 8, [4, 2, 1, 4], 8, 10000.0, 1e-5
LORA: dict[str, Any] = {"r": 4, "alpha": 8}
NF4 = {"type": "nf4", "double_quant": True}
Recipe = Callable[..., RunConfig]
Weights = dict[str, torch.Tensor]


# -------------------------------------------------------------------------------------------------------- the reference


def random_weights(vocabulary: int) -> Weights:
    """Large enough that every head matters to the logits."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    weights = {
        "model.embed_tokens.weight": 4 * normal(vocabulary, HIDDEN),
        "model.norm.weight": 1 + 0.1 * normal(1, HIDDEN)[0],
        "lm_head.weight": normal(vocabulary, HIDDEN),
    }
    for layer, kv_heads in enumerate(KV_HEADS):
        shapes = {
            "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
            "self_attn.k_proj": (kv_heads * HEAD_DIM, HIDDEN),
            "self_attn.v_proj": (kv_heads * HEAD_DIM, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
            "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
            "mlp.up_proj": (INTERMEDIATE, HIDDEN),
            "mlp.down_proj": (HIDDEN, INTERMEDIATE),
        }
        weights |= {f"model.layers.{layer}.{name}.weight": normal(*shape) for name, shape in shapes.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = 1 + 0.1 * normal(1, HIDDEN)[0]
    return weights


def reference_logits(weights: Weights, ids: list[int]) -> torch.Tensor:
    """``[tokens, vocabulary]`` of one document, without a cache."""
    x = weights["model.embed_tokens.weight"][torch.tensor(ids)]
    for layer in range(len(KV_HEADS)):
        own = {name.split(".", 3)[3]: w for name, w in weights.items() if name.startswith(f"model.layers.{layer}.")}
        x = x + attention(own, norm(x, own["input_layernorm.weight"]))
        y = norm(x, own["post_attention_layernorm.weight"])
        gated = F.silu(y @ own["mlp.gate_proj.weight"].T) * (y @ own["mlp.up_proj.weight"].T)
        x = x + gated @ own["mlp.down_proj.weight"].T
    return norm(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def attention(own: Weights, x: torch.Tensor) -> torch.Tensor:
    tokens = len(x)
    q, k, v = (
        (x @ own[f"self_attn.{name}_proj.weight"].T).view(tokens, -1, HEAD_DIM).transpose(0, 1) for name in "qkv"
    )
    q, k = rotate(q), rotate(k)
    outputs = []
    for head in range(HEADS):
        shared = head * len(k) // HEADS
        scores = q[head] @ k[shared].T / HEAD_DIM**0.5
        scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf)
        outputs.append(scores.softmax(-1) @ v[shared])
    return torch.cat(outputs, dim=-1) @ own["self_attn.o_proj.weight"].T


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Pairs (i, i + half) of ``[heads, tokens, head_dim]`` as complex numbers, turned by position."""
    half = HEAD_DIM // 2
    frequencies = THETA ** (-torch.arange(half) / half)
    angles = torch.arange(x.shape[1])[:, None] * frequencies
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def reference_gradients(weights: Weights, of: Weights, rows: list[Row]) -> Weights:
    """Of the mean cross entropy over all trained tokens, a row at a time."""
    total = sum(label != IGNORE_INDEX for _, labels in rows for label in labels)
    loss = torch.zeros(())
    for ids, labels in rows:
        logits, wanted = reference_logits(weights, ids)[:-1], torch.tensor(labels)[1:]
        loss = loss + F.cross_entropy(logits, wanted, ignore_index=IGNORE_INDEX, reduction="sum") / total
    return dict(zip(of, torch.autograd.grad(loss, list(of.values()), allow_unused=True), strict=True))


def answer_by_reference(weights: Weights, ids: list[int], count: int) -> list[int]:
    """`count` tokens, greedily, the whole text computed again for each."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(reference_logits(weights, ids)[-1].argmax()))
    return ids[-count:]


def with_adapter(base: Weights, adapter: Weights) -> Weights:
    """Weights of the base with an adapter of scale ``alpha / r`` upon it, by the names of its file."""
    scale, tuned = LORA["alpha"] / LORA["r"], dict(base)
    for name in base:
        if ".layers." in name and name.endswith("_proj.weight"):
            stem = "base_model.model." + name.removesuffix(".weight")
            tuned[name] = base[name] + scale * adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"]
    return tuned


def after_four_bits(base: Weights, model: Any) -> Weights:
    """The base with the numbers that the bytes of a loaded model's 4-bit layers stand for."""
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, QuantizedLinear)}
    read = {n.replace(".base_layer", "") + ".weight": m.dequantize(torch.float32).detach() for n, m in layers.items()}
    assert len(read) == 7 * len(KV_HEADS)
    assert all((weight - base[name]).norm() < 0.15 * base[name].norm() for name, weight in read.items())
    return base | read


@torch.no_grad()
def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


# ------------------------------------------------------------------------------------------------------------- the toys


def write_config(folder: Path, vocabulary: int, **fields: Any) -> None:
    """config.json as on the hub, whose code would end the test if it were run."""
    config = {
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_decilm.DeciLMConfig",
            "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
        },
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": 512,
        "model_type": "deci",
        "naive_attention_prefill": False,
        "num_attention_heads": HEADS,
        "num_hidden_layers": len(KV_HEADS),
        "num_key_value_heads_per_layer": KV_HEADS,
        "pretraining_tp": 1,
        "rms_norm_eps": EPS,
        "rope_scaling": None,
        "rope_theta": THETA,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": vocabulary,
        **fields,
    }
    (folder / "config.json").write_text(json.dumps(config))
    for module in ("configuration_decilm.py", "modeling_decilm.py"):
        (folder / module).write_text("raise SystemExit('the code of the hub was run')\n")


@pytest.fixture(scope="module")
def base(toy_tokenizer: Any) -> Weights:
    return random_weights(len(toy_tokenizer))


@pytest.fixture(scope="module")
def decilm_dir(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: Any, base: Weights) -> Path:
    folder = tmp_path_factory.mktemp("decilm")
    toy_tokenizer.save_pretrained(folder)
    write_config(folder, len(toy_tokenizer))
    save_file(base, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def recipe(toy_recipe: Recipe, decilm_dir: Path) -> Recipe:
    return lambda **sections: toy_recipe(model={"path": str(decilm_dir)}, **sections)


@pytest.fixture(scope="module")
def qlora_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDir]:
    """Filled by the first test that asks for `trained`."""
    return {}


@pytest.fixture
def trained(qlora_run: dict[str, RunDir], recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A QLoRA run of four steps, merged and verified."""
    if not qlora_run:
        qlora_run["run"] = train(qlora(recipe), tmp_path_factory.mktemp("qlora") / "run")
    return qlora_run["run"]


def qlora(recipe: Recipe) -> RunConfig:
    return recipe(
        adapter=LORA,
        quantization=NF4,
        checkpoint={"every_steps": 2, "keep": 9, "keep_best": False},
        export={"merge": True, "verify": True},
    )


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("model_type", ["deci", "llama"])
def test_computes_as_the_reference(
    recipe: Recipe, decilm_dir: Path, base: Weights, tmp_path: Path, model_type: str
) -> None:
    folder = Path(shutil.copytree(decilm_dir, tmp_path / "base"))
    write_config(folder, len(base["lm_head.weight"]), model_type=model_type)
    wanted = reference_logits(base, IDS)
    ours = load_model(recipe().model_copy(update={"model": ModelConfig(path=str(folder), dtype="float32")}), CPU).model
    for model in (ours, load_for_inference(folder, CPU).model):
        torch.testing.assert_close(logits_of(model, IDS), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("sections", "tolerance"),
    [({}, 1e-5), ({"adapter": LORA}, 1e-5), ({"adapter": LORA, "quantization": NF4}, 1e-4)],
    ids=["full", "lora", "qlora"],
)
def test_packed_step_has_the_gradients_of_rows_one_by_one(
    recipe: Recipe, base: Weights, sections: dict[str, Any], tolerance: float
) -> None:
    model = load_model(recipe(**sections), CPU).model
    randomize_adapter(model)
    rows = make_rows([9, 1, 17, 5, 12, 30])
    trained = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
    adapter = {name.replace(".default", ""): weight for name, weight in trained.items()}
    frozen = after_four_bits(base, model) if "quantization" in sections else base
    weights = with_adapter(frozen, adapter) if sections else trained

    found = packed_gradients(model, [rows[:3], rows[3:]], torch.float32)

    assert relative_error(found, reference_gradients(weights, trained, rows)) <= tolerance


def test_resumed_is_the_uninterrupted_run(trained: RunDir, recipe: Recipe, tmp_path: Path) -> None:
    resumed = RunDir(Path(shutil.copytree(trained.path, tmp_path / "run")))
    for folder in (resumed.step_dir(4), resumed.adapter, resumed.merged):
        shutil.rmtree(folder)

    train(qlora(recipe), resumed.path)

    assert [r["event"] for r in records(resumed, "event")].count("resume") == 1
    assert_same_run(trained, resumed, 4)
    assert resumed.read_state()["state"] == "done"


# ----------------------------------------------------------------------------------------------------------- the result


@pytest.fixture
def tuned(trained: RunDir, recipe: Recipe, base: Weights) -> Weights:
    """What `trained` learned, on the base it saw."""
    frozen = after_four_bits(base, load_model(qlora(recipe), CPU).model)
    return with_adapter(frozen, load_file(trained.adapter / "adapter_model.safetensors"))


def test_merged_is_a_plain_llama_that_computes_the_same(trained: RunDir, tuned: Weights) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained.merged)
    assert type(model) is LlamaForCausalLM
    torch.testing.assert_close(logits_of(model, IDS), reference_logits(tuned, IDS), rtol=1e-5, atol=1e-5)
    config = json.loads((trained.merged / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["num_key_value_heads"] == max(KV_HEADS)
    assert not {"auto_map", "num_key_value_heads_per_layer"} & set(config)
    assert not list(trained.merged.glob("*.py"))


def test_answers_with_a_cache_are_those_without(trained: RunDir, tuned: Weights) -> None:
    for folder in (trained.path, trained.merged):
        loaded = load_for_inference(folder, CPU)
        prompts = [loaded.prompt_ids(text) for text in ("Write a b c d backwards.", "Sort b a.")]
        answers = loaded.answer(prompts, 12)
        for ids, answer in zip(prompts, answers, strict=True):
            tokens = answer_by_reference(tuned, ids, 12)
            ends = [i for i, token in enumerate(tokens) if token == loaded.tokenizer.eos_token_id]
            tokens = tokens[: ends[0]] if ends else tokens
            assert answer == loaded.tokenizer.decode(tokens, skip_special_tokens=True)


def test_run_and_merged_model_have_one_loss(trained: RunDir) -> None:
    candidates = find_candidates([trained.path, trained.merged], None, "validation")
    of_run, of_merged = (evaluate(candidate, exact_match=False, device=CPU).total for candidate in candidates)
    assert of_merged.loss == pytest.approx(of_run.loss, rel=1e-5)


def test_a_copy_of_a_head_that_differs_is_found(trained: RunDir, tmp_path: Path) -> None:
    merged = Path(shutil.copytree(trained.merged, tmp_path / "merged"))
    record = read_manifest(merged)
    tensors = load_file(merged / "model.safetensors")
    tensors["model.layers.2.self_attn.v_proj.weight"][-1] += 1e-3  # the last of four copies
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    write_manifest(merged, {key: value for key, value in record.items() if key != "files"})
    with pytest.raises(PacktrainError, match=r"layers\.2\.self_attn\.v_proj\.weight: the copies of a head differ"):
        verify_export(merged)


def test_full_fine_tuning_leaves_a_plain_llama(recipe: Recipe, tmp_path: Path) -> None:
    run = train(recipe(), tmp_path / "run")
    weights = {n.removeprefix("model."): w for n, w in saved_tensors(run, 4).items() if n.startswith("model.")}

    model = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32)

    assert type(model) is LlamaForCausalLM
    torch.testing.assert_close(logits_of(model, IDS), reference_logits(weights, IDS), rtol=1e-5, atol=1e-5)
    config = recipe()
    foretold = result_bytes(load_model(config, CPU).model, config)
    assert foretold == sum(tensor.numel() * 4 for tensor in load_file(run.model / "model.safetensors").values())


# -------------------------------------------------------------------------------------------------- arithmetic, refusal


def test_flops_are_those_that_torch_counts(recipe: Recipe) -> None:
    model: Any = load_model(recipe(), CPU).model
    model.set_attn_implementation("eager")
    embeddings = torch.randn(1, 24, HIDDEN, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embeddings, use_cache=False).logits.sum().backward()
    flops = flops_per_token(model.config, trains_base=True, mean_attended=24)
    assert counter.get_total_flops() == pytest.approx(flops.total(24, 24), rel=1e-3)
    assert gradients(model)


def test_a_random_base_needs_its_config_alone(decilm_dir: Path, recipe: Recipe, tmp_path: Path) -> None:
    shutil.copy(decilm_dir / "config.json", tmp_path / "config.json")
    model = ModelConfig(path=str(tmp_path / "config.json"), init="random", tokenizer=str(decilm_dir), dtype="float32")
    loaded = load_model(recipe().model_copy(update={"model": model}), CPU)
    shapes = [loaded.model.get_parameter(f"model.layers.{i}.self_attn.v_proj.weight").shape[0] for i in range(4)]
    assert shapes == [heads * HEAD_DIM for heads in KV_HEADS]


@pytest.mark.parametrize("model_type", ["deci", "llama"])
@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([4, 2, 1], r"3 numbers\n  allowed: a list of 4 numbers"),
        ([4, 2, 1, 0], r"0 in layer 3\n  allowed: a divisor of 8"),
        ([4, 3, 1, 4], r"3 in layer 1\n  allowed: a divisor of 8"),
        ([4, 2, -1, 4], r"-1 in layer 2\n  allowed: a divisor of 8"),
        ([4, 16, 1, 4], r"16 in layer 1\n  allowed: a divisor of 8"),
        ([4, 2, "1", 4], r"'1' in layer 2\n  allowed: a divisor of 8"),
        ([4, 2, 2.0, 4], r"2\.0 in layer 2\n  allowed: a divisor of 8"),
        ("4212", r"'4212'\n  allowed: a list of 4 numbers"),
    ],
)
def test_refuses_heads_that_fit_no_model(tmp_path: Path, model_type: str, heads: Any, message: str) -> None:
    write_config(tmp_path, 64, model_type=model_type, num_key_value_heads_per_layer=heads)
    with pytest.raises(UserError, match=message) as error:
        load_base_config(ModelConfig(path=str(tmp_path)))
    assert error.value.where == f"{tmp_path / 'config.json'}: num_key_value_heads_per_layer"


def test_refuses_a_decilm_that_tells_no_heads(tmp_path: Path) -> None:
    write_config(tmp_path, 64, num_key_value_heads_per_layer=None)
    with pytest.raises(UserError, match=r"num_key_value_heads_per_layer: None\n  allowed: a list of 4 numbers"):
        load_base_config(ModelConfig(path=str(tmp_path)))
