"""Where a base model's files are: in a folder, or in the hub's cache. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.config import ModelConfig
from trainer.errors import UserError
from trainer.model.shapes import published_shape

HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.jinja", "tokenizer*"]


def resolve_folder(model: ModelConfig, patterns: list[str] = HUB_FILES) -> Path:
    """The local folder of ``model.path``: itself, or the hub's snapshot in the cache, downloaded where missing.

    Raises:
        UserError: neither a folder nor to be had from the hub.
    """
    path = Path(model.path).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(model.path, revision=model.revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise UserError(
            "model.path", f"no folder {model.path!r}", "a folder, or a hub id such as owner/name"
        ) from error
    except (OSError, ValueError) as error:  # the hub's errors are all one of these
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(
            "model.path",
            f"{model.path!r} is no folder, and the hub did not give it: {type(error).__name__}: {first_line}",
            fix="check name, revision and network, or name a local folder; gated models want `hf auth login`",
        ) from error


def base_folder(model: ModelConfig) -> Path | None:
    """Where the base's files lie; None of ``init: random``, where a shape is all there is.

    Raises:
        UserError: see `resolve_folder`.
    """
    return None if model.init == "random" else resolve_folder(model)


def read_sizes(model: ModelConfig) -> dict[str, Any]:
    """The fields of the base's ``config.json``; of a published model that is not here its sizes, without the hub.

    Raises:
        UserError: there is none, or it is no JSON object.
    """
    path = Path(model.path).expanduser()
    if not path.exists() and (published := published_shape(model.path)) is not None:
        return published
    file = path if path.is_file() else resolve_folder(model, ["config.json"]) / "config.json"
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        found = f"no config.json in {file.parent}"
        raise UserError("model.path", found, "a folder that transformers can load") from error
    except (OSError, ValueError) as error:
        raise UserError(str(file), f"not a model config: {error}", "a config.json of a Llama-family model") from error
    if not isinstance(fields, dict):
        raise UserError(str(file), "not a model config", "a config.json of a Llama-family model")
    return fields
