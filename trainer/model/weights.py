"""What a base model is: its config, its files in a folder or the hub's cache, or a shape and a seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from trainer.config import ModelConfig
from trainer.errors import UserError
from trainer.model.decilm import DeciLMConfig, recognise_decilm
from trainer.model.folder import HUB_FILES, resolve_folder
from trainer.model.shapes import SHAPES, published_shape

MODEL_TYPES = ("llama", "mistral", DeciLMConfig.model_type)
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Llama-2's files on the hub still carry what older transformers kept of the rotary embedding.
STALE_SUFFIX = "rotary_emb.inv_freq"
# Fields of config.json that say where it is from, how it is loaded, and where answers begin and end.
NOT_COMPUTED_WITH = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
RANDOM_CHUNK = {
    "cpu": 2**18,
    "cuda": 2**24,
}  # elements of random numbers made at a time; the numbers do not depend on it


# --------------------------------------------------------------------------------------------------- config and folder


def read_config(source: Path | str) -> PretrainedConfig:
    """The config in a folder, a file or under a hub id, without a word of code that came with it.

    Raises:
        UserError: a DeciLM's numbers of heads do not fit it.
        Exception: transformers' own, where it cannot make a config of it.
    """
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if hasattr(config, "auto_map"):  # in an exported folder it would name files that are not there
        del config.auto_map
    return recognise_decilm(config, Path(source) / "config.json" if Path(source).is_dir() else source)


def load_base_config(model: ModelConfig) -> PretrainedConfig:
    """The transformers config of the base. With ``init: random`` a published shape needs no files.

    Raises:
        UserError: no config.json, an unreadable one, or a model outside the Llama family.
    """
    shape = published_shape(model.path) if model.init == "random" else None
    if shape is not None:
        return LlamaConfig(**shape, architectures=["LlamaForCausalLM"])
    path = Path(model.path).expanduser()
    if model.init == "random" and not path.exists() and "/" not in model.path:
        raise UserError("model.path", f"no shape {model.path!r}", f"a folder, a hub id, meta-llama/ + {list(SHAPES)}")
    file = path if path.is_file() else resolve_folder(model, ["config.json"] if model.init == "random" else HUB_FILES)
    file = file if file.is_file() else file / "config.json"
    if not file.is_file():
        raise UserError("model.path", f"no config.json in {file.parent}", "a folder that transformers can load")
    try:
        config = read_config(file.parent if file.name == "config.json" else file)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise UserError(
            str(file), f"not a model config: {error}", f"a config.json of {' or '.join(MODEL_TYPES)}"
        ) from error
    if config.model_type not in MODEL_TYPES:
        raise UserError(
            str(file), f"model_type {config.model_type}", ", ".join(MODEL_TYPES), "choose a Llama-family model"
        )
    if getattr(config, "quantization_config", None):
        raise UserError(str(file), "an already quantised model", "16- or 32-bit weights", "name the unquantised model")
    return config


def build_on_meta(config: PretrainedConfig, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The transformers ``...ForCausalLM`` of `config` without storage.

    Raises:
        UserError: the config describes no model, such as one with an unknown kind of rotary embedding.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    except (KeyError, ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        found = f"its config.json makes no model: {type(error).__name__}: {error}"
        raise UserError(config.name_or_path or "model.path", found, fix="use the model's own config.json") from error


# -------------------------------------------------------------------------------------------------------------- tensors


def weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """The safetensors files of `folder` and the tensors the index says each holds (None: no index).

    Raises:
        UserError: there are none, or the index names one that is missing.
    """
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file():
        try:
            weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            in_order = sorted((file_name, name) for name, file_name in weight_map.items())
            files: dict[Path, list[str] | None] = {folder / file_name: [] for file_name, _ in in_order}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(str(index), "not a safetensors index", fix="download the model again") from error
        for file_name, name in in_order:
            names = files[folder / file_name]
            assert names is not None
            names.append(name)
        for file in files:
            if not file.is_file():
                raise UserError(
                    str(file), "the index names this file and it is missing", fix="download the model again"
                )
        return files
    if single.is_file():
        return {single: None}
    if any(folder.glob("pytorch_model*.bin")):
        raise UserError(
            str(folder),
            "weights in pytorch_model.bin, whose loading may run code",
            f"{SINGLE} or {INDEX}",
            "convert once: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)",
        )
    raise UserError(str(folder), "no weights", f"{SINGLE} or {INDEX}", "init: random makes random ones")


def base_content_hash(model: ModelConfig, seed: int, check: Callable[[], None] = lambda: None) -> str:
    """blake3 of the whole base, in hex: its files' names and bytes, or shape and seed of a random one.

    Args:
        check: called before each file; what it raises ends the hashing.
    """
    if model.init == "random":
        digest = blake3()
        config = load_base_config(model).to_diff_dict()
        config.pop("transformers_version", None)
        digest.update(json.dumps([config, model.dtype, seed], sort_keys=True, default=str).encode())
        return "random-" + digest.hexdigest()
    files = FileHash()
    for file in weight_files(resolve_folder(model)):
        check()
        files.add(file)
    return files.text()


def computing_config(model: ModelConfig) -> dict[str, Any] | None:
    """The fields of the base's ``config.json`` that decide what its weights compute; None of ``init: random``, whose
    content hash has them.

    Raises:
        UserError: there is no such file, or it is broken.
    """
    if model.init == "random":
        return None
    file = resolve_folder(model, ["config.json"]) / "config.json"
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        return {name: fields[name] for name in sorted(fields.keys() - NOT_COMPUTED_WITH)}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(str(file), f"not a model config: {error}", "the base's own") from error


class FileHash:
    """blake3 of the names and bytes of files, one after the other."""

    def __init__(self) -> None:
        self._digest = blake3(max_threads=blake3.AUTO)

    def add(self, file: Path) -> None:
        """Reads the whole of `file`, with all processors."""
        self.begin(file)
        self._digest.update_mmap(file)

    def begin(self, file: Path) -> None:
        """Takes in a file's name; its bytes come by `update`."""
        self._digest.update(file.name.encode())

    def update(self, data: Any) -> None:
        """Takes in the next bytes of a file."""
        self._digest.update(data)

    def text(self) -> str:
        """The digest in hex of all so far."""
        return self._digest.hexdigest()


# --------------------------------------------------------------------------------------------------------------- random


def random_parameter(
    config: PretrainedConfig, name: str, shape: torch.Size, seed: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """One tensor of a random base: zeros for a bias, ones for a norm, `random_tensor` for a matrix."""
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=dtype, device=device)
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype, device=device)
    std: float = getattr(config, "initializer_range", 0.02)
    return random_tensor(name, shape, std, seed, dtype, device)


def random_tensor(
    name: str, shape: torch.Size, std: float, seed: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Nearly normal numbers that depend on `name`, `seed` and position alone: bitwise equal on CPU and CUDA.

    Each is the sum of the four 16-bit parts of a splitmix64 hash (Steele et al., doi:10.1145/2660193.2660195), which
    integers and one exact float32 product give alike everywhere; torch's generators differ between devices.
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    key = int.from_bytes(digest, "little", signed=True)
    output = torch.empty(shape, dtype=dtype, device=device)
    flat = output.view(-1)
    chunk = RANDOM_CHUNK.get(device.type, RANDOM_CHUNK["cpu"])
    parts_std = ((2**32 - 1) / 3) ** 0.5  # of the sum of four uniform 16-bit integers; their mean is 131070
    for start in range(0, flat.numel(), chunk):
        stop = min(start + chunk, flat.numel())
        bits = _splitmix64(torch.arange(start, stop, dtype=torch.int64, device=device), key)
        total = bits.bitwise_and(0xFFFF)
        for shift in (16, 32, 48):
            total += (bits >> shift).bitwise_and_(0xFFFF)
        flat[start:stop] = (total - 131070).to(torch.float32).mul_(std / parts_std)
    return output


def _splitmix64(counter: torch.Tensor, key: int) -> torch.Tensor:
    """Hashes ``[n]`` int64 in place; arithmetic wraps modulo 2**64, and shifts are made logical by masks."""
    state = counter.mul_(_signed(0x9E3779B97F4A7C15)).add_(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None)):
        state ^= (state >> shift).bitwise_and_((1 << (64 - shift)) - 1)
        if factor is not None:
            state *= _signed(factor)
    return state


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
