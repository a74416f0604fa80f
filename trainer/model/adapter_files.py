"""Adapters in PEFT's files, which PEFT and vLLM read too."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from trainer.errors import UserError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


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
    check_adapter(folder)
    stored, attached = PeftConfig.from_pretrained(str(folder)), model.peft_config["default"]
    for field in ("r", "lora_alpha", "use_rslora", "use_dora"):
        if getattr(stored, field) != getattr(attached, field):
            raise UserError(
                str(folder / ADAPTER_CONFIG),
                f"{field} {getattr(stored, field)}",
                f"{getattr(attached, field)}, by the recipe",
            )
    return load_file(folder / ADAPTER_WEIGHTS)


def check_adapter(folder: Path) -> None:
    """Looks at an adapter's files without reading its weights.

    Raises:
        UserError: a file is missing or truncated, or see `check_adapter_config`.
    """
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(str(folder / name), "no such file", "a folder in PEFT's format")
    check_adapter_config(folder)
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt"):
            pass
    except SafetensorError as error:
        raise UserError(str(folder / ADAPTER_WEIGHTS), f"truncated or no safetensors file: {error}") from error


def check_adapter_config(folder: Path) -> None:
    """Refuses adapters that are more than low-rank matrices beside an untouched base.

    Raises:
        UserError: the adapter changed the base when it was made (PiSSA, OLoRA ...), is no LoRA, or has no scale.
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
    for name in ("r", "lora_alpha"):
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(str(file), f"{name} {value}", "a number above 0", "take the file that PEFT wrote")
    init = config.get("init_lora_weights", True)
    if init not in (True, False, "gaussian", "eva"):
        raise UserError(
            str(file),
            f"init_lora_weights {init!r}, which changes the base's weights when it is attached",
            "true, false, gaussian, eva",
            "convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
