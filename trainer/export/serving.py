"""What a server needs beside the weights: the tokenizer with the template trained with, and where answers end."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from trainer.config import RunConfig
from trainer.data.masking import load_template, stop_token_ids, template_text
from trainer.errors import UserError
from trainer.export.base import GENERATION_CONFIG
from trainer.export.verify_files import compare_tokenizers
from trainer.model.folder import base_folder
from trainer.model.tokenizer import load_saved_tokenizer


def tokenizer_as_trained(tokenizer: PreTrainedTokenizerBase, template_name: str) -> PreTrainedTokenizerBase:
    """`tokenizer`, carrying the chat template that ``data.template`` names."""
    if (text := template_text(load_template(template_name, tokenizer))) is not None:
        tokenizer.chat_template = text
    return tokenizer


def make_serving_files(config: RunConfig, model_config: Any, tokenizer: PreTrainedTokenizerBase) -> dict[Path, bytes]:
    """What `write_serving_files` writes for a training, by name in the folder.

    Made once, when it begins: at a save its thread may be using the tokenizer, and the hub or the base be gone.

    Raises:
        UserError: saved and loaded again, the tokenizer is another one.
    """
    with tempfile.TemporaryDirectory(prefix="packtrain-serving-") as place:
        folder = Path(place)
        write_serving_files(folder, base_folder(config.model), model_config, tokenizer, config.data.template)
        saved = load_saved_tokenizer(folder, config.model.trust_remote_code)
        if problems := compare_tokenizers(saved, tokenizer):
            found = f"saved and loaded again, it is another one: {problems[0]}"
            raise UserError("model.tokenizer", found, "one that can be exported", "name another in model.tokenizer")
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_serving_files(
    folder: Path,
    settings_of: Path | None,
    model_config: Any,
    tokenizer: PreTrainedTokenizerBase,
    template_name: str,
) -> None:
    """Writes tokenizer, chat template and ``generation_config.json`` into a model's folder.

    Args:
        settings_of: folder whose generation settings go on to hold, where it has them.
        model_config: has the token ids, where there is no generation config.
        template_name: ``data.template`` of the training.
    """
    stop_tokens = stop_token_ids(load_template(template_name, tokenizer), tokenizer)
    tokenizer_as_trained(tokenizer, template_name).save_pretrained(folder)
    settings = _generation_settings(settings_of, model_config, stop_tokens)
    (folder / GENERATION_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"it holds a {type(settings).__name__}")
    except ValueError as error:
        raise UserError(str(file), f"no JSON object: {error}", "the base's own", "download or copy it again") from error
    return settings


def _generation_settings(settings_of: Path | None, model_config: Any, stop_tokens: list[int]) -> dict[str, Any]:
    """The folder's generation config with the trained stop tokens among its end tokens."""
    file = settings_of / GENERATION_CONFIG if settings_of else None
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
