"""Rules between the parts of a recipe, and of what its paths may be. Imports no torch."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.config import RunConfig, Source

# Options of sbatch that have a field of their own, or that a run's survival depends on.
RESERVED_OPTIONS = frozenset(
    (
        *("account", "array", "chdir", "constraint", "cpus-per-task", "dependency", "error", "exclude"),
        *("exclusive", "export", "gpus", "gpus-per-node", "gpus-per-task", "gres", "job-name"),
        *("kill-on-invalid-dep", "mem", "nodes", "no-requeue", "ntasks", "ntasks-per-node", "open-mode"),
        *("output", "partition", "qos", "requeue", "signal", "time", "wrap"),
    )
)
RESERVED_VARIABLES = frozenset(
    (
        *("SUBMISSION", "MAX_RESTARTS", "LIMIT_SECONDS", "EXCLUDE", "RUN", "JOB", "RESTART", "FIRST_STEP"),
        *("PACKTRAIN_SUBMISSION", "PYTHONPATH", "PYTHONSAFEPATH", "STATE_BEFORE"),
    )
)


def broken_rules(config: RunConfig) -> list[str]:
    """All that contradict one another, a line each, beginning with the field it is about."""
    broken: list[str] = []
    if config.quantization and not config.adapter:
        broken.append(
            "quantization needs an adapter, as quantised weights cannot be trained. Add adapter: {method: lora}"
        )
    if config.quantization and config.quantization.type == "int8" and config.quantization.double_quant:
        broken.append("quantization.double_quant is for nf4 and fp4; int8 has one scale a row. Set it to false")
    if config.schedule.name == "plateau" and config.eval.every_steps is None:
        broken.append("schedule.name: plateau follows the validation loss. Set eval.every_steps")
    if config.eval.early_stopping and config.eval.every_steps is None:
        broken.append("eval.early_stopping follows the validation loss. Set eval.every_steps")
    if config.train.micro_batch != "auto" and config.train.micro_batch > config.packs_per_step:
        broken.append(
            f"train.micro_batch is {config.train.micro_batch}, train.global_batch only {config.packs_per_step} packs; "
            "lower micro_batch or raise global_batch"
        )
    broken += _path_rules(config) + _attention_rules(config) + _float8_rules(config)
    broken += _strategy_rules(config) + _slurm_rules(config)
    if config.export.merge and not config.adapter:
        broken.append("export.merge needs an adapter; a full fine-tune is whole as it is. Set it to false")
    if not config.data.packing and config.train.global_batch.tokens is not None:
        broken.append("train.global_batch.tokens counts packs. Without packing set train.global_batch.rows")
    return broken


def is_address(path: str) -> bool:
    """Whether this is no path and no hub id but ``s3://...`` or the like, which nothing here reads."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def _path_rules(config: RunConfig) -> list[str]:
    paths = {"model.path": config.model.path, "model.tokenizer": config.model.tokenizer}
    split = config.data.split
    lists: dict[str, float | list[Source]] = {
        "train": config.data.train,
        "split.validation": split.validation,
        "split.test": split.test,
    }
    for name, sources in lists.items():
        if isinstance(sources, list):
            paths |= {f"data.{name}[{index}].path": source.path for index, source in enumerate(sources)}
    return [
        f"{field} is {path}, an address that nothing is read from. "
        "Download it and name what is here, or name a hub id such as owner/name"
        for field, path in paths.items()
        if path and is_address(path)
    ]


def _attention_rules(config: RunConfig) -> list[str]:
    attention = config.model.attention
    if attention not in ("flash4", "varlen"):
        return []
    field = "quantization.compute_dtype" if config.quantization else "model.dtype"
    obstacles = {
        f"is for 16 bit, and {field} is float32. Set that to bfloat16": config.compute_dtype == "float32",
        "is for GPUs, and train.device is cpu. Leave that out": config.train.device == "cpu",
    }
    return [f"model.attention: {attention} {text}, or take auto" for text, is_there in obstacles.items() if is_there]


def _float8_rules(config: RunConfig) -> list[str]:
    broken = []
    if config.train.float8 and not config.adapter:
        broken.append(
            "train.float8 multiplies frozen weights, and without an adapter none is. "
            "Add adapter: {method: lora}, or set it to false"
        )
    for name in ("float8", "keep_in_float8"):
        if getattr(config.train, name) and config.strategy.kind == "zero3":
            broken.append(
                f"train.{name} needs whole layers, which strategy.kind: zero3 gathers module by module. "
                "Set it to false, or strategy.kind: fsdp2"
            )
        if getattr(config.train, name) and config.adapter and (config.adapter.dropout or config.adapter.dora):
            field = "adapter.dropout" if config.adapter.dropout else "adapter.dora"
            broken.append(
                f"train.{name} needs whole layers, and {field} has modules called one after the other. "
                f"Set it to false, or leave {field} out"
            )
    return broken


def _strategy_rules(config: RunConfig) -> list[str]:
    kind, offload, optim = config.strategy.kind, config.strategy.offload, config.optim.name
    broken = []
    if offload == "all" and kind not in ("auto", "fsdp2", "zero3"):
        broken.append(
            f"strategy.offload: all keeps cut weights in host memory, which {kind} does not cut. "
            "Set strategy.kind: fsdp2 or zero3, or offload: optimizer"
        )
    if offload != "none" and optim != "adamw":
        broken.append(f"strategy.offload steps on the host, and optim.name: {optim} is for GPUs. Set adamw")
    if config.strategy.shard_size and kind not in ("auto", "fsdp2"):
        broken.append(f"strategy.shard_size is for fsdp2, and strategy.kind is {kind}. Leave it out")
    if not config.strategy.reshard and kind not in ("auto", "fsdp2"):
        broken.append(f"strategy.reshard: false is for fsdp2, and strategy.kind is {kind}. Leave it out")
    if kind.startswith("zero") and config.train.param_dtype != "float32" and not config.adapter:
        broken.append(
            f"strategy.kind: {kind} keeps masters and moments in float32, whatever train.param_dtype says. "
            "Leave it out, or set strategy.kind: fsdp2"
        )
    if kind.startswith("zero") and optim != "adamw":
        broken.append(
            f"strategy.kind: {kind} cuts moments where bitsandbytes' {optim} cannot follow. "
            "Set optim.name: adamw, or strategy.kind: fsdp2"
        )
    if kind.startswith("zero") and config.compute_dtype == "float16":
        broken.append(
            f"strategy.kind: {kind} computes in bfloat16 or float32 here. Set model.dtype: bfloat16, or kind: fsdp2"
        )
    return broken


def _slurm_rules(config: RunConfig) -> list[str]:
    slurm = config.slurm
    broken = []
    if slurm.minutes * 60 < 2 * slurm.stop_seconds:
        broken.append(
            f"slurm.time is {slurm.time}, and the run would stop {slurm.stop_seconds} s before its end. "
            "Raise it, or lower slurm.stop_seconds"
        )
    if taken := sorted(RESERVED_VARIABLES & slurm.env.keys()):
        broken.append(f"slurm.env sets {', '.join(taken)}, which the job's script sets by itself. Leave it out")
    if named := sorted(name for name, value in slurm.env.items() if "$" in value):
        broken.append(
            f"slurm.env takes values as they are, and {', '.join(named)} has a $. "
            "Write slurm.setup: [export NAME=...], which the shell reads"
        )
    if taken := sorted(RESERVED_OPTIONS & slurm.sbatch.keys()):
        broken.append(f"slurm.sbatch sets {', '.join(taken)}, which submit sets by itself. Leave it out")
    return broken
