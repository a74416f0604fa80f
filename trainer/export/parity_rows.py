"""Rows to hold an engine against: the run's own as they were trained on, and fixed prompts where these are few."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from jinja2 import TemplateError

from trainer.config import RunConfig
from trainer.data.formats import TEXT_ROLE
from trainer.data.masking import build_labels, render_prompt, stop_token_ids
from trainer.data.prepare import iter_split_examples
from trainer.data.templates import Template
from trainer.data.types import Example, TokenizedRow
from trainer.errors import UserError
from trainer.generate import prompt_token_ids
from trainer.prompting import Prompting

logger = logging.getLogger(__name__)
LEAST_ROWS, MOST_ROWS = 100, 128
MAX_ROW_TOKENS = 1024
SPLITS: tuple[Literal["validation", "test", "train"], ...] = ("validation", "test", "train")
CHUNK = 64  # examples rendered at once
ASKED: tuple[str, ...] = ("What is", "Explain", "Give an example of", "Who first wrote about", "List three facts about")
ASKED += ("Write a sentence about", "What is the opposite of", "Why do people like", "Ask a question about", "Name")
ABOUT = ("rain", "a prime number", "bread", "the moon", "a contract", "music", "a river", "sleep", "salt", "a bridge")


@dataclass(frozen=True)
class ParityRow:
    """One row.

    Attributes:
        ids: token ids as trained on; of an answer up to its stop token.
        answer: position where the answer starts; None where there is none to score, but the whole row.
        messages: what a chat server is asked; None for plain text.
        tools: functions that the conversation may call.
        stop: the token that ends the answer; None where there is no answer, or its end was cut off.
        is_fixed: it is a prompt of `ASKED` and `ABOUT`, not a row that was trained on.
    """

    ids: list[int]
    answer: int | None
    messages: list[dict[str, Any]] | None
    tools: list[dict[str, Any]]
    stop: int | None
    is_fixed: bool = False

    @property
    def prompt(self) -> list[int]:
        """What stands before the answer."""
        return self.ids[: self.answer]

    @property
    def scored(self) -> tuple[list[int], int]:
        """The row, and the position of its first token to score."""
        return self.ids, self.answer or 1


def collect_rows(config: RunConfig | None, prompting: Prompting, max_tokens: int) -> tuple[list[ParityRow], str]:
    """Up to `MOST_ROWS` rows of the run, validation before test before train; filled up to `LEAST_ROWS`.

    Args:
        config: the run's recipe; without one there are fixed prompts alone.
        max_tokens: that the model takes at once; rows are cut to it, and to `MAX_ROW_TOKENS`.

    Returns:
        The rows, and what they are, in words.
    """
    rows: list[ParityRow] = []
    template, tokenizer = prompting.template, prompting.tokenizer
    config = prompting.as_trained(config) if config else None
    sources, limit = [], min(max_tokens, MAX_ROW_TOKENS)
    for split in SPLITS if config else ():
        assert config is not None
        if split != "train" and not getattr(config.data.split, split):
            continue
        found = list(islice(_rows_of(config, split, template, tokenizer, limit), MOST_ROWS - len(rows)))
        rows += found
        sources += [f"{len(found)} {split} row{'s' * (len(found) != 1)}"] if found else []
    if missing := max(0, LEAST_ROWS - len(rows)):
        rows += [_fixed_row(text, template, tokenizer) for text in islice(_fixed_prompts(), missing)]
        sources.append(f"{missing} fixed prompts")
    return rows, " and ".join(sources)


def _rows_of(
    config: RunConfig, split: Literal["validation", "test", "train"], template: Template, tokenizer: Any, limit: int
) -> Iterator[ParityRow]:
    """The split's rows that are trained on and short enough; none where the split or its data are not to be had."""
    try:
        examples = iter_split_examples(config, split, tokenizer)
        while chunk := list(islice(examples, CHUNK)):
            for example, row in zip(chunk, build_labels(chunk, template, tokenizer, config.data), strict=True):
                if isinstance(row, TokenizedRow) and (found := _row(example, row, template, tokenizer, limit)):
                    yield found
    except (UserError, OSError) as error:
        logger.info("no %s rows to compare on: %s", split, error)


def _row(example: Example, trained: TokenizedRow, template: Template, tokenizer: Any, limit: int) -> ParityRow | None:
    """The row from its last answer on; None where it ends with none, or its prompt is too long."""
    if example.messages[0]["role"] == TEXT_ROLE:
        ids = trained.ids[:limit]
        return ParityRow(ids, None, None, [], None) if len(ids) > 1 else None
    if example.messages[-1]["role"] != "assistant":
        return None
    try:
        start = len(render_prompt(example, template, tokenizer))
    except TemplateError:
        return None
    if start < 1 or start >= min(len(trained.ids), limit):
        return None
    stops = set(stop_token_ids(template, tokenizer))
    last = next((i for i in reversed(range(start, len(trained.ids))) if trained.ids[i] in stops), None)
    ended = last is not None and last < limit and not trained.truncated
    ids = trained.ids[: last + 1] if ended and last is not None else trained.ids[:limit]
    messages = [{k: v for k, v in message.items() if k != "train"} for message in example.messages[:-1]]
    return ParityRow(ids, start, messages, example.tools, ids[-1] if ended else None)


def _fixed_prompts() -> Iterator[str]:
    return (f"{asked} {about}" for about in ABOUT for asked in ASKED)


def _fixed_row(text: str, template: Template, tokenizer: Any) -> ParityRow:
    ids = prompt_token_ids(text, template, tokenizer)
    messages = None if template.text is None else [{"role": "user", "content": text}]
    return ParityRow(ids, None, messages, [], None, is_fixed=True)
