"""What vLLM is to load for a folder, and the protocol of a process in which it does; this file never imports vLLM."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.layout import hash_file, read_manifest
from trainer.checkpoint.result import ADAPTER_CONFIG, Result
from trainer.config import ModelConfig
from trainer.errors import PacktrainError, UserError
from trainer.export.adapter import Adapter, read_adapter
from trainer.export.base import EMBEDDING, BaseTensors, check_unchanged
from trainer.export.merge import base_of_result
from trainer.model.adapter_files import ADAPTER_WEIGHTS
from trainer.model.decilm import DeciLMConfig
from trainer.model.weights import read_config

logger = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[1]
LARGEST_RANK = 512  # vllm/config/lora.py, MaxLoRARanks
# What vllm/lora/peft_helper.py refuses, or does not read and so takes for a plain adapter.
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
SHOWN_OF_LOG = 2000


class CannotServe(UserError):
    """vLLM would not load a folder, or would make another model of it."""


@dataclass(frozen=True)
class Servable:
    """A model as vLLM loads it.

    Attributes:
        model: folder of the whole model, or of the base of `adapter`.
        tokenizer: folder of the tokenizer and chat template.
        dtype: of weights and computation, such as ``bfloat16``.
        max_length: positions the model has.
        num_heads: attention heads, which GPUs share. num_kv_heads: of keys and values, likewise or copied to several.
        adapter: PEFT folder to serve unmerged; None where `model` is the whole.
        rank: of the adapter.
    """

    model: str
    tokenizer: str
    dtype: str
    max_length: int
    num_heads: int
    num_kv_heads: int
    adapter: str | None = None
    rank: int = 0


@dataclass(frozen=True)
class Scores:
    """What a model makes of the scored tokens of one row.

    Attributes:
        logprobs: of the row's own tokens, in nats.
        tops: the likeliest token at each place.
        margins: log-probability of the likeliest less that of the next; empty where the engine does not tell.
    """

    logprobs: list[float]
    tops: list[int]
    margins: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """A greedy answer to a conversation.

    Attributes:
        prompt_ids: tokens the engine made of the messages. ids: the answer's, with the token it stopped at.
        stopped: the engine ended it at a stop token, not for its length.
    """

    prompt_ids: list[int]
    ids: list[int]
    stopped: bool


@dataclass(frozen=True)
class Job:
    """Questions to one engine.

    Attributes:
        conversations: each ``{"messages": [...], "tools": [...]}``, to be asked through the engine's own chat path.
        rows: each ``(ids, start)``: tokens to score from position `start` on.
        max_length: tokens that the longest conversation may take with its answer.
        stop_ids: tokens that end answers beside those that the folder's files name.
    """

    servable: Servable
    conversations: list[dict[str, Any]]
    rows: list[tuple[list[int], int]]
    max_new_tokens: int
    max_length: int
    stop_ids: list[int]


@dataclass(frozen=True)
class Served:
    """The engine's replies, in the order of the job's questions.

    Attributes:
        engine: name and version.
        without_adapter: scores of the same rows by the base alone, where an adapter is served unmerged.
    """

    engine: str
    answers: list[Answer]
    scores: list[Scores]
    without_adapter: list[Scores] | None


def vllm_is_usable() -> bool:
    """Whether vLLM is installed and a GPU is visible."""
    return importlib.util.find_spec("vllm") is not None and torch.cuda.is_available()


def find_servable(result: Result) -> Servable:
    """What vLLM can load that is the trained model: the whole, else the adapter on its 16-bit base, else its merge.

    Raises:
        CannotServe: there is nothing of the kind; the text says why.
        UserError: the base is another one than was trained on.
    """
    if result.kind == "model":
        return whole_model(result.folder)
    adapter = read_adapter(result.folder)
    reason = _why_merged_only(result, adapter)
    if reason is None:
        return _unmerged(result, adapter)
    if merged := _merge_of(result):
        logger.info("vLLM loads %s, as %s", merged, reason)
        return whole_model(merged)
    raise CannotServe(str(result.folder), reason, fix="merge it (packtrain merge), or --engine transformers")


def whole_model(folder: Path) -> Servable:
    """A folder that holds a whole model and its tokenizer.

    Raises:
        CannotServe: its architecture is none of vLLM's.
    """
    config = read_config(folder)
    if isinstance(config, DeciLMConfig):
        raise CannotServe(str(folder), "vLLM has no class for its DeciLM", fix="--engine transformers")
    saved = BaseTensors(ModelConfig(path=str(folder)))
    return Servable(
        model=str(folder),
        tokenizer=str(folder),
        dtype=_name(config.dtype or saved.saved_dtype(EMBEDDING)),  # vLLM's own choice would make 16 bits of float32
        max_length=config.max_position_embeddings,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
    )


def _unmerged(result: Result, adapter: Adapter) -> Servable:
    base = base_of_result(result, adapter)
    check_unchanged(base, result)
    own_tokenizer = (result.folder / "tokenizer_config.json").exists()
    return Servable(
        model=str(base.folder),
        tokenizer=str(result.folder if own_tokenizer else base.model.tokenizer or base.folder),
        dtype=_dtype(result, adapter),
        max_length=base.config.max_position_embeddings,
        num_heads=base.config.num_attention_heads,
        num_kv_heads=base.config.num_key_value_heads,
        adapter=str(result.folder),
        rank=max(pair.a.shape[0] for pair in adapter.low_rank.values()),
    )


def _dtype(result: Result, adapter: Adapter) -> str:
    if result.config:
        return result.config.model.dtype
    return _name(base_of_result(result, adapter).saved_dtype(EMBEDDING))


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _why_merged_only(result: Result, adapter: Adapter) -> str | None:
    """Why vLLM cannot put this adapter on its base as it was trained; None where it can."""
    if result.config and result.config.quantization:
        return f"it was trained on a base in {result.config.quantization.type}, and the 16-bit one is another model"
    base = base_of_result(result, adapter)
    if base.folder is None:
        return "its base was made from a seed and has no files"
    if isinstance(base.config, DeciLMConfig):
        return "vLLM has no class for its DeciLM base"
    if unread := [name for name in ONLY_MERGED if adapter.config.get(name)]:
        return f"vLLM applies no adapter with {unread[0]}"
    if adapter.config.get("bias", "none") != "none":
        return f"vLLM applies no adapter with bias {adapter.config['bias']}"
    if adapter.replaced:
        return f"it brings {next(iter(adapter.replaced))} of its own, which vLLM does not take from an adapter"
    if (rank := max(pair.a.shape[0] for pair in adapter.low_rank.values())) > LARGEST_RANK:
        return f"it has rank {rank}, and vLLM takes at most {LARGEST_RANK}"
    if _dtype(result, adapter) == "float32":
        return "vLLM computes adapters in 16 bits, and it was trained in float32"
    return None


def _merge_of(result: Result) -> Path | None:
    """The run's merged folder, if it holds this very adapter on the base trained on."""
    if result.run_dir is None or result.config is None or not result.run_dir.merged.exists():
        return None
    record = read_manifest(result.run_dir.merged)
    trained_on = "dequantized" if result.config.quantization else "original"
    files = {name: hash_file(result.folder / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}
    is_same = record.get("merged_onto") == trained_on and record.get("adapter", {}).get("files") == files
    return result.run_dir.merged if is_same else None


def serve_in_child(job: Job) -> Served:
    """Has vLLM do `job` in a process of its own, whose end gives all of its GPU memory back.

    Raises:
        PacktrainError: it failed; with the end of what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="packtrain-vllm-") as place:
        asked, replied, log = (Path(place) / name for name in ("job.json", "served.json", "log.txt"))
        asked.write_text(json.dumps(asdict(job)), encoding="utf-8")
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-P", "-m", "trainer.vllm_engine", str(asked), str(replied)]
        with log.open("w") as out:
            status = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, stdout=out, stderr=out).returncode
        if status != 0:
            said = log.read_text(errors="replace").strip()[-SHOWN_OF_LOG:]
            raise PacktrainError(f"vLLM failed on {job.servable.model} (exit status {status}):\n{said}")
        return _parse_served(json.loads(replied.read_text(encoding="utf-8")))


def parse_job(record: dict[str, Any]) -> Job:
    """A job as `serve_in_child` writes it."""
    rows = [(ids, start) for ids, start in record["rows"]]
    return Job(**{**record, "servable": Servable(**record["servable"]), "rows": rows})


def _parse_served(record: dict[str, Any]) -> Served:
    base = record["without_adapter"]
    return Served(
        engine=record["engine"],
        answers=[Answer(**answer) for answer in record["answers"]],
        scores=[Scores(**scores) for scores in record["scores"]],
        without_adapter=None if base is None else [Scores(**scores) for scores in base],
    )
