"""What accelerate's configuration says of the run, against the recipe: adopted where the recipe is silent."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.launchers import World, count_gpus

logger = logging.getLogger(__name__)
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}
# What accelerate's FSDP1 calls them, by number.
SHARDING = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")
SILENT = ("none", "auto", "no")
# What is read of DeepSpeed: the recipe's field, accelerate's variable, the key in a DeepSpeed config file.
DEEPSPEED = {
    "stage": ("strategy.kind", "ACCELERATE_DEEPSPEED_ZERO_STAGE", "zero_optimization.stage"),
    "param": (
        "strategy.offload",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
        "zero_optimization.offload_param.device",
    ),
    "optimizer": (
        "strategy.offload",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
        "zero_optimization.offload_optimizer.device",
    ),
    "clipping": ("optim.max_grad_norm", "ACCELERATE_GRADIENT_CLIPPING", "gradient_clipping"),
    "accumulation": ("", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "gradient_accumulation_steps"),
    "bf16": ("", "", "bf16.enabled"),
    "fp16": ("", "", "fp16.enabled"),
}
PLAIN = "run accelerate with a plain config (distributed_type: MULTI_GPU): the recipe says the rest"


@dataclass(frozen=True)
class Demand:
    """One setting of the launcher that a recipe has a field for.

    Attributes:
        field: of the recipe, such as ``strategy.kind``.
        said: where the launcher says it, such as ``ACCELERATE_USE_FSDP=true``.
        key: the same in accelerate's config file.
    """

    field: str
    value: Any
    said: str
    key: str


def adopt_launcher(config: RunConfig, environ: Mapping[str, str], world: World) -> RunConfig:
    """Lays what accelerate's environment says over fields that the recipe leaves out or says `auto` for.

    Settings that are off say nothing: accelerate exports its defaults too.

    Raises:
        UserError: the launcher contradicts the recipe, both named; or asks for what is not done here.
    """
    _refuse_others(environ)
    demands = [*_fsdp(environ, world), *_deepspeed(environ)]
    adopted: dict[str, dict[str, Any]] = {}
    for demand in demands:
        if not _is_settled(config, demand):
            section, name = demand.field.split(".")
            adopted.setdefault(section, {})[name] = demand.value
            logger.info("%s: %s, as %s says", demand.field, demand.value, demand.said)
    _check_precision(config, environ)
    return _lay_over(config, adopted, demands) if adopted else config


def _is_settled(config: RunConfig, demand: Demand) -> bool:
    """Whether the recipe says the same already."""
    section, name = demand.field.split(".")
    part = getattr(config, section)
    value = getattr(part, name)
    if value == demand.value:
        return True
    if value == "auto" or name not in part.model_fields_set:
        return False
    raise UserError(
        demand.field,
        f"{value}, and the launcher says {demand.value} ({demand.said}; {demand.key} in accelerate's config)",
        "the same in both",
        f"set {demand.field}: {demand.value} or leave it out; or change {demand.key}; or {PLAIN}",
    )


def _lay_over(config: RunConfig, adopted: Mapping[str, dict[str, Any]], demands: Iterable[Demand]) -> RunConfig:
    fields = config.model_dump(exclude_unset=True)
    for section, values in adopted.items():
        fields[section] = fields.get(section, {}) | values
    try:
        return RunConfig.model_validate(fields)
    except ValidationError as error:
        said = ", ".join(demand.said for demand in demands)
        found = "; ".join(problem["msg"].removeprefix("Value error, ") for problem in error.errors())
        raise UserError(said, f"does not go with this recipe: {found}", fix=f"change either; or {PLAIN}") from error


def _fsdp(environ: Mapping[str, str], world: World) -> Iterator[Demand]:
    if not _is_on(environ, "ACCELERATE_USE_FSDP"):
        return
    use = ("ACCELERATE_USE_FSDP=true", "distributed_type: FSDP")
    version = environ.get("FSDP_VERSION", "1")
    source, sharding = _sharding(environ) if version == "1" else ("", "FULL_SHARD")
    strategy = (f"{source}={environ.get(source)}", f"fsdp_config.{source.lower()}")
    if sharding == "NO_SHARD":
        yield Demand("strategy.kind", "ddp", *strategy)
        return
    yield Demand("strategy.kind", "fsdp2", *use)
    if version == "1":
        logger.info("FSDP1 is asked for (FSDP_VERSION=1): FSDP2 (fully_shard) carries it out")
    if sharding in ("SHARD_GRAD_OP", "HYBRID_SHARD_ZERO2"):
        yield Demand("strategy.reshard", False, *strategy)
    if sharding.startswith("HYBRID") and 1 < world.local_world_size < world.world_size:
        yield Demand("strategy.shard_size", world.local_world_size, *strategy)
    if version != "1" and _is_off(environ, "FSDP_RESHARD_AFTER_FORWARD"):
        said = "FSDP_RESHARD_AFTER_FORWARD=false"
        yield Demand("strategy.reshard", False, said, "fsdp_config.fsdp_reshard_after_forward")
    if _is_on(environ, "FSDP_OFFLOAD_PARAMS"):
        yield Demand("strategy.offload", "all", "FSDP_OFFLOAD_PARAMS=true", "fsdp_config.fsdp_offload_params")
    if _is_on(environ, "FSDP_ACTIVATION_CHECKPOINTING"):
        said = "FSDP_ACTIVATION_CHECKPOINTING=true"
        yield Demand("train.recompute", "full", said, "fsdp_config.fsdp_activation_checkpointing")
    yield from _replicas(environ)


def _sharding(environ: Mapping[str, str]) -> tuple[str, str]:
    """FSDP1's strategy and the variable it is in: newer configs write it as what happens after the forward."""
    for source in ("FSDP_SHARDING_STRATEGY", "FSDP_RESHARD_AFTER_FORWARD"):
        text = environ.get(source, "").upper()
        name = SHARDING[int(text) - 1] if text in ("1", "2", "3", "4", "5") else text
        if name in SHARDING[1:]:
            return source, name
    return "FSDP_SHARDING_STRATEGY", "FULL_SHARD"


def _replicas(environ: Mapping[str, str]) -> Iterator[Demand]:
    """HSDP, as accelerate's parallelism_config writes it."""
    if not _is_on(environ, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        return
    replicas, shards = (int(environ.get(f"PARALLELISM_CONFIG_DP_{name}_SIZE", "1")) for name in ("REPLICATE", "SHARD"))
    if replicas > 1 and shards > 1:
        said = f"PARALLELISM_CONFIG_DP_SHARD_SIZE={shards}"
        yield Demand("strategy.shard_size", shards, said, "parallelism_config_dp_shard_size")
    elif replicas > 1:
        raise UserError(
            f"PARALLELISM_CONFIG_DP_REPLICATE_SIZE={replicas}",
            "FSDP with nothing sharded",
            fix=f"strategy.kind: ddp and {PLAIN}",
        )


def _deepspeed(environ: Mapping[str, str]) -> Iterator[Demand]:
    said = _deepspeed_settings(environ)
    if not said:
        return
    stage = said["stage"]
    if stage.value not in ("0", "1", "2", "3"):
        raise UserError(stage.said, "no stage of ZeRO", "0, 1, 2 or 3")
    yield replace(stage, value="ddp" if stage.value == "0" else f"zero{stage.value}")
    for name in ("param", "optimizer"):
        if name in said and said[name].value != "cpu":
            raise UserError(said[name].said, "is not done here", "cpu or none", f"set {said[name].key}: cpu")
    if offload := said.get("param", said.get("optimizer")):
        yield replace(offload, value="all" if "param" in said else "optimizer")
    if clipping := said.get("clipping"):
        yield replace(clipping, value=float(clipping.value) or None)  # DeepSpeed's 0 is never


def _deepspeed_settings(environ: Mapping[str, str]) -> dict[str, Demand]:
    """What is said of DeepSpeed: in the DeepSpeed config file that accelerate's names, else in variables."""
    if not _is_on(environ, "ACCELERATE_USE_DEEPSPEED"):
        return {}
    path = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    file = _read_json(path) if path != "none" else {}
    said: dict[str, Demand] = {}
    for name, (field, variable, key) in DEEPSPEED.items():
        in_file, in_variable = _look_up(file, key), environ.get(variable, "none")
        if in_file not in SILENT:
            said[name] = Demand(field, in_file, f"{key}: {in_file} in {path}", key)
        elif in_variable not in SILENT:
            key = variable.removeprefix("ACCELERATE_").removeprefix("DEEPSPEED_").lower()
            said[name] = Demand(field, in_variable, f"{variable}={in_variable}", f"deepspeed_config.{key}")
    default = "0" if file else "2"  # DeepSpeed's, accelerate's
    stage = Demand("strategy.kind", default, f"ACCELERATE_USE_DEEPSPEED=true with stage {default}", "zero_stage")
    return {"stage": stage} | said


def _read_json(path: str) -> dict[str, Any]:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        where = f"ACCELERATE_DEEPSPEED_CONFIG_FILE={path}"
        raise UserError(where, f"cannot be read: {error}", "a JSON file", "mend it or leave it out") from error


def _look_up(file: Any, key: str) -> str:
    """The value at a dotted key, as text; `none` where there is none."""
    for name in key.split("."):
        file = file.get(name) if isinstance(file, dict) else None
    return "none" if file is None else str(file).lower()


def _check_precision(config: RunConfig, environ: Mapping[str, str]) -> None:
    said = _deepspeed_settings(environ)
    demands = [replace(said[name], value=name) for name in PRECISIONS if name in said and said[name].value == "true"]
    mixed = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed != "no":
        demands.append(Demand("model.dtype", mixed, f"ACCELERATE_MIXED_PRECISION={mixed}", "mixed_precision"))
    for demand in demands:
        dtype = PRECISIONS.get(demand.value)
        if dtype == config.compute_dtype:
            continue
        own = config.quantization and config.quantization.compute_dtype
        field = "quantization.compute_dtype" if own else "model.dtype"
        raise UserError(
            field,
            f"{config.compute_dtype}, and the launcher says {demand.value} ({demand.said}; {demand.key} in its config)",
            "the same in both; fp8 is not done here" if dtype is None else "the same in both",
            f"leave {demand.key} out" + (f", or set {field}: {dtype}" if dtype else ""),
        )


def _refuse_others(environ: Mapping[str, str]) -> None:
    """What a launcher can ask for and is not done here, or is the recipe's own business."""
    if _is_on(environ, "ACCELERATE_USE_MEGATRON_LM"):
        raise UserError("ACCELERATE_USE_MEGATRON_LM=true", "Megatron-LM is not used here", fix=PLAIN)
    for name in ("TP", "CP", "SP"):
        variable = f"PARALLELISM_CONFIG_{name}_SIZE"
        if _is_on(environ, "ACCELERATE_USE_PARALLELISM_CONFIG") and environ.get(variable, "1") != "1":
            found = f"{name} (tensor, context and sequence parallelism) is not done here"
            raise UserError(f"{variable}={environ[variable]}", found, "1", f"parallelism_config_{name.lower()}_size: 1")
    if _is_on(environ, "ACCELERATE_USE_FSDP") and _is_on(environ, "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD"):
        found = "where activations wait for backward is said in the recipe"
        raise UserError("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD=true", found, "false", "train.offload_activations: true")
    backend = environ.get("ACCELERATE_DYNAMO_BACKEND", "NO")
    if backend.upper() != "NO":
        raise UserError(
            f"ACCELERATE_DYNAMO_BACKEND={backend}", "a launcher does not compile the model here", "no", PLAIN
        )
    accumulation = _deepspeed_settings(environ).get("accumulation")
    if accumulation and accumulation.value != "1":
        raise UserError(
            accumulation.said,
            "accumulation is derived from train.global_batch, train.micro_batch and the number of processes",
            "1 or auto",
            f"leave {accumulation.key} out; say the size of a step in train.global_batch",
        )
    if _is_on(environ, "ACCELERATE_USE_CPU") and count_gpus(environ):
        raise UserError(
            "ACCELERATE_USE_CPU=true",
            "there are GPUs, and they would be taken",
            fix='use_cpu: false; or CUDA_VISIBLE_DEVICES="" to train on the CPU',
        )


def _is_on(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t")


def _is_off(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").lower() in ("0", "false", "no", "off", "n", "f")
