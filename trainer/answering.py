"""Who answers: vLLM where it is installed and can compute, transformers else; both are asked the same tokens."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from trainer.checkpoint.result import Result, check_files, find_result
from trainer.data.templates import Template
from trainer.errors import UserError
from trainer.generate import load_for_inference, prompt_token_ids
from trainer.prompting import load_prompting
from trainer.servable import WITHOUT_VLLM, CannotServe, find_servable, vllm_is_usable

if TYPE_CHECKING:
    from trainer.vllm_engine import VLLMEngine

logger = logging.getLogger(__name__)
EngineName = Literal["auto", "vllm", "transformers"]


class Answerer(Protocol):
    """A model ready to answer, whatever computes it."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    def prompt_ids(self, prompt: str | Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a user's text, or of a conversation that ends with the user."""

    @property
    def answer(self) -> Callable[..., list[str]]:
        """``answer(prompt_ids, max_new_tokens, temperature, top_p, num_beams, streamer)``, as `generate` has them."""


@dataclass(frozen=True)
class VLLMModel:
    """An `Answerer` on vLLM.

    Attributes:
        stop_ids: tokens that end answers, beside those in the files that vLLM reads.
    """

    engine: VLLMEngine
    tokenizer: PreTrainedTokenizerBase
    template: Template
    stop_ids: list[int]

    def prompt_ids(self, prompt: str | Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a user's text, or of a conversation that ends with the user."""
        return prompt_token_ids(prompt, self.template, self.tokenizer)

    def answer(
        self,
        prompt_ids: Sequence[list[int]],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        num_beams: int = 1,
        streamer: BaseStreamer | None = None,
    ) -> list[str]:
        """Answers without special tokens, in the order of the prompts; a `streamer` receives each when it is whole."""
        found = self.engine.complete(prompt_ids, max_new_tokens, temperature, top_p, num_beams, self.stop_ids)
        for prompt, answer in zip(prompt_ids, found, strict=True) if streamer else ():
            for ids in (prompt, answer):
                streamer.put(torch.tensor(ids))  # type: ignore[union-attr]
            streamer.end()  # type: ignore[union-attr]
        return self.tokenizer.batch_decode(found, skip_special_tokens=True)


def load_answerer(folder: Path, engine: EngineName = "auto", seed: int = 0, beams: bool = False) -> Answerer:
    """Loads a run dir, a merged or plain model folder, or an adapter folder.

    With `auto` transformers answers where vLLM is not to be had or would load another model; the log says so.

    Args:
        seed: of what is sampled.
        beams: beam search will be asked for.

    Raises:
        UserError: the folder holds nothing to load; or `vllm` is asked for, and cannot serve it or is not here.
    """
    if engine == "vllm" and not vllm_is_usable():
        raise UserError("--engine", WITHOUT_VLLM, "auto, transformers")
    if engine == "vllm" or (engine == "auto" and vllm_is_usable()):
        result = find_result(folder)
        try:
            return _load_vllm(result, seed, beams)
        except CannotServe as reason:
            if engine == "vllm":
                fix = f"{reason.fix}, or --engine transformers" if reason.fix else "--engine transformers"
                raise CannotServe(reason.where, reason.found, reason.allowed, fix) from reason
            logger.warning("transformers answers: %s: %s", reason.where, reason.found)
    loaded = load_for_inference(folder)
    torch.manual_seed(seed)
    return loaded


def _load_vllm(result: Result, seed: int, beams: bool) -> VLLMModel:
    servable = find_servable(result)
    loaded = result if servable.adapter else find_result(Path(servable.model))
    check_files(loaded)
    prompting = load_prompting(loaded)
    tokenizer, stop_ids = prompting.tokenizer, prompting.stop_ids
    if beams and set(stop_ids) - {tokenizer.eos_token_id}:
        found = "vLLM's beam search knows no stop token but the tokenizer's EOS, and the model was trained with another"
        raise CannotServe("num_beams", found, "1", "--engine transformers")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # what is printed are the answers
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logger.info("starting vLLM; VLLM_LOGGING_LEVEL=INFO has it say what it does")
    from trainer.vllm_engine import VLLMEngine

    return VLLMModel(VLLMEngine(servable, seed=seed), tokenizer, prompting.template, stop_ids)
