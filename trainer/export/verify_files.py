"""What a server reads beside the weights, compared with the training's: config, tokenizer, template, stop tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from trainer.errors import PacktrainError
from trainer.model.tokenizer import UNREADABLE

PROMPTS = ("The capital of France is", "Explain in one sentence why the sky is blue.", "1, 2, 3, 4,", "def add(a, b):")

MAX_LISTED = 8


def as_list(problems: Sequence[str]) -> str:
    """The first of them, a line each, and how many more there are."""
    more = [f"... and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
    return "\n".join(f"  - {problem}" for problem in [*problems[:MAX_LISTED], *more])


def read_exported_config(folder: Path) -> Any:
    """The transformers config of a folder that packtrain wrote.

    Raises:
        PacktrainError: its file is missing or broken.
    """
    try:
        return AutoConfig.from_pretrained(folder)
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise PacktrainError(f"{folder}: config.json is missing or broken: {reason}\n  fix: merge again") from error


def compare_tokenizer(folder: Path, wanted: PreTrainedTokenizerBase) -> list[str]:
    """The folder's tokenizer and chat template against those trained with."""
    try:
        found = AutoTokenizer.from_pretrained(folder)
    except UNREADABLE as error:
        return [f"tokenizer: cannot be loaded, a file of it is missing or broken: {' '.join(str(error).split())[:200]}"]
    return compare_tokenizers(found, wanted)


def compare_tokenizers(found: PreTrainedTokenizerBase, wanted: PreTrainedTokenizerBase) -> list[str]:
    """In what a tokenizer differs from the one trained with, also by what they make of `PROMPTS`."""
    problems = [
        f"tokenizer: {what} is {getattr(found, what)!r}, trained with {getattr(wanted, what)!r}"
        for what in ("bos_token", "eos_token", "chat_template")
        if getattr(found, what) != getattr(wanted, what)
    ]
    if found.get_vocab() != wanted.get_vocab():
        problems.append(f"tokenizer: {len(found)} tokens that are not the {len(wanted)} trained with")
    elif any(found(text).input_ids != wanted(text).input_ids for text in PROMPTS):
        problems.append("tokenizer: splits text otherwise than the one trained with")
    return problems


def compare_ends(folder: Path, settings_of: Path | None, base: Any, stop_tokens: list[int]) -> list[str]:
    """An answer has to end where it was trained to, and may end where the base's does; anywhere else it is cut.

    Args:
        settings_of: folder with the generation settings that the merge took over, the base's in training.
        base: the base's config.
    """
    ends = _ends_of(folder)
    if missing := [i for i in stop_tokens if i not in ends]:
        return [f"generation_config.json: ends at {ends}, without the trained stop token {missing[0]}"]
    of_base = (_ends_of(settings_of) if settings_of else []) + _as_list(base.eos_token_id)
    if foreign := sorted(set(ends).difference(stop_tokens, of_base)):
        return [f"generation_config.json: ends at {ends}, and neither training nor base end answers at {foreign[0]}"]
    return []


def _ends_of(folder: Path) -> list[int]:
    """Tokens that a folder's ``generation_config.json`` ends answers at."""
    file = folder / "generation_config.json"
    return _as_list(json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")) if file.exists() else []


def _as_list(ids: int | list[int] | None) -> list[int]:
    return list(ids) if isinstance(ids, list) else [ids] if ids is not None else []
