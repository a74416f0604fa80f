"""Loss, perplexity and exact match of a model on one split of a recipe's data."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from trainer.config import RunConfig
from trainer.data.masking import load_template, reference_answer, render_prompt
from trainer.data.prepare import load_split_examples, load_splits
from trainer.data.sampler import collate
from trainer.data.types import Example, PackedRows
from trainer.errors import UserError
from trainer.generate import InferenceModel, default_device, load_for_inference
from trainer.loss import PackedCausalLM
from trainer.model.attention import choose_attention, register_attention
from trainer.recipe import load_recipe

logger = logging.getLogger(__name__)
Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class EvaluationResult:
    """What `evaluate_folder` measured.

    Attributes:
        loss: mean cross entropy over the split's trained tokens, in nats.
        perplexity: ``exp(loss)``.
        exact_match: share of prompts whose greedy answer equals the reference, 0 to 1; None when not asked for.
        rows: prompts answered, or rows of the split when none were.
        tokens: trained tokens of the split.
    """

    split: Split
    loss: float
    perplexity: float
    exact_match: float | None
    rows: int
    tokens: int


def evaluate_folder(
    folder: Path,
    recipe: Path | None = None,
    split: Split = "validation",
    exact_match: bool = True,
    max_rows: int | None = None,
    device: torch.device | None = None,
) -> EvaluationResult:
    """Evaluates a run dir, or any model or adapter folder with a recipe that names the data.

    Args:
        recipe: names the data; default: the one the folder was trained with.
        exact_match: also answer the split's prompts greedily.
        max_rows: answer only the first so many prompts.

    Raises:
        UserError: no recipe is known, or the split has no rows.
    """
    device = device or default_device()
    loaded = load_for_inference(folder, device)
    config = load_recipe(recipe) if recipe else loaded.config
    if config is None:
        raise UserError(str(folder), "records no recipe, so its data is unknown", fix="name one: --recipe RECIPE")
    splits = load_splits(config, loaded.tokenizer)
    packs = getattr(splits, split)
    if packs is None or len(packs) == 0:
        raise UserError(f"data.split.{split}", "the recipe has no such rows", "a share above 0, or sources", "set it")
    loss, tokens = packed_loss(loaded.model, packs, config, device)
    perplexity = math.exp(min(loss, 700.0))  # of 1e304, just below what a float holds
    if not exact_match:
        return EvaluationResult(split, loss, perplexity, None, splits.reports[split].rows, tokens)
    examples = load_split_examples(config, split, loaded.tokenizer)[:max_rows]
    matches = _exact_match(loaded, examples, config)
    return EvaluationResult(split, loss, perplexity, matches, len(examples), tokens)


@torch.no_grad()
def packed_loss(model: nn.Module, packs: PackedRows, config: RunConfig, device: torch.device) -> tuple[float, int]:
    """Mean loss over the packs' trained tokens, through the forward that training uses.

    Returns:
        The mean loss, and the number of trained tokens it is a mean over.
    """
    compute_dtype = getattr(torch, config.compute_dtype)
    module = PackedCausalLM(model, compute_dtype).eval()
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    register_attention()
    causal_lm.set_attn_implementation(choose_attention(config.model, config.compute_dtype, device))  # type: ignore[operator]
    total, tokens = 0.0, 0
    for pack in packs:
        batch = collate([pack]).to(device)
        total += module(batch).item()
        tokens += batch.num_trained_tokens
    return total / max(tokens, 1), tokens


def _exact_match(loaded: InferenceModel, examples: list[Example], config: RunConfig) -> float:
    """Share of `examples` whose greedy answer equals their last assistant message, ends trimmed."""
    template = load_template(config.data.template, loaded.tokenizer)
    prompts = [render_prompt(example, template, loaded.tokenizer) for example in examples]
    references = [reference_answer(example).strip() for example in examples]
    # The longest reference, its stop token and one more: an answer that goes on is wrong anyhow.
    longest = max(len(ids) for ids in loaded.tokenizer(references, add_special_tokens=False)["input_ids"]) + 2
    answers = loaded.answer(prompts, longest)
    return sum(a.strip() == r for a, r in zip(answers, references, strict=True)) / len(references)
