"""What a server needs beside the weights: the tokenizer with the template trained with, and where answers end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from trainer.config import ModelConfig
from trainer.data.masking import load_template, stop_token_ids, template_text
from trainer.errors import UserError
from trainer.model.folder import resolve_folder


def tokenizer_as_trained(tokenizer: PreTrainedTokenizerBase, template_name: str) -> PreTrainedTokenizerBase:
    """`tokenizer`, carrying the chat template that ``data.template`` names."""
    if (text := template_text(load_template(template_name, tokenizer))) is not None:
        tokenizer.chat_template = text
    return tokenizer


def write_serving_files(
    folder: Path,
    base: ModelConfig,
    model_config: Any,
    tokenizer: PreTrainedTokenizerBase,
    template_name: str,
) -> None:
    """Writes tokenizer, chat template and ``generation_config.json`` into a model's folder.

    Args:
        base: whose generation settings go on to hold, where it has files.
        model_config: has the token ids, where the base has no generation config.
        template_name: ``data.template`` of the training.
    """
    stop_tokens = stop_token_ids(load_template(template_name, tokenizer), tokenizer)
    tokenizer_as_trained(tokenizer, template_name).save_pretrained(folder)
    base_folder = None if base.init == "random" else resolve_folder(base)
    settings = _generation_settings(base_folder, model_config, stop_tokens)
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"it holds a {type(settings).__name__}")
    except ValueError as error:
        raise UserError(str(file), f"no JSON object: {error}", "the base's own", "download or copy it again") from error
    return settings


def _generation_settings(base_folder: Path | None, model_config: Any, stop_tokens: list[int]) -> dict[str, Any]:
    """The base's generation config with the trained stop tokens among its end tokens."""
    file = base_folder / "generation_config.json" if base_folder else None
    if file and file.exists():
        settings = _read_settings(file)
    else:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        settings = {n: getattr(model_config, n) for n in names if getattr(model_config, n, None) is not None}
    configured = settings.get("eos_token_id")
    configured = configured if isinstance(configured, list) else [configured]
    ends = list(dict.fromkeys(i for i in [*stop_tokens, *configured] if i is not None))
    if ends:
        settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return settings
