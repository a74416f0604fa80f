"""Adapters in PEFT's files, which PEFT and vLLM read too."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from trainer.config import AdapterConfig
from trainer.errors import UserError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Fields of PEFT's config that would make other sums of the same tensors, and that no recipe sets.
NEVER_SET = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)


def adapter_names(model: nn.Module) -> dict[str, str]:
    """PEFT's names of an adapter's tensors, and the trained parameters they are.

    Not to be asked while the model computes: PEFT asks modules to save for their state, at which FSDP2 would cut what
    it has gathered.
    """
    trained = {name: torch.empty(1, 1, device="meta") for name, p in model.named_parameters() if p.requires_grad}
    found = get_peft_model_state_dict(model, state_dict=dict(trained), save_embedding_layers=False)
    names = {id(tensor): name for name, tensor in trained.items()}
    return {key: names[id(tensor)] for key, tensor in found.items()}


def save_adapter(model: nn.Module, folder: Path, tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Writes the adapter of a PeftModel in PEFT's format and names, which PEFT, vLLM and `load_adapter` read.

    Args:
        tensors: whole, by PEFT's names (`adapter_names`); default: the model's own.
    """
    assert isinstance(model, PeftModel)
    folder.mkdir(parents=True, exist_ok=True)
    if tensors is None:
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        folder / ADAPTER_WEIGHTS,
        metadata={"format": "pt"},
    )
    config = model.peft_config["default"]
    training, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = training


def load_adapter(model: nn.Module, folder: Path, recipe: AdapterConfig) -> None:
    """Puts the adapter weights of a PEFT folder into the attached adapter, which was made by `recipe`.

    Raises:
        UserError: files missing or broken, or an adapter of another shape or kind than the attached one.
    """
    assert isinstance(model, PeftModel)
    tensors = read_tensors(folder, recipe)
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


def read_tensors(folder: Path, recipe: AdapterConfig | None = None) -> dict[str, torch.Tensor]:
    """An adapter's tensors, on the CPU.

    Raises:
        UserError: see `check_adapter`; or a tensor holds NaN or Inf.
    """
    check_adapter(folder, recipe)
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor.to(torch.float32)).all()):
            fix = "take the adapter of an earlier checkpoint, or train anew"
            raise UserError(str(folder / ADAPTER_WEIGHTS), f"tensor {name} holds NaN or Inf", "finite numbers", fix)
    return tensors


def check_adapter(folder: Path, recipe: AdapterConfig | None = None) -> None:
    """Looks at an adapter's files without reading its weights.

    Raises:
        UserError: a file is missing or truncated, or see `check_adapter_config`.
    """
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(str(folder / name), "no such file", "a folder in PEFT's format")
    check_adapter_config(folder, recipe)
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt"):
            pass
    except SafetensorError as error:
        raise UserError(str(folder / ADAPTER_WEIGHTS), f"truncated or no safetensors file: {error}") from error


def check_adapter_config(folder: Path, recipe: AdapterConfig | None = None) -> None:
    """Refuses adapters that are more than low-rank matrices beside an untouched base.

    Args:
        recipe: what the adapter was trained as, where that is known.

    Raises:
        UserError: the adapter changed the base when it was made (PiSSA, OLoRA ...), is no LoRA, has no scale, or is
            another by its config than by the recipe.
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
    for name, trained in _fields_of(recipe).items() if recipe else ():
        if (config.get(name) or None) != (trained or None):
            shown = f"{trained:g}" if isinstance(trained, float) else trained or "not set"
            allowed = f"{shown}, by the recipe"
            raise UserError(str(file), f"{name} {config.get(name)}", allowed, "put back what training wrote")


def _fields_of(recipe: AdapterConfig) -> dict[str, Any]:
    """What a recipe sets of the fields in PEFT's config that decide what the tensors compute."""
    return {
        "r": recipe.r,
        "lora_alpha": recipe.alpha,
        "use_rslora": recipe.rslora,
        "use_dora": recipe.dora,
        "modules_to_save": list(recipe.modules_to_save),
        **dict.fromkeys(NEVER_SET),
    }
