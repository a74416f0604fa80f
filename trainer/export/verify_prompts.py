"""The prompts on which two models are compared: of the run's own rows where its data is there."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal

from jinja2 import TemplateError

from trainer.config import RunConfig
from trainer.data.masking import render_prompt
from trainer.data.prepare import iter_split_examples
from trainer.data.templates import Template
from trainer.data.types import Example
from trainer.errors import UserError
from trainer.export.verify_files import PROMPTS
from trainer.prompting import Prompting

logger = logging.getLogger(__name__)
MAX_PROMPT_TOKENS = 64


def collect_prompts(config: RunConfig | None, prompting: Prompting) -> tuple[list[list[int]], str]:
    """Prompts of the run's own rows, or fixed ones where there is no run or its data is gone."""
    tokenizer: Any = prompting.tokenizer
    if config is not None:
        try:
            split: Literal["validation", "train"] = "validation" if config.data.split.validation else "train"
            examples = iter_split_examples(prompting.as_trained(config), split, tokenizer)
            rendered = _render_prompts(examples, prompting.template, tokenizer)
            prompts = [ids[-MAX_PROMPT_TOKENS:] for ids in islice(rendered, len(PROMPTS))]
            if prompts:
                return prompts, f"prompts of the {split} rows"
        except (UserError, OSError) as error:
            logger.info("verifying on fixed prompts, as the run's data cannot be read: %s", error)
    return [tokenizer(text).input_ids[:MAX_PROMPT_TOKENS] for text in PROMPTS], "fixed prompts"


def _render_prompts(examples: Iterator[Example], template: Template, tokenizer: Any) -> Iterator[list[int]]:
    """Their prompts, but for rows that the template refuses, which were not trained on either."""
    for example in examples:
        try:
            ids = render_prompt(example, template, tokenizer)
        except TemplateError:
            continue
        if ids:
            yield ids
