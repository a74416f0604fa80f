"""One packed, masked, accumulated step against plain transformers and PEFT on the same rows, unpacked, one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from trainer.config import RunConfig
from trainer.data.types import IGNORE_INDEX, PackedBatch
from trainer.loss import PackedCausalLM
from trainer.model.adapter_files import save_adapter
from trainer.model.load import load_model
from trainer.model.quantized import QuantizedLinear
from trainer.model.recompute import set_recompute
from trainer.planning.levels import read_levels

CPU = torch.device("cpu")
Row = tuple[list[int], list[int]]


def make_rows(lengths: list[int], seed: int = 0) -> list[Row]:
    """Rows of random ids whose labels are masked in stretches; the first label never counts."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(5, 300, (length,), generator=generator).tolist()
        masked = (torch.rand(length, generator=generator) < 0.4).tolist()
        masked[0] = True
        rows.append((ids, [IGNORE_INDEX if hide else token for token, hide in zip(ids, masked, strict=True)]))
    return rows


def pack(rows: list[Row]) -> PackedBatch:
    """A micro-batch by the definition in `PackedBatch`, written again here as a reference."""
    ids, labels = ([token for row in rows for token in row[part]] for part in (0, 1))
    lengths = [len(row[0]) for row in rows]
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return PackedBatch(
        input_ids=torch.tensor([ids]),
        labels=torch.tensor([labels]),
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        cu_seqlens=cu_seqlens,
        max_seqlen=max(lengths),
        trained_positions=torch.tensor([i - 1 for i, label in enumerate(labels) if label != IGNORE_INDEX]),
    )


def packed_gradients(model: nn.Module, micro_batches: list[list[Row]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    root = PackedCausalLM(model, dtype).train()
    batches = [pack(rows) for rows in micro_batches]
    total = sum(batch.num_trained_tokens for batch in batches)
    for batch in batches:
        (root(batch) / total).backward()
    return gradients(model)


def reference_gradients(model: nn.Module, rows: list[Row]) -> dict[str, torch.Tensor]:
    """Cross entropy over whole logits, a row at a time, by the model's own forward."""
    model.train()
    total = sum(label != IGNORE_INDEX for _, labels in rows for label in labels)
    for ids, labels in rows:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
        (
            F.cross_entropy(logits, torch.tensor(labels)[1:], ignore_index=IGNORE_INDEX, reduction="sum") / total
        ).backward()
    return gradients(model)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def relative_error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert set(found) == set(wanted)
    assert found
    difference = sum((found[name] - wanted[name]).square().sum() for name in wanted)
    return float((difference / sum(grad.square().sum() for grad in wanted.values())).sqrt())


def randomize_adapter(model: nn.Module) -> None:
    """Moves lora_B (and DoRA's magnitudes) off their start, where half of the gradients are zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_magnitude" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def reference_model(config: RunConfig, ours: nn.Module, adapter_folder: Path) -> nn.Module:
    """The base through `from_pretrained` in float32, or ours dequantised, with our adapter through PEFT."""
    base = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    if not config.adapter:
        return base
    with torch.no_grad():
        for name, module in ours.get_base_model().named_modules():  # type: ignore[operator]
            if isinstance(module, QuantizedLinear):
                base.get_parameter(name.replace(".base_layer", "") + ".weight").copy_(module.dequantize(torch.float32))
    save_adapter(ours, adapter_folder)
    return peft.PeftModel.from_pretrained(base, adapter_folder, is_trainable=True)


QLORA = {"quantization": {"type": "nf4", "double_quant": True}}
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "full": ({}, 1e-5),
    "lora": ({"adapter": {"r": 4}}, 1e-5),
    "lora some targets": ({"adapter": {"r": 4, "targets": ["q_proj", "down_proj"]}}, 1e-5),
    "rslora": ({"adapter": {"r": 4, "rslora": True}}, 1e-5),
    "dora": ({"adapter": {"r": 4, "dora": True}}, 1e-5),
    "modules to save": ({"adapter": {"r": 4, "modules_to_save": ["embed_tokens", "lm_head"]}}, 1e-5),
    "qlora": ({"adapter": {"r": 4}, **QLORA}, 1e-4),
    "qlora some targets": ({"adapter": {"r": 4, "targets": ["k_proj"]}, **QLORA}, 1e-4),
    "qlora fp4": ({"adapter": {"r": 4}, "quantization": {"type": "fp4", "double_quant": False}}, 1e-4),
    "int8": ({"adapter": {"r": 4}, "quantization": {"type": "int8"}}, 1e-4),
    "int8 dora": ({"adapter": {"r": 4, "dora": True}, "quantization": {"type": "int8"}}, 1e-4),
    "qlora rslora": ({"adapter": {"r": 4, "rslora": True}, **QLORA}, 1e-4),
    "qdora": ({"adapter": {"r": 4, "dora": True}, **QLORA}, 1e-4),
}


@pytest.mark.parametrize("recompute", ["none", "full", {"full": 1, "norms": 1}, {"mlp": 1, "none": 1}], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_packed_step_has_the_gradients_of_rows_one_by_one(
    case: str, recompute: Any, toy_recipe: Callable[..., RunConfig], tmp_path: Path
) -> None:
    sections, tolerance = CASES[case]
    config = toy_recipe(**sections)
    model = load_model(config, CPU).model
    set_recompute(model, read_levels(recompute, 2))
    randomize_adapter(model)
    rows = make_rows([9, 1, 17, 5, 12, 30])
    reference = reference_model(config, model, tmp_path)

    found = packed_gradients(model, [rows[:3], rows[3:]], torch.float32)
    wanted = reference_gradients(reference, rows)

    if config.adapter:  # rows of 1 token train nothing; every adapter tensor got a gradient all the same
        assert all(grad.abs().sum() > 0 for grad in found.values())
    assert relative_error(found, wanted) <= tolerance


@pytest.mark.parametrize("sections", [{}, {"adapter": {"r": 4}, **QLORA}], ids=["full", "qlora"])
def test_tied_embeddings(
    sections: dict[str, Any], toy_recipe: Callable[..., RunConfig], toy_tied_model_dir: Path, tmp_path: Path
) -> None:
    config = toy_recipe(model={"path": str(toy_tied_model_dir)}, **sections)
    model = load_model(config, CPU).model
    randomize_adapter(model)
    rows = make_rows([9, 17, 5])
    reference = reference_model(config, model, tmp_path)

    found = packed_gradients(model, [rows], torch.float32)

    assert relative_error(found, reference_gradients(reference, rows)) <= 1e-5


def test_cutting_the_batch_differently_changes_nothing(toy_recipe: Callable[..., RunConfig]) -> None:
    model = load_model(toy_recipe(adapter={"r": 4}, **QLORA), CPU).model
    randomize_adapter(model)
    rows = make_rows([9, 17, 5, 12])

    whole = {name: grad.clone() for name, grad in packed_gradients(model, [rows], torch.float32).items()}
    model.zero_grad()
    cut = packed_gradients(model, [rows[:1], rows[1:3], rows[3:]], torch.float32)

    assert relative_error(cut, whole) <= 1e-6


@pytest.mark.parametrize("quantized", [False, True], ids=["lora", "qlora"])
def test_bfloat16_autocast_stays_near_float32(quantized: bool, toy_recipe: Callable[..., RunConfig]) -> None:
    quantization = {**QLORA["quantization"], "compute_dtype": "bfloat16"} if quantized else None
    half = load_model(toy_recipe(adapter={"r": 4}, quantization=quantization), CPU).model
    full = load_model(toy_recipe(adapter={"r": 4}, **(QLORA if quantized else {})), CPU).model
    for model in (half, full):
        randomize_adapter(model)
    rows = make_rows([9, 17, 5])

    found = packed_gradients(half, [rows], torch.bfloat16)

    assert {grad.dtype for grad in found.values()} == {torch.float32}
    assert relative_error(found, packed_gradients(full, [rows], torch.float32)) <= 3e-2
