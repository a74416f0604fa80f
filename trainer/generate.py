"""Answers from a model: greedy, sampled or by beams, batched with left padding and a KV cache.

Prompts are rendered by the code that rendered the training rows, so a model is asked in the tokens it was taught.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils.logging import disable_progress_bar

from trainer.checkpoint.base_location import locate_base
from trainer.checkpoint.result import Result, check_files, find_result
from trainer.config import RunConfig
from trainer.data.formats import TEXT_ROLE
from trainer.data.layout import Rejected
from trainer.data.masking import render_prompt, stop_token_ids
from trainer.data.templates import Template
from trainer.data.types import Example
from trainer.errors import UserError
from trainer.export.base import BaseTensors, check_config, check_unchanged
from trainer.model.adapter_files import check_adapter_config, load_adapter
from trainer.model.attention import cached_attention
from trainer.model.folder import resolve_folder
from trainer.model.load import load_model
from trainer.model.tokenizer import load_tokenizer
from trainer.model.weights import read_config
from trainer.prompting import Prompting, load_prompting


@dataclass(frozen=True)
class InferenceModel:
    """A model ready to answer, with what renders its prompts.

    Attributes:
        prompting: how conversations become tokens.
        config: the recipe it was trained with, when the folder records one.
    """

    model: nn.Module
    prompting: Prompting
    config: RunConfig | None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer it was trained with."""
        return self.prompting.tokenizer

    @property
    def template(self) -> Template:
        """The template it was trained with."""
        return self.prompting.template

    def answer(self, prompt_ids: Sequence[list[int]], max_new_tokens: int, **settings: Any) -> list[str]:
        """`generate` with this model, ending at the stop token trained with."""
        stop_ids = self.prompting.stop_ids
        return generate(self.model, self.tokenizer, prompt_ids, max_new_tokens, stop_ids=stop_ids, **settings)

    def prompt_ids(self, prompt: str | Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a user's text, or of a conversation that ends with the user."""
        return prompt_token_ids(prompt, self.template, self.tokenizer)


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_for_inference(folder: Path, device: torch.device | None = None) -> InferenceModel:
    """Loads a run dir (base and adapter as trained), a merged or plain model folder, or an adapter folder.

    Raises:
        UserError: the folder holds none of these, or files that are not as their manifest says.
    """
    device = device or default_device()
    result = find_result(folder)
    check_files(result)
    prompting = load_prompting(result)
    if result.kind == "model":
        model = _load_plain(result.folder, device)
    elif result.config is None:
        model = _load_foreign_adapter(result, device)
    else:
        model = _load_own_adapter(result, result.config, device)
    return InferenceModel(model.eval(), prompting, result.config)


def load_base(config: RunConfig, device: torch.device | None = None) -> InferenceModel:
    """Loads the base of a recipe as a training would, quantised where it is, before its first step.

    Raises:
        UserError: see `load_model`.
    """
    tokenizer = load_tokenizer(config.model)
    model = load_model(
        _without_packing(config), device or default_device()
    ).model.eval()  # a fresh adapter changes nothing
    return InferenceModel(model, Prompting(tokenizer, config.data.template), config)


def _without_packing(config: RunConfig) -> RunConfig:
    """Answers take padded rows and a cache: no kernel for packed ones has to run here, or to prove itself."""
    return config.model_copy(update={"model": config.model.model_copy(update={"attention": "sdpa"})})


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[list[int]],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_beams: int = 1,
    batch_size: int = 32,
    stop_ids: Sequence[int] = (),
    streamer: BaseStreamer | None = None,
    together: bool = False,
) -> list[str]:
    """Continues each prompt until a stop token or `max_new_tokens`.

    Args:
        prompt_ids: token ids, each list of its own length, with begin tokens where the training had them.
        temperature: 0 decodes greedily; above, tokens are drawn with torch's global generator.
        top_p: share of probability that sampling draws from.
        num_beams: width of the beam search.
        batch_size: prompts in one forward.
        stop_ids: tokens that end an answer beside the tokenizer's and the model's own.
        streamer: receives tokens as they come (one prompt only).
        together: all processes do this, and none stops before all can: they gather cut weights from one another.

    Returns:
        The answers without special tokens, in the order of the prompts.
    """
    ends = sorted({*stop_ids, *_own_stop_ids(model, tokenizer)})
    settings = _generation_settings(ends, tokenizer.pad_token_id, max_new_tokens, temperature, top_p, num_beams)
    answers = [""] * len(prompt_ids)
    by_length = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))  # little padding in a batch
    with torch.no_grad(), cached_attention(model), _matmul_dtype(model):
        for start in range(0, len(by_length), batch_size):
            chosen = by_length[start : start + batch_size]
            inputs = _pad_left([prompt_ids[i] for i in chosen], settings.pad_token_id, next(model.parameters()).device)
            output = model.generate(  # type: ignore[operator]
                **inputs, generation_config=settings, streamer=streamer, synced_gpus=together
            )
            new_tokens = output[:, inputs["input_ids"].shape[1] :]
            texts = tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
            for index, text in zip(chosen, texts, strict=True):
                answers[index] = text
    return answers


def answer_samples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    template: Template,
    max_new_tokens: int,
    together: bool = False,
) -> list[str]:
    """Greedy answers in the middle of training: draws no random number and leaves the model's mode as it was."""
    was_training = model.training
    model.eval()
    try:
        ids = [prompt_token_ids(prompt, template, tokenizer) for prompt in prompts]
        stop_ids = stop_token_ids(template, tokenizer)
        return generate(model, tokenizer, ids, max_new_tokens=max_new_tokens, stop_ids=stop_ids, together=together)
    finally:
        model.train(was_training)


def prompt_token_ids(
    prompt: str | Sequence[dict[str, Any]], template: Template, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Token ids that a user's text, or a conversation that ends with the user, is asked in."""
    if isinstance(prompt, str):
        role = "user" if template.text is not None else TEXT_ROLE  # without a template a prompt is text to go on with
        prompt = [{"role": role, "content": prompt}]
    try:
        ids = render_prompt(Example("prompt", 0, list(prompt)), template, tokenizer)
    except (Rejected, TemplateError) as error:
        raise UserError("prompt", f"the template refuses it: {error}", fix="ask as the training rows do") from error
    if not ids:
        raise UserError("prompt", "is empty", "one token or more")
    return ids


def _load_own_adapter(result: Result, config: RunConfig, device: torch.device) -> nn.Module:
    """Base and adapter as they were trained."""
    assert config.adapter is not None
    model = locate_base(result)
    check_config(model, result)
    loaded = load_model(_without_packing(config.model_copy(update={"model": model})), device)
    check_unchanged(BaseTensors(model, config.train.seed), loaded.base.content_hash, result)
    load_adapter(loaded.model, result.folder, config.adapter)
    return loaded.model


def _load_plain(folder: Path | str, device: torch.device) -> nn.Module:
    """A model as transformers loads it, but for tensors that are missing: those it would fill with random numbers."""
    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=read_config(folder),
            dtype="auto",
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            str(folder), f"cannot be loaded: {reason}", "a folder that transformers can load", "copy it again"
        ) from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise UserError(str(folder), f"no tensor {missing[0]} ({len(missing)} missing)", "all of config.json")
    return model.to(device)


def _load_foreign_adapter(result: Result, device: torch.device) -> nn.Module:
    """An adapter that no run of ours made: PEFT knows what to do with it."""
    from peft import PeftModel

    check_adapter_config(result.folder)
    plain = _load_plain(resolve_folder(locate_base(result)), device)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(plain, str(result.folder))
    except (OSError, ValueError, RuntimeError, SafetensorError, UserWarning) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(str(result.folder), f"PEFT cannot load it: {reason}", "a folder that PEFT wrote") from error


def _generation_settings(
    stop_ids: list[int],
    pad_token_id: int | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    num_beams: int,
) -> GenerationConfig:
    """Every setting that transformers would else take from the model's own file is set here."""
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        num_beams=num_beams,
        repetition_penalty=1.0,
        eos_token_id=stop_ids or None,
        pad_token_id=pad_token_id if pad_token_id is not None else (stop_ids or [0])[0],
        use_cache=True,
        **sampling,
    )


def _own_stop_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end token and those of the model's generation config."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    configured = configured if isinstance(configured, list) else [configured]
    return [int(i) for i in [*configured, tokenizer.eos_token_id] if i is not None]


def _pad_left(prompts: list[list[int]], pad_token_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids = [[pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


@contextlib.contextmanager
def _matmul_dtype(model: nn.Module) -> Iterator[None]:
    """Autocast where weights of several dtypes meet, as in training: a float32 adapter on a 16-bit base."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    half = {p.dtype for p in parameters} - {torch.float32}
    mixed = len({p.dtype for p in parameters}) > 1
    dtype = next(iter(half)) if half else torch.float32
    with torch.autocast(parameters[0].device.type, dtype=dtype, enabled=mixed):
        yield
