"""The planner: predictions against real modules and measured runs, and what it chooses."""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.cli import main
from trainer import loss
from trainer.config import RunConfig
from trainer.errors import EXIT_USER_ERROR, UserError
from trainer.model.build import build_model
from trainer.model.folder import read_sizes
from trainer.model.layers import adapters_of_layers
from trainer.model.load import load_model
from trainer.model.recompute import decoder_layers, has_fused_layers, set_recompute
from trainer.model.shapes import published_shape
from trainer.planner import Candidate, plan, smaller_weights
from trainer.planning import memory
from trainer.planning.hardware import GIB, find_gpu, gpu_at_hand
from trainer.planning.host import checkpoint_bytes, predict_disk
from trainer.planning.job import Job, Kind, Setting
from trainer.planning.levels import LEVELS, LayerLevels, read_levels
from trainer.planning.memory import predict_memory, saved_bytes
from trainer.planning.shape import ModelShape
from trainer.planning.speed import predict_step
from trainer.preflight import checkpoint_bytes as real_checkpoint_bytes
from trainer.preflight import result_bytes as real_result_bytes

LLAMA_7B, LLAMA_13B, LLAMA_70B = (f"meta-llama/Llama-2-{size}-hf" for size in ("7b", "13b", "70b"))
LLAMA_3 = "meta-llama/Meta-Llama-3-8B"
LORA: dict[str, Any] = {"adapter": {"r": 16}}
QLORA: dict[str, Any] = {**LORA, "quantization": {"type": "nf4"}}
METHODS: dict[str, dict[str, Any]] = {"full": {}, "lora": LORA, "qlora": QLORA}


def job(
    model: str, gpu: str = "H200", gpus: int = 1, packs: int = 16, fused: bool | None = None, **sections: Any
) -> Job:
    shape = published_shape(model)
    assert shape is not None
    fields: dict[str, Any] = {
        "model": {"path": model, "init": "random"},
        "data": {"train": [{"path": "rows.jsonl", "format": "messages"}]},
        "train": {"global_batch": {"rows": packs}},
    }
    for name, section in sections.items():
        fields[name] = {**fields.get(name, {}), **section}
    return Job(RunConfig.model_validate(fields), ModelShape.build(shape), find_gpu(gpu), gpus, fused=fused)


SMALLER = {
    "an adapter": "train an adapter (adapter: {method: lora})",
    "4 bits": "quantise the base (quantization: {type: nf4})",
    "8-bit moments": "take optim.name: adamw_8bit",
    "host": "keep weights in host memory (strategy.offload: all)",
    "more GPUs": "cut the model over more GPUs",
    "fsdp2": "cut the model over more GPUs (strategy.kind: fsdp2)",
}


@pytest.mark.parametrize(
    ("sections", "open_ways"),
    [
        ({}, ["an adapter", "8-bit moments", "host", "more GPUs"]),
        ({"strategy": {"kind": "ddp"}}, ["an adapter", "8-bit moments", "fsdp2"]),
        ({"strategy": {"kind": "zero3"}}, ["an adapter", "host", "more GPUs"]),
        ({"strategy": {"offload": "all"}}, ["an adapter", "more GPUs"]),
        ({"optim": {"name": "adamw_8bit"}}, ["an adapter", "more GPUs"]),
        (LORA, ["4 bits", "more GPUs"]),
        ({**LORA, "quantization": {"type": "int8"}}, ["4 bits", "more GPUs"]),
        ({**QLORA, "strategy": {"kind": "single"}}, ["fsdp2"]),
        (QLORA, ["more GPUs"]),
    ],
)
def test_advice_leaves_out_what_the_recipe_does(sections: dict[str, Any], open_ways: list[str]) -> None:
    assert smaller_weights(job(LLAMA_7B, **sections).config) == [SMALLER[way] for way in open_ways]


# ------------------------------------------------------------------------------------------------ against measured runs

# One H200, torch 2.11, steps of two micro-batches, adamw. Documents: tokens of a pack, share of them that is trained,
# positions that a token attends to. Attention is flash-attn-4's or torch's; packs of a micro-batch; level; GiB that
# torch allocated at most; tok/s. `benchmarks/planner.py` measures such points.
BFLOAT16: dict[str, Any] = {"train": {"param_dtype": "bfloat16"}}
FLOAT8: dict[str, Any] = {**QLORA, "train": {"float8": True}}
INT8: dict[str, Any] = {**LORA, "quantization": {"type": "int8"}}
INT8_FLOAT8: dict[str, Any] = {**INT8, "train": {"float8": True}}
LORA_FLOAT8: dict[str, Any] = {**LORA, "train": {"float8": True}}
SHORT, SHORT_8192, LONG = (4096, 0.724, 167), (8192, 0.724, 167), (8192, 0.995, 3842)
Point = tuple[str, dict[str, Any], tuple[int, float, float], bool, int, str, float, float]
MEASURED: list[Point] = [
    (LLAMA_7B, QLORA, SHORT, False, 4, "none", 69.9, 20312),
    (LLAMA_7B, QLORA, SHORT, False, 4, "norms", 51.3, 20059),
    (LLAMA_7B, QLORA, SHORT, False, 4, "mlp", 30.4, 17000),
    (LLAMA_7B, QLORA, SHORT, False, 4, "full", 11.4, 13790),
    (LLAMA_7B, QLORA, SHORT, False, 1, "none", 20.8, 18870),
    (LLAMA_7B, QLORA, SHORT, False, 1, "norms", 16.2, 18794),
    (LLAMA_7B, QLORA, SHORT, False, 1, "mlp", 10.9, 15910),
    (LLAMA_7B, QLORA, SHORT, False, 1, "full", 6.1, 12555),
    (LLAMA_7B, LORA, SHORT, False, 4, "none", 78.9, 20138),
    (LLAMA_7B, LORA, SHORT, False, 4, "norms", 60.2, 19779),
    (LLAMA_7B, LORA, SHORT, False, 1, "none", 29.8, 17913),
    (LLAMA_7B, LORA, SHORT, False, 1, "norms", 25.1, 17935),
    (LLAMA_7B, BFLOAT16, SHORT, False, 4, "none", 116.0, 14491),
    (LLAMA_7B, BFLOAT16, SHORT, False, 2, "none", 83.8, 14001),
    (LLAMA_13B, QLORA, SHORT, False, 1, "none", 33.6, 10141),
    (LLAMA_70B, QLORA, SHORT, False, 1, "none", 122.7, 2035),
    (LLAMA_70B, QLORA, SHORT, False, 1, "mlp", 60.3, 1616),
    (LLAMA_7B, FLOAT8, SHORT, False, 4, "none", 70.1, 28692),
    (LLAMA_7B, LORA_FLOAT8, SHORT, False, 4, "none", 79.1, 28250),
    (LLAMA_7B, INT8_FLOAT8, SHORT, False, 4, "none", 73.0, 28711),
    (LLAMA_7B, QLORA, SHORT, False, 2, "none", 37.1, 19491),
    (LLAMA_7B, QLORA, SHORT, False, 2, "norms", 27.8, 19262),
    (LLAMA_7B, QLORA, SHORT, False, 2, "mlp", 17.3, 16397),
    (LLAMA_7B, QLORA, SHORT, False, 2, "full", 7.8, 13394),
    (LLAMA_7B, BFLOAT16, SHORT, False, 4, "mlp", 76.4, 12954),
    (LLAMA_7B, BFLOAT16, SHORT, False, 2, "mlp", 63.6, 12640),
    (LLAMA_7B, BFLOAT16, SHORT, False, 1, "none", 67.6, 13456),
    (LLAMA_7B, BFLOAT16, SHORT, False, 1, "mlp", 57.6, 11887),
    (LLAMA_13B, QLORA, SHORT, False, 4, "none", 110.0, 10891),
    (LLAMA_13B, QLORA, SHORT, False, 4, "mlp", 47.9, 9051),
    (LLAMA_13B, QLORA, SHORT, False, 1, "mlp", 17.8, 8386),
    (LLAMA_3, QLORA, SHORT_8192, False, 4, "norms", 101.5, 18407),
    (LLAMA_3, QLORA, SHORT_8192, False, 2, "none", 75.6, 18202),
    (LLAMA_3, QLORA, SHORT_8192, False, 2, "norms", 53.7, 17962),
    (LLAMA_70B, QLORA, SHORT, False, 1, "norms", 94.9, 2045),
    (LLAMA_7B, INT8, SHORT, False, 4, "none", 72.8, 20177),
    (LLAMA_7B, FLOAT8, SHORT, False, 4, "norms", 51.5, 28227),
    (LLAMA_7B, FLOAT8, SHORT, False, 4, "mlp", 30.4, 24331),
    (LLAMA_7B, QLORA, SHORT, True, 4, "none", 69.9, 20568),
    (LLAMA_7B, QLORA, SHORT, True, 6, "none", 102.7, 20859),
    (LLAMA_7B, QLORA, SHORT, True, 7, "none", 119.1, 20786),
    (LLAMA_7B, LORA, SHORT, True, 4, "none", 78.8, 20340),
    (LLAMA_7B, LORA, SHORT, True, 5, "none", 95.2, 20480),
    (LLAMA_7B, BFLOAT16, SHORT, True, 4, "none", 116.0, 14925),
    (LLAMA_7B, QLORA, LONG, True, 2, "none", 69.9, 16662),
    (LLAMA_7B, QLORA, LONG, True, 2, "full", 11.3, 11649),
    (LLAMA_7B, QLORA, LONG, False, 2, "none", 69.9, 14119),
]


def check_prediction(point: Point, kind: Kind, gpus: int, rounds: int, memory: float, rate: float) -> None:
    """`memory` and `rate` are the errors that are allowed, `rounds` the micro-batches of a step."""
    model, method, (pack_length, trained_share, attended), flash4, packs, level, gib, tokens_per_second = point
    sections = {**method, "data": {"pack_length": pack_length}}
    measured = job(model, gpus=gpus, packs=gpus * rounds * packs, **sections)
    measured = replace(measured, trained_share=trained_share, attended=attended, flash4=flash4)
    setting = Setting(kind, packs, read_levels(level, measured.shape.num_layers))  # type: ignore[arg-type]
    assert predict_memory(measured, setting).peak / GIB == pytest.approx(gib, rel=memory)
    assert predict_step(measured, setting).tokens_per_second == pytest.approx(tokens_per_second, rel=rate)


@pytest.mark.parametrize("point", MEASURED, ids=str)
def test_measured_runs(point: Point) -> None:
    check_prediction(point, "single", gpus=1, rounds=2, memory=0.0125, rate=0.03)


def test_a_step_of_one_micro_batch_with_paged_moments() -> None:
    """`packtrain train`: of 91.2 GiB 12.5 are moments, which torch does not count; bitsandbytes' step takes 0.2 s."""
    paged: dict[str, Any] = {**BFLOAT16, "optim": {"name": "paged_adamw_8bit"}}
    point = (LLAMA_7B, paged, SHORT, False, 4, "none", 91.2, 12500)
    check_prediction(point, "single", gpus=1, rounds=1, memory=0.0125, rate=0.05)


# Four H200s over NVLink, torch 2.11, one micro-batch a step; as above, and flash-attn-4 where documents are long.
WHOLE = (8192, 0.084, 4057)
ON_FOUR: list[tuple[Kind, Point]] = [
    ("ddp", (LLAMA_7B, QLORA, SHORT, False, 4, "none", 69.9, 19689)),
    ("fsdp2", (LLAMA_7B, QLORA, SHORT, False, 4, "none", 67.3, 19146)),
    ("ddp", (LLAMA_70B, QLORA, SHORT, False, 1, "none", 122.4, 2002)),
    ("fsdp2", (LLAMA_70B, QLORA, SHORT, False, 1, "none", 96.5, 1974)),
    # by earlier kernels, and with a step in which the allocator asks for all of its memory among those that count
    ("fsdp2", (LLAMA_70B, FLOAT8, WHOLE, True, 1, "norms", 125.2, 2585)),
    ("ddp", (LLAMA_70B, FLOAT8, WHOLE, True, 1, "mlp", 81.9, 2284)),
    ("fsdp2", (LLAMA_70B, INT8_FLOAT8, WHOLE, True, 1, "mlp", 64.6, 2234)),
]


@pytest.mark.parametrize(("kind", "point"), ON_FOUR, ids=str)
def test_four_gpus_of_a_host(kind: Kind, point: Point) -> None:
    check_prediction(point, kind, gpus=4, rounds=1, memory=0.02, rate=0.06 if "train" in point[1] else 0.025)


# ------------------------------------------------------------------------------------------------ against real modules


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes that no two of are equal, and fewer key-value heads than queries."""
    folder = tmp_path_factory.mktemp("small")
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 32, "num_hidden_layers": 3, "vocab_size": 300, "max_position_embeddings": 4096}
    fields = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def small_job(small_model: Path, toy_recipe: Callable[..., RunConfig], **sections: Any) -> Job:
    model = {"path": str(small_model), "init": "random", **sections.pop("model", {})}
    config = toy_recipe(model=model, **sections)
    return Job(config, ModelShape.build(read_sizes(config.model)), find_gpu())


def kept_for_backward(layer: Any, rotary: Any, hidden: int, tokens: int) -> int:
    """Bytes of the distinct tensors that live on for the backward of `layer`, its parameters and adapters left out."""

    class Kept:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

    kept: weakref.WeakSet[Kept] = weakref.WeakSet()

    def keep(tensor: torch.Tensor) -> Kept:
        kept.add(saved := Kept(tensor))
        return saved

    x = torch.randn(1, tokens, hidden, requires_grad=True)
    tables = rotary(x, torch.arange(tokens)[None])
    (adapters,) = adapters_of_layers([layer], x.dtype)
    given = {} if adapters is None else {"adapters": adapters}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved.tensor):
        output = layer(
            x, position_embeddings=tables, cu_seq_lens_q=torch.tensor([0, tokens]), max_length_q=tokens, **given
        )
    assert output.requires_grad
    cast = [] if adapters is None else [one.a for one in adapters.cast if one.a is not None]
    others = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *tables, *cast)}
    storages = {s.data_ptr(): s.nbytes() for s in (saved.tensor.untyped_storage() for saved in kept)}
    return sum(size for pointer, size in storages.items() if pointer not in others)


def more_on_a_cpu(small: Job, level: str, tokens: int) -> float:
    """Float32 numbers that a CPU keeps of a layer beyond what a GPU does: attention by document repeats keys and values
    for every query, and lays its output out anew.
    """
    shape, adapter = small.shape, small.config.adapter
    if small.has_fused_layers("single"):
        return tokens * 3 * shape.query
    assert adapter
    linears = shape.linears(shape.mean_key_value)
    again = ("gate_proj", "up_proj", "down_proj") if level == "mlp" else ()
    kept = [sizes for name, sizes in linears.items() if name not in again]
    repeated = 2 * (shape.query - shape.mean_key_value)  # in the place of those that are not
    if adapter.dropout:  # masks of floats, not of bytes; the output is copied as it is dropped out
        return tokens * (repeated + 0.75 * sum(rows for rows, _ in kept))
    # of DoRA three scales of each output, whatever the number of tokens: small, and left out of the plan
    return tokens * (repeated + shape.query) + 3 * sum(columns for _, columns in kept)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "sections",
    [
        {},
        LORA,
        QLORA,
        {"adapter": {"targets": ["q_proj", "v_proj"]}},
        {"adapter": {"dropout": 0.1}},
        {"adapter": {"dora": True}},
    ],
    ids=["full", "lora", "qlora", "some targets", "dropout", "dora"],
)
def test_what_a_layer_keeps(
    sections: dict[str, Any], level: Any, small_model: Path, toy_recipe: Callable[..., RunConfig]
) -> None:
    small = small_job(small_model, toy_recipe, **sections)
    model = load_model(small.config, torch.device("cpu")).model.train()
    set_recompute(model, read_levels(level, 3))
    causal_lm: Any = model.get_base_model() if small.config.adapter else model
    shape, tokens = small.shape, 40
    wanted = tokens * saved_bytes(small, "single", level)
    if level != "full":
        wanted += 4 * more_on_a_cpu(small, level, tokens)
    found = kept_for_backward(decoder_layers(model)[1], causal_lm.model.rotary_emb, shape.hidden, tokens)
    assert small.has_fused_layers("single") == has_fused_layers(model)
    assert found == pytest.approx(wanted, rel=1e-9)


def test_the_loss_works_in_chunks_of_the_size_that_is_planned() -> None:
    assert memory.LOGITS_PER_CHUNK == loss.LOGITS_PER_CHUNK


FORMS: list[dict[str, Any]] = [
    {},
    {"train": {"param_dtype": "bfloat16"}, "optim": {"name": "adamw_8bit"}},
    LORA,
    {"adapter": {"r": 4, "targets": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]}},
    QLORA,
    {"adapter": {"r": 8}, "quantization": {"double_quant": False}, "optim": {"name": "paged_adamw_32bit"}},
    {"adapter": {"r": 8}, "quantization": {"type": "int8"}, "export": {"merge": True}},
]


@pytest.mark.parametrize("sections", FORMS, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_checkpoints_and_result_are_those_of_the_real_model(
    sections: dict[str, Any], dtype: str, small_model: Path, toy_recipe: Callable[..., RunConfig]
) -> None:
    small = small_job(small_model, toy_recipe, model={"dtype": dtype}, **sections)
    model = build_model(small.config, torch.device("cpu")).model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    real = sum(p.numel() * p.element_size() for p in model.parameters())
    found = predict_memory(small, Setting("single", 1, read_levels("none", 3)))
    assert small.trained_weights == trained
    # scales of double quantisation come in blocks that such small matrices do not fill
    assert found.weights == pytest.approx(real, rel=0.05 if small.config.quantization else 1e-9)
    assert checkpoint_bytes(small) == pytest.approx(real_checkpoint_bytes(model, small.config), rel=1e-6)
    disk = predict_disk(small)
    assert disk.result + disk.merged == real_result_bytes(model, small.config)


@pytest.mark.parametrize(
    ("model", "weights"),
    [(LLAMA_7B, 6_738_415_616), (LLAMA_70B, 68_976_648_192), (LLAMA_3, 8_030_261_248)],
)
def test_weights_of_published_models(model: str, weights: int) -> None:
    assert job(model).shape.weights == weights


# ---------------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kind", "gpus"), [("single", 1), ("ddp", 4), ("fsdp2", 4), ("zero2", 8), ("zero3", 8)])
@pytest.mark.parametrize("packs", [4, 64])
def test_more_recomputed_never_needs_more_and_more_packs_never_less(
    method: str, kind: Kind, gpus: int, packs: int
) -> None:
    one = job(LLAMA_3, gpus=gpus, packs=packs, **METHODS[method])
    layers = one.shape.num_layers

    def peak(micro_batch: int, levels: LayerLevels) -> float:
        return predict_memory(one, Setting(kind, micro_batch, levels)).peak

    for fast, lean in itertools.combinations(LEVELS, 2):
        mixes = [{lean: number, fast: layers - number} for number in range(1, layers)]
        found = [peak(2, LayerLevels.build(counts)) for counts in [{fast: layers}, *mixes, {lean: layers}]]
        # but for its input: a layer computed again whole is fuller for a moment than one that computes its MLP again
        slack = 2 * 4096 * saved_bytes(one, kind, "full") if lean == "full" else 0
        assert all(after <= before + slack for before, after in itertools.pairwise(found))
        assert found[-1] <= found[0]
    for level in LEVELS:
        # while there is more than one round: in a single one no gradients wait beside the activations
        sizes = [peak(size, read_levels(level, layers)) for size in (1, 2, 4, 8) if packs // gpus > size]
        assert sizes == sorted(sizes)


@pytest.mark.parametrize("method", METHODS)
def test_recomputing_costs_time(method: str) -> None:
    one = job(LLAMA_7B, **METHODS[method])
    seconds = [predict_step(one, Setting("single", 2, read_levels(level, 32))).seconds for level in LEVELS]
    assert seconds == sorted(seconds)
    assert seconds[0] < seconds[-1]


# --------------------------------------------------------------------------------------------------------- choices


def best(model: str, gpu: str, gpus: int, **sections: Any) -> Candidate:
    return plan(job(model, gpu, gpus, **sections))[0]


@pytest.mark.parametrize("gpu", ["RTX 4090", "A100", "H200"])
def test_7b_qlora_fits_one_gpu_and_larger_ones_recompute_less(gpu: str) -> None:
    chosen = best(LLAMA_7B, gpu, 1, **QLORA)
    assert chosen.fits and chosen.setting.kind == "single"
    if gpu == "H200":
        assert chosen.setting == Setting("single", 4, read_levels("none", 32))


def test_adapters_are_replicated_where_the_base_fits_and_cut_where_it_does_not() -> None:
    assert best(LLAMA_7B, "H100", 4, **QLORA).setting.kind == "ddp"
    assert best(LLAMA_70B, "H100", 8, **QLORA).setting.kind == "fsdp2"
    assert best(LLAMA_7B, "H100", 8).setting.kind == "fsdp2"


def test_70b_qlora_by_room() -> None:
    chosen = {gpu: best(LLAMA_70B, *gpu, **QLORA) for gpu in [("H200", 1), ("H100", 1), ("H100", 4), ("H100", 8)]}
    assert all(candidate.fits for candidate in chosen.values())
    rates = [candidate.step.tokens_per_second for candidate in chosen.values()]
    assert rates[1] == min(rates)  # one of 80 GB has to recompute most
    assert not best(LLAMA_70B, "L40S", 1, **QLORA).fits


def test_memory_left_over_buys_speed() -> None:
    """Less of a GPU's memory: never faster, always within it, and mixes of levels fill the gaps between the levels."""
    one = job(LLAMA_7B, **QLORA)
    sizes = range(10, 60, 2)
    found = [plan(replace(one, gpu=find_gpu("H200", float(size))))[0] for size in sizes]
    rates = [float(f"{candidate.step.tokens_per_second:.3g}") for candidate in found]
    assert rates == sorted(rates)
    assert all(candidate.needed <= size * GIB for candidate, size in zip(found, sizes, strict=True))
    assert any(len(candidate.setting.levels.counts) == 2 for candidate in found)


def test_what_the_recipe_says_is_kept() -> None:
    asked = {"micro_batch": 2, "recompute": {"full": 12, "none": 20}}
    (only,) = plan(job(LLAMA_7B, **QLORA, train=asked))
    assert only.setting == Setting("single", 2, LayerLevels.build({"full": 12, "none": 20}))
    kinds = {c.setting.kind for c in plan(job(LLAMA_7B, gpus=4, **QLORA, strategy={"kind": "zero2"}))}
    assert kinds == {"zero2"}


def test_levels_that_do_not_add_up() -> None:
    with pytest.raises(UserError, match="adds up to 31 layers") as caught:
        plan(job(LLAMA_7B, train={"recompute": {"full": 11, "none": 20}}))
    assert "train.recompute" in str(caught.value) and "32" in str(caught.value)


def test_one_layer_is_not_one_layers() -> None:
    levels = LayerLevels.build({"full": 1, "mlp": 2, "none": 1})
    assert str(levels) == "full in 1 layer, then mlp in 2 layers, then none in 1 layer"


def test_layers_of_transformers_are_not_offered_what_they_do_not_have() -> None:
    by_modules = job(LLAMA_7B, adapter={"dropout": 0.1})
    assert not any("norms" in c.setting.levels.counts for c in plan(by_modules))
    assert any("norms" in c.setting.levels.counts for c in plan(job(LLAMA_7B)))


# -------------------------------------------------------------------------------------------------------- hardware


@pytest.mark.parametrize(
    ("name", "size", "found"),
    [
        ("NVIDIA H100 80GB HBM3", None, "H100"),
        ("NVIDIA GeForce RTX 4090", None, "RTX 4090"),
        ("A100", None, "A100"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "A100 40"),
        ("A100", 40, "A100 40"),
        ("NVIDIA A100-SXM4-80GB", None, "A100"),
        (None, 24.0, "RTX 4090"),
        (None, 141.0, "H200"),
    ],
)
def test_gpus_by_name_or_size(name: str | None, size: float | None, found: str) -> None:
    assert find_gpu(name, size).name == found


def test_a_gpu_of_no_table_is_as_fast_as_a_smaller_one() -> None:
    unknown = gpu_at_hand("NVIDIA B300", 270 * GIB)
    assert (unknown.name, unknown.memory, unknown.flops) == ("NVIDIA B300", 270 * GIB, find_gpu("H200").flops)


# --------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{path: {LLAMA_7B}}}\nquantization: {{type: nf4}}\nadapter: {{r: 16}}\n"
        "data: {train: [{path: rows.jsonl, format: messages}]}\n"
    )
    return path


def test_the_command_explains_its_choice(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # a narrow table folds words
    assert main(["plan", str(recipe), "--gpu-memory", "24"]) == 0
    text = capsys.readouterr().out
    assert "1 x RTX 4090 (23.6 GiB)" in text and "chosen" in text and "too much" in text
    assert "8 x 141 GB" in text
    assert "no GPU is here" not in text


def test_float8_is_said_and_faster(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for float8 in ("true", "false"):
        words = ["plan", str(recipe), "--gpu", "H100", "--train.float8", float8]
        assert main(words) == 0
        assert ("float8 of frozen weights" in capsys.readouterr().out) == (float8 == "true")
        assert main([*words, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["chosen"]["tokens_per_second"])
    assert found[0] > 1.2 * found[1]


def test_the_command_says_what_it_assumed(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.planning.hardware.read_gpu", lambda environ: None)
    assert main(["plan", str(recipe)]) == 0
    assert "1 x H100 (79.1 GiB), as no GPU is here and none was named" in capsys.readouterr().out


def test_single_is_planned_for_one_gpu_of_this_host(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.planning.hardware.read_gpu", lambda environ: (find_gpu("H100"), 8))
    assert main(["plan", str(recipe), "--strategy.kind", "single", "--train.global_batch.tokens", "4096"]) == 0
    text = capsys.readouterr().out
    assert "qlora, 1 pack of 4,096 tokens a step\nplanned for 1 x H100 (79.1 GiB) of this host" in text


def test_the_command_for_programs(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe), "--gpus", "4", "--gpu", "A100", "--json", "--train.max_steps", "100"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["hardware"]["gpus"] == 4
    assert found["tokens"] == 100 * 65536
    rate = found["chosen"]["tokens_per_second"]
    assert found["hours"] == pytest.approx(100 * 65536 / (4 * rate) / 3600)
    parts = found["chosen"]["memory"]
    assert parts["peak"] == pytest.approx(sum(parts.values()) - parts["peak"] - parts["needed"])


def test_nothing_fits(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(recipe), "--gpu-memory", "24", "--model.path", LLAMA_70B]
    assert main(words) == EXIT_USER_ERROR
    captured = capsys.readouterr()
    assert "does not fit" in captured.out and "1 x 141 GB" in captured.out
    assert "nothing fits 1 x RTX 4090" in captured.err
    assert "table, cut the model over more GPUs, or lower data.pack_length" in captured.err  # quantised already


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "TPU"], "RTX 4090"),
        (["--gpus", "1" + "0" * 400], "--gpus"),
        (["--gpus", "3", "--strategy.shard_size", "2"], "--gpus: 3, and strategy.shard_size is 2"),
        (["--strategy.shard_size", "2"], "strategy.shard_size: 2, and this plan would be for 1 x H100"),
        (["--gpu", "A100", "--train.float8", "true"], "train.float8: true on A100"),
        (["--gpu", "H100", "--train.float8", "true", "--model.dtype", "float32"], "train.float8: true in float32"),
        (["--gpu", "L40S", "--model.attention", "flash4"], "model.attention: flash4 on L40S"),
        (["--gpus", "2", "--strategy.kind", "single"], "single"),
        (["--model.path", "no/such/model/at/all"], "model.path"),
    ],
)
def test_wrong_input(words: list[str], said: str, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe), "--gpu-memory", "80", *words]) == EXIT_USER_ERROR
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("gib", ["inf", "nan", "1e300"])
def test_memory_without_end_is_refused(gib: str, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe), "--json", "--gpu-memory", gib]) == EXIT_USER_ERROR
    captured = capsys.readouterr()
    assert "--gpu-memory" in captured.err and captured.out == ""


def test_tokens_and_time_once_the_data_are_prepared(
    toy_recipe_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = toy_recipe_file(train={"max_steps": None, "epochs": 2}, data={"pack_length": 120})  # of no other test
    command = ["plan", str(recipe), "--gpu", "A100", "--json"]
    assert main(command) == 0
    before = json.loads(capsys.readouterr().out)
    assert main(["preprocess", str(recipe), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])["summary"]["splits"]["train"]
    assert main(command) == 0
    after = json.loads(capsys.readouterr().out)
    assert (before["tokens"], after["tokens"]) == (None, 2 * summary["tokens"])
    assert before["hours"] is None and after["hours"] > 0
