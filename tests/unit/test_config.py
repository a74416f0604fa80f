"""RunConfig: what follows from its fields, and the rules between them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from trainer.config import RunConfig


def config(**sections: Any) -> RunConfig:
    data = {"train": [{"path": "a.jsonl", "format": "messages"}]} | sections.pop("data", {})
    return RunConfig.model_validate({"model": {"path": "m"}, "data": data, **sections})


@pytest.mark.parametrize(
    ("sections", "method"),
    [({}, "full"), ({"adapter": {}}, "lora"), ({"adapter": {}, "quantization": {}}, "qlora")],
)
def test_method_follows_from_the_sections_present(sections: dict[str, Any], method: str) -> None:
    assert config(**sections).method == method


@pytest.mark.parametrize(
    ("batch", "pack_length", "packs"),
    [({"tokens": 65536}, 4096, 16), ({"tokens": 10000}, 4096, 2), ({"tokens": 10}, 4096, 1), ({"rows": 7}, 4096, 7)],
)
def test_packs_per_step(batch: dict[str, int], pack_length: int, packs: int) -> None:
    found = config(data={"pack_length": pack_length}, train={"global_batch": batch})
    assert found.packs_per_step == packs


def test_compute_dtype_is_the_quantization_s_or_the_model_s() -> None:
    assert config(adapter={}, quantization={"compute_dtype": "float16"}).compute_dtype == "float16"
    assert config(adapter={}, quantization={}).compute_dtype == "bfloat16"
    assert config().compute_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("quantization", "double_quant"),
    [({}, True), ({"type": "fp4"}, True), ({"type": "int8"}, False), ({"double_quant": False}, False)],
)
def test_scales_are_quantised_too_where_that_can_be(quantization: dict[str, Any], double_quant: bool) -> None:
    found = config(adapter={}, quantization=quantization)
    assert found.quantization and found.quantization.double_quant is double_quant
    assert RunConfig.model_validate(found.model_dump()) == found


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        (
            {"adapter": {}, "quantization": {"type": "int8", "double_quant": True}},
            "int8 has one scale a row. Set it",
        ),
        ({"quantization": {}}, "quantization needs an adapter"),
        ({"schedule": {"name": "plateau"}}, "schedule.name: plateau follows the validation loss"),
        ({"eval": {"early_stopping": {}}}, "eval.early_stopping follows the validation loss"),
        ({"data": {"packing": False}}, "Without packing set train.global_batch.rows"),
        ({"train": {"micro_batch": 9, "global_batch": {"rows": 8}}}, "train.micro_batch is 9"),
        ({"train": {"global_batch": {"rows": 8, "tokens": 9}}}, "give either tokens or rows"),
        ({"train": {"global_batch": {}}}, "give either tokens or rows"),
        ({"model": {"path": "m", "dtype": "float32", "attention": "flash4"}}, "flash4 is for 16 bit, and model.dtype"),
        ({"model": {"path": "m", "attention": "varlen"}, "train": {"device": "cpu"}}, "varlen is for GPUs"),
        ({"train": {"float8": True}}, "train.float8 multiplies frozen weights"),
        ({"adapter": {}, "train": {"float8": True}, "strategy": {"kind": "zero3"}}, "train.float8 needs whole layers"),
        ({"adapter": {"dropout": 0.1}, "train": {"keep_in_float8": True}}, "and adapter.dropout has modules called"),
        ({"strategy": {"kind": "zero3"}, "train": {"keep_in_float8": True}}, "train.keep_in_float8 needs whole layers"),
        ({"strategy": {"kind": "ddp", "offload": "all"}}, "ddp does not cut. Set strategy.kind: fsdp2 or zero3"),
        ({"strategy": {"offload": "optimizer"}, "optim": {"lr": 1e-4, "name": "adamw_8bit"}}, "is for GPUs. Set adamw"),
        ({"strategy": {"kind": "zero3", "shard_size": 8}}, "shard_size is for fsdp2"),
        ({"slurm": {"env": {"RUN": "1"}}}, "RUN, which the job's script sets by itself. Leave"),
        ({"slurm": {"sbatch": {"nodes": 2}}}, "nodes, which submit sets by itself. Leave"),
        ({"strategy": {"kind": "ddp", "reshard": False}}, "reshard: false is for fsdp2"),
        ({"strategy": {"kind": "zero2"}, "optim": {"lr": 1e-4, "name": "adamw_8bit"}}, "or strategy.kind: fsdp2"),
        ({"strategy": {"kind": "zero2"}, "train": {"param_dtype": "bfloat16"}}, "whatever train.param_dtype says"),
        ({"strategy": {"kind": "zero1"}, "model": {"path": "m", "dtype": "float16"}}, "Set model.dtype: bfloat16"),
    ],
)
def test_rules_between_fields(sections: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        config(**sections)


def test_broken_rules_come_together() -> None:
    with pytest.raises(ValidationError) as caught:
        config(quantization={}, schedule={"name": "plateau"}, data={"packing": False})
    assert len(str(caught.value.errors()[0]["ctx"]["error"]).splitlines()) == 3


def test_a_config_does_not_change() -> None:
    with pytest.raises(ValidationError):
        config().optim.lr = 1.0  # type: ignore[misc]
