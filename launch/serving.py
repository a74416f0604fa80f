"""What vLLM is told of a model: its options, from what the folder and its run know.

All of them are in vLLM 0.25.1 to 0.32 (``vllm/engine/arg_utils.py`` and the frontend's ``cli_args.py``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint.result import ADAPTER_CONFIG, Result, training_of
from trainer.config import ModelConfig
from trainer.errors import UserError

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm/config/lora.py: MaxLoRARanks
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


@dataclass(frozen=True)
class Served:
    """What is served, and how it is asked.

    Attributes:
        name: the model's name in requests.
        model: folder or hub id of the weights; of an adapter its base's.
        options: of ``vllm serve``, but for GPUs and address.
        tokenizer: whose tokenizer and chat template the server uses.
        shape: the model's ``config.json``.
    """

    name: str
    model: str
    options: list[str]
    tokenizer: ModelConfig
    shape: dict[str, Any]


def plan_serving(result: Result, name: str, max_length: int | None) -> Served:
    """Options for a model folder, or for an adapter unmerged on its base.

    Args:
        max_length: longest prompt and answer together, in tokens; None leaves it to the model's config. Not the
            recipe's ``pack_length``: training on short rows does not take away what the base can do beyond them.

    Raises:
        UserError: vLLM cannot serve this adapter unmerged, or its base has no config.
    """
    served = _plan_adapter(result, name) if result.kind == "adapter" else _plan_model(result.folder, name)
    length = ["--max-model-len", str(max_length)] if max_length is not None else []
    return Served(served.name, served.model, served.options + length, served.tokenizer, served.shape)


def choose_num_gpus(shape: dict[str, Any], asked: int | None, visible: int) -> int:
    """GPUs to cut the model over: as many as asked for, else of those there are as many as divide it.

    Raises:
        UserError: more than there are, or the model does not divide by them.
    """
    most = visible or max(1, asked or 1)  # a login node has none, and may still print the command
    fitting = [n for n in range(1, most + 1) if _divides(shape, n)]
    if asked is None:
        return fitting[-1]
    if asked not in fitting:
        heads = f"{shape['num_attention_heads']} heads on {_num_kv_heads(shape)} of keys and values"
        found = f"{asked}; this host has {visible}, and the model has {heads}"
        raise UserError("--gpus", found, ", ".join(map(str, fitting)), "choose one of these")
    return asked


def _plan_model(folder: Path, name: str) -> Served:
    path = str(folder.resolve())
    shape = _read_json(folder / "config.json")
    options = ["--served-model-name", name, "--dtype", _dtype(shape)]
    return Served(name, path, options, ModelConfig(path=path), shape)


def _plan_adapter(result: Result, name: str) -> Served:
    from trainer.model.adapter_files import check_adapter_config

    check_adapter_config(result.folder)
    config = _read_json(result.folder / ADAPTER_CONFIG)
    rank = _servable_rank(result.folder, config)
    base = _base_of(result, config)
    model, shape = _locate_base(base)
    folder = str(result.folder.resolve())
    tokenizer = ModelConfig(path=folder) if (result.folder / "tokenizer_config.json").exists() else base
    adapter = json.dumps({"name": name, "path": folder})  # NAME=PATH would not take a path with = or , in it
    dtype = result.config.model.dtype if result.config else _dtype(shape)
    options = ["--served-model-name", f"{name}-base", "--dtype", dtype]
    options += ["--revision", base.revision] if base.revision else []
    options += ["--tokenizer", folder] if tokenizer.path == folder else []
    options += ["--generation-config", folder] if (result.folder / "generation_config.json").exists() else []
    options += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", adapter]
    return Served(name, model, options, tokenizer, shape)


def _servable_rank(folder: Path, config: dict[str, Any]) -> int:
    fix = "`packtrain merge` it, and serve the merged folder"
    file = str(folder / ADAPTER_CONFIG)
    used = [field for field in ONLY_MERGED if config.get(field)]
    used += ["bias"] if config.get("bias", "none") != "none" else []
    if used:
        raise UserError(file, f"{used[0]}: {config[used[0]]}", "LoRA or rsLoRA alone, unmerged", fix)
    if config["r"] > LORA_RANKS[-1]:
        raise UserError(file, f"r {config['r']}", f"at most {LORA_RANKS[-1]} in vLLM, unmerged", fix)
    return next(rank for rank in LORA_RANKS if rank >= config["r"])


def _base_of(result: Result, config: dict[str, Any]) -> ModelConfig:
    """The base that the run's recipe names, at the commit that was trained on; else the one PEFT's config names."""
    if result.config is None:
        path = config.get("base_model_name_or_path")
        if not path:
            file = str(result.folder / ADAPTER_CONFIG)
            raise UserError(file, "base_model_name_or_path is empty", "the base's folder or hub id")
        return ModelConfig(path=path, revision=config.get("revision"))
    model = result.config.model
    if model.init == "random":
        fix = "`packtrain merge` it, and serve the merged folder"
        raise UserError("model.init", "random: the base has no files that vLLM could load", "pretrained, unmerged", fix)
    recorded = (training_of(result).get("base") or {}).get("revision")
    return model.model_copy(update={"revision": recorded or model.revision})


def _locate_base(base: ModelConfig) -> tuple[str, dict[str, Any]]:
    """Folder or hub id to give vLLM, and the base's ``config.json``."""
    from trainer.model.weights import resolve_folder

    is_local = Path(base.path).expanduser().is_dir()
    shape = _read_json(resolve_folder(base, ["config.json"]) / "config.json")
    if "num_key_value_heads_per_layer" in shape:
        fix = "`packtrain merge` the adapter: the merged model is a plain Llama"
        raise UserError(base.path, "a DeciLM, whose layers have different numbers of heads", "a plain Llama", fix)
    return str(Path(base.path).expanduser().resolve()) if is_local else base.path, shape


def _divides(shape: dict[str, Any], n: int) -> bool:
    """Whether vLLM can cut it so: heads, and what they share, go whole to a GPU, or are copied to several."""
    kv_heads = _num_kv_heads(shape)
    vocabulary = -(-shape.get("vocab_size", 0) // VOCABULARY_PADDING) * VOCABULARY_PADDING
    whole = (shape["num_attention_heads"], shape.get("intermediate_size", 0), vocabulary)
    return all(number % n == 0 for number in whole) and (kv_heads % n == 0 or n % kv_heads == 0)


def _num_kv_heads(shape: dict[str, Any]) -> int:
    return shape.get("num_key_value_heads") or shape["num_attention_heads"]


def _dtype(shape: dict[str, Any]) -> str:
    """The dtype the weights are saved in: vLLM's own choice would round float32 to 16 bits without a word."""
    return shape.get("dtype") or shape.get("torch_dtype") or "auto"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(str(file), f"no JSON: {error}", "the file as it was written", "copy it again") from error
    if not isinstance(found, dict):
        raise UserError(str(file), f"holds a {type(found).__name__}", "an object", "copy it again")
    return found
