"""The tokenizer and template that a model was trained with: its own files', not what its base's have become."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from trainer.checkpoint.base_location import locate_base
from trainer.checkpoint.result import Result
from trainer.config import ModelConfig, RunConfig
from trainer.data.masking import load_template, stop_token_ids
from trainer.data.templates import Template
from trainer.model.tokenizer import TOKENIZER_CONFIG, load_saved_tokenizer, load_tokenizer

logger = logging.getLogger(__name__)
OWN = "tokenizer"  # as `data.template`: the template that the tokenizer carries


@dataclass(frozen=True)
class Prompting:
    """How conversations become tokens for a model, and its rows labels.

    Attributes:
        template_name: the template, as `load_template` takes it.
    """

    tokenizer: PreTrainedTokenizerBase
    template_name: str = OWN

    @cached_property
    def template(self) -> Template:
        """The template itself."""
        return load_template(self.template_name, self.tokenizer)

    @cached_property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer."""
        return stop_token_ids(self.template, self.tokenizer)

    def as_trained(self, config: RunConfig) -> RunConfig:
        """The recipe, naming the template that lies with the model: a file named there may have changed since."""
        return config.model_copy(update={"data": config.data.model_copy(update={"template": self.template_name})})


def load_prompting(result: Result) -> Prompting:
    """Those of a model's or an adapter's folder; the base's, as they are now, where an adapter's has none.

    Raises:
        UserError: there is no tokenizer, or a file of it is missing or broken.
    """
    if result.kind == "model":
        return Prompting(load_tokenizer(ModelConfig(path=str(result.folder))))
    if (result.folder / TOKENIZER_CONFIG).exists():
        trusted = result.config is not None and result.config.model.trust_remote_code
        return Prompting(load_saved_tokenizer(result.folder, trusted))
    base = locate_base(result)
    if result.config is None:
        return Prompting(load_tokenizer(base))
    _warn_of(result.folder.resolve(), base.tokenizer or base.path)
    return Prompting(load_tokenizer(base), result.config.data.template)


@cache
def _warn_of(folder: Path, source: str) -> None:
    """Once: a command may ask for the tokenizer several times."""
    logger.warning(
        "%s has no tokenizer of its own, as earlier versions wrote checkpoints: %s's tokenizer and data.template are "
        "taken as they are now",
        folder,
        source,
    )
