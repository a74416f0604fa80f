"""Loads a base model tensor by tensor onto its device, quantised on the way, and puts an adapter on it.

Host memory never holds more than a tensor or two: the model is built without storage, and each tensor goes from the
mapped safetensors file to the device and, for a 4-bit base, through the quantiser before the next is read.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from trainer.config import ModelConfig, RunConfig
from trainer.errors import UserError
from trainer.model.attention import choose_attention, register_attention
from trainer.model.lora import attach_adapter, decoder_linears
from trainer.model.nf4 import Format, NF4Linear, NF4LinearForDora, fingerprint
from trainer.model.weights import base_content_hash, build_on_meta, iter_base_tensors, load_base_config, resolve_folder

logger = logging.getLogger(__name__)
PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>")  # Llama 3.1 and later, Llama 3
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class BaseIdentity:
    """Which base was trained on; a checkpoint carries it, and resuming or merging on another is refused.

    Attributes:
        path: ``model.path`` of the recipe.
        revision: commit of the hub's snapshot, where there is one.
        content_hash: `trainer.model.weights.base_content_hash`.
        quantization: type, double_quant and compute_dtype of a 4-bit base.
        nf4_fingerprint: `trainer.model.nf4.fingerprint` of a 4-bit base.
    """

    path: str
    revision: str | None
    content_hash: str
    quantization: dict[str, Any] | None
    nf4_fingerprint: str | None


@dataclass
class LoadedModel:
    """A model ready to be wrapped by a strategy: the causal LM, or the PeftModel around it."""

    model: nn.Module
    base: BaseIdentity


# ------------------------------------------------------------------------------------------------------------ tokenizer


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer with a pad token; vocabulary and chat template as they come.

    A missing pad token becomes the unknown or a reserved token, and the end token only where there is neither: labels
    are masked by position, never by the pad id, so a model still learns to stop.

    Raises:
        UserError: there is no tokenizer, or it has tokens that the model has no embedding for.
    """
    path = config.tokenizer or config.path
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path,
            revision=None if config.tokenizer else config.revision,
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:300]
        if not config.tokenizer and not Path(path).expanduser().is_dir():
            raise UserError(
                "model.path",
                f"{path!r} is no folder, and the hub did not give it: {reason}",
                "a folder, or a hub id such as owner/name",
                "check the name and model.revision, or log in with `hf auth login` for gated models",
            ) from error
        raise UserError(
            "model.tokenizer" if config.tokenizer else "model.path",
            f"no tokenizer to be had from {path!r}: {reason}",
            "a folder with tokenizer files, or a hub id",
            "name one in model.tokenizer",
        ) from error
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        reserved = next((token for token in PAD_TOKENS if token in vocabulary), None)
        tokenizer.pad_token = tokenizer.unk_token or reserved or tokenizer.eos_token
    _check_vocabulary(tokenizer, config)
    return tokenizer


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> None:
    """Ids beyond the embeddings would end a run in an index error, on a GPU in a failed assertion."""
    try:
        base = load_base_config(config.model_copy(update={"init": "random"}))  # reads the config, never the weights
    except UserError:  # a tokenizer alone is enough to look at data; whoever loads the model is told
        return
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= base.vocab_size:
        raise UserError(
            "model.tokenizer" if config.tokenizer else "model.path",
            f"the tokenizer's token {token!r} has id {largest}, and the model has {base.vocab_size} embeddings",
            f"ids up to {base.vocab_size - 1}",
            "name the model's own tokenizer, or add rows once: model.resize_token_embeddings(len(tokenizer))",
        )


# ---------------------------------------------------------------------------------------------------------------- model


def load_model(config: RunConfig, device: torch.device) -> LoadedModel:
    """The base of `config` on `device`, with its adapter where the recipe has one.

    Frozen weights are in ``model.dtype``, trained ones in ``train.param_dtype``; only the latter require a gradient.

    Raises:
        UserError: files missing, truncated or of another shape; a model outside the Llama family; an adapter that
            does not fit.
    """
    register_attention()
    base_config = load_base_config(config.model)
    _check_window(base_config, config)
    attention = choose_attention(config.model, config.compute_dtype, device)
    model: Any = build_on_meta(base_config, getattr(torch, config.model.dtype), attention)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if config.quantization:
        _replace_linears(model, config)
    _allocate(model, config, device)
    _stream_weights(model, shapes, config, device)
    _fill_rotary_buffers(model, device)
    identity = _identify(model, config)
    model.name_or_path = config.model.path
    if config.adapter:
        model = attach_adapter(model, config.adapter, config.train.seed)
        model.peft_config["default"].base_model_name_or_path = config.model.path
        model.peft_config["default"].revision = config.model.revision
        _settle_trained(model, getattr(torch, config.train.param_dtype), device)
    return LoadedModel(model, identity)


def _check_window(base: PretrainedConfig, config: RunConfig) -> None:
    window = getattr(base, "sliding_window", None)
    if window is not None and window < config.data.pack_length:
        raise UserError(
            "data.pack_length",
            f"{config.data.pack_length} tokens on a model whose attention looks {window} back",
            f"at most {window}",
            "shorten pack_length, or choose a model without a sliding window",
        )
    reach = getattr(base, "max_position_embeddings", None)
    if reach is not None and reach < config.data.pack_length:
        text = "data.pack_length is %d, and the model knows %d positions: rows longer than that are new to it"
        logger.warning(text, config.data.pack_length, reach)


def _replace_linears(model: PreTrainedModel, config: RunConfig) -> None:
    """Puts empty 4-bit layers, still without storage, in the place of the decoder layers' linears."""
    assert config.quantization is not None
    kind = NF4LinearForDora if config.adapter and config.adapter.dora else NF4Linear
    format, compute_dtype = Format.of(config.quantization), getattr(torch, config.compute_dtype)
    for name, linear in decoder_linears(model).items():
        assert isinstance(linear, nn.Linear)
        layer = kind(
            linear.in_features, linear.out_features, linear.bias is not None, format, compute_dtype, device="meta"
        )
        model.set_submodule(name, layer)


def _allocate(model: PreTrainedModel, config: RunConfig, device: torch.device) -> None:
    """Gives every parameter its storage on `device`, dtype and `requires_grad`.

    All of it before the first tensor is read: what stays must not lie between the temporaries of what comes, or the
    allocator keeps the holes.
    """
    trained = config.adapter is None
    dtype = getattr(torch, config.train.param_dtype if trained else config.model.dtype)
    for name, parameter in list(model.named_parameters()):
        module, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        own_dtype = dtype if parameter.is_floating_point() else parameter.dtype
        storage = torch.empty(parameter.shape, dtype=own_dtype, device=device)
        setattr(module, leaf, nn.Parameter(storage, requires_grad=trained))
    if model.config.tie_word_embeddings:
        model.tie_weights()


@torch.no_grad()
def _stream_weights(
    model: PreTrainedModel, shapes: dict[str, tuple[int, ...]], config: RunConfig, device: torch.device
) -> None:
    missing, tied = set(shapes), {}
    for name, tensor in iter_base_tensors(config.model, config.train.seed, device):
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            tied[name] = tensor.clone()
            continue
        _check_tensor(name, tensor, shapes, config.model.path)
        missing.discard(name)
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, NF4Linear) and name.endswith(".weight"):
            # In the model's dtype first, as transformers hands weights to bitsandbytes.
            stored = tensor.to(device, getattr(torch, config.model.dtype))
            module.set_weight(stored)
        else:
            stored = model.get_parameter(name).copy_(tensor)
        _check_finite(name, stored, config.model.path)
    if missing:
        raise UserError(
            config.model.path, f"no tensor {sorted(missing)[0]} ({len(missing)} missing)", "all of config.json"
        )
    for name, tensor in tied.items():
        if not torch.equal(tensor.to(model.get_parameter(name)), model.get_parameter(name)):
            raise UserError(config.model.path, f"{name} differs from the embeddings that config.json ties it to")


def _check_tensor(name: str, tensor: torch.Tensor, shapes: dict[str, tuple[int, ...]], path: str) -> None:
    if name not in shapes:
        raise UserError(
            path, f"tensor {name}, which config.json has no place for", fix="use the model's own config.json"
        )
    if tuple(tensor.shape) != shapes[name]:
        raise UserError(path, f"tensor {name} of shape {list(tensor.shape)}", f"{list(shapes[name])}, by config.json")
    if not tensor.is_floating_point():
        raise UserError(path, f"tensor {name} of {tensor.dtype}", "16- or 32-bit floats", "name the unquantised model")


def _check_finite(name: str, stored: torch.Tensor, path: str) -> None:
    """By the sum, which no NaN or Inf leaves finite and which needs no memory."""
    if not math.isfinite(stored.sum(dtype=torch.float32).item()):
        raise UserError(
            path,
            f"tensor {name} holds NaN or Inf as {str(stored.dtype).removeprefix('torch.')}",
            "finite numbers",
            "download the model again; where float16 is too narrow for it, set model.dtype: bfloat16",
        )


def _fill_rotary_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Rebuilds modules whose buffers no file holds (rotary frequencies), which have no storage yet."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            rebuild: Any = type(module)
            model.set_submodule(name, rebuild(model.config).to(device))
    left = [name for name, tensor in _all_tensors(model) if tensor.is_meta]
    assert not left, f"no storage for {left}"


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _settle_trained(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(device, dtype)


def _identify(model: nn.Module, config: RunConfig) -> BaseIdentity:
    revision = config.model.revision
    if config.model.init == "pretrained" and not Path(config.model.path).expanduser().is_dir():
        revision = resolve_folder(config.model).name  # the hub's cache names a snapshot by its commit
    quantization = None
    if config.quantization:
        quantization = {**config.quantization.model_dump(), "compute_dtype": config.compute_dtype}
    return BaseIdentity(
        path=config.model.path,
        revision=revision,
        content_hash=base_content_hash(config.model, config.train.seed),
        quantization=quantization,
        nf4_fingerprint=fingerprint(model) if config.quantization else None,
    )


def set_recompute(model: nn.Module, full: bool) -> None:
    """Whether decoder layers keep their activations or (`full`) compute them again in backward; in train mode only."""
    causal_lm: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not full:
        causal_lm.gradient_checkpointing_disable()
        return
    causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # Non-reentrant checkpoints need no gradient at the embeddings; asking for it would cost one more backward matmul.
    causal_lm.disable_input_require_grads()


# -------------------------------------------------------------------------------------------------------------- adapter


def save_adapter(model: nn.Module, folder: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Writes the adapter of a PeftModel in PEFT's format and names, which PEFT, vLLM and `load_adapter` read.

    Args:
        state_dict: whole tensors of the model's trained parameters by name; default: the model's own.
    """
    assert isinstance(model, PeftModel)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = get_peft_model_state_dict(model, state_dict=state_dict, save_embedding_layers=False)
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        folder / ADAPTER_WEIGHTS,
        metadata={"format": "pt"},
    )
    config = model.peft_config["default"]
    training, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = training


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Puts the adapter weights of a PEFT folder into the attached adapter.

    Raises:
        UserError: files missing or broken, or an adapter of another shape or kind than the attached one.
    """
    assert isinstance(model, PeftModel)
    tensors = _read_adapter(model, folder)
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    if different := sorted(set(own) ^ set(tensors)):
        side = "the recipe" if different[0] in own else "the folder"
        raise UserError(
            str(folder), f"{len(different)} tensors differ: {different[0]} is only in {side}", "equal targets"
        )
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise UserError(str(folder), f"{name} of shape {list(tensor.shape)}", f"{list(own[name].shape)}")
    set_peft_model_state_dict(model, tensors)


def _read_adapter(model: PeftModel, folder: Path) -> dict[str, torch.Tensor]:
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(str(folder / name), "no such file", "a folder in PEFT's format")
    check_adapter_config(folder)
    stored, attached = PeftConfig.from_pretrained(str(folder)), model.peft_config["default"]
    for field in ("r", "lora_alpha", "use_rslora", "use_dora"):
        if getattr(stored, field) != getattr(attached, field):
            raise UserError(
                str(folder / ADAPTER_CONFIG),
                f"{field} {getattr(stored, field)}",
                f"{getattr(attached, field)}, by the recipe",
            )
    try:
        return load_file(folder / ADAPTER_WEIGHTS)
    except SafetensorError as error:
        raise UserError(str(folder / ADAPTER_WEIGHTS), f"truncated or no safetensors file: {error}") from error


def check_adapter_config(folder: Path) -> None:
    """Refuses adapters that are more than low-rank matrices beside an untouched base.

    Raises:
        UserError: the adapter changed the base when it was made (PiSSA, OLoRA ...), or is no LoRA.
    """
    file = folder / ADAPTER_CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(str(file), f"no JSON: {error}", "the file that PEFT wrote") from error
    if not isinstance(config, dict):
        raise UserError(str(file), f"holds a {type(config).__name__}", "the file that PEFT wrote")
    if config.get("peft_type") != "LORA":
        raise UserError(str(file), f"peft_type {config.get('peft_type')}", "LORA")
    init = config.get("init_lora_weights", True)
    if init not in (True, False, "gaussian", "eva"):
        raise UserError(
            str(file),
            f"init_lora_weights {init!r}, which changes the base's weights when it is attached",
            "true, false, gaussian, eva",
            "convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
