"""Where the base lies that an adapter was trained on. Asks nobody over the network; imports no torch."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

from trainer.checkpoint.result import ADAPTER_CONFIG, Result
from trainer.config import ModelConfig
from trainer.errors import UserError
from trainer.recipe import load_recipe

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
NAMED = "base_model_name_or_path"  # of PEFT's config


def locate_base(result: Result) -> ModelConfig:
    """The base of `result`, where it is now: its content is compared by whoever reads it.

    What the user has named since counts (in the run's recipe, or in the adapter's config), then the path of the recipe
    trained with, then the place noted in training; of a base on the hub the commit trained on.

    Raises:
        UserError: the base was a local folder, and is at none of these places; or nothing names one.
    """
    peft = _read_peft_config(result.folder) if result.kind == "adapter" else {}
    if result.config is None:
        model, named = _by_peft(result, peft), []
    else:
        model, named = result.config.model, _named_since(result, peft)
    noted = (result.base or {}).get("path")
    for path in [*named, model.path, noted]:
        if path and Path(path).expanduser().exists():
            return model.model_copy(update={"path": path})
    for path in named:
        if HUB_ID.fullmatch(path):
            return model.model_copy(update={"path": path})
    if _was_local(model, result.base):
        raise _gone(result, model.path, noted)
    return model.model_copy(update={"revision": (result.base or {}).get("revision") or model.revision})


def how_to_name(result: Result) -> str:
    """What a user does to name another place of the base, such as the one it had in training."""
    noted = (result.base or {}).get("path") or ""
    place = f" to {noted}, where it was in training" if noted and Path(noted).exists() else ""
    if result.run_dir:
        return f"set model.path in {result.run_dir.recipe}{place}"
    return f"set {NAMED} in {result.folder / ADAPTER_CONFIG}{place}"


def _by_peft(result: Result, peft: dict[str, Any]) -> ModelConfig:
    if not peft.get(NAMED):
        raise UserError(str(result.folder / ADAPTER_CONFIG), f"{NAMED} is empty", "the base's folder or hub id")
    return ModelConfig.model_validate({"path": peft[NAMED], "revision": peft.get("revision")})


def _named_since(result: Result, peft: dict[str, Any]) -> list[str]:
    assert result.config is not None
    named = [str(peft.get(NAMED) or "")]
    if result.run_dir and result.run_dir.recipe.exists():
        with contextlib.suppress(UserError):
            named.insert(0, load_recipe(result.run_dir.recipe).model.path)
    return [path for path in named if path and path != result.config.model.path]


def _was_local(model: ModelConfig, base: dict[str, Any] | None) -> bool:
    """Whether the base was no model of the hub's, by its path or by what training noted."""
    if any(str(path).startswith(("/", ".", "~")) for path in (model.path, (base or {}).get("path"))):
        return True
    return base is not None and "revision" in base and base["revision"] is None and model.init != "random"


def _gone(result: Result, path: str, noted: str | None) -> UserError:
    found = f"no folder {path!r}" + ("" if Path(path).is_absolute() else f" in {Path.cwd()}")
    found += f", nor {noted}, where it was in training" if noted and noted != path else ""
    return UserError("model.path", found, "the base that was trained on", f"put it back, or {how_to_name(result)}")


def _read_peft_config(folder: Path) -> dict[str, Any]:
    """Empty of a broken file, which is told by whoever reads the adapter."""
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        return config if isinstance(config, dict) else {}
    return {}
