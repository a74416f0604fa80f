"""What models are worth on the same rows of a recipe's data: loss, perplexity, accuracy, and answers compared."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from blake3 import blake3
from torch import nn

from trainer.answers import is_equal, word_f1
from trainer.checkpoint.base_location import locate_base
from trainer.checkpoint.result import Result, find_result
from trainer.config import ModelConfig, RunConfig
from trainer.data.cache import ArrowPacks
from trainer.data.masking import load_template, reference_answer, render_prompt
from trainer.data.prepare import load_split_examples, load_splits
from trainer.data.sampler import collate
from trainer.data.splits import draw_splits
from trainer.data.types import Example
from trainer.errors import UserError
from trainer.generate import InferenceModel, default_device, load_base, load_for_inference
from trainer.loss import PackedCausalLM
from trainer.model.adapter_files import check_adapter
from trainer.model.attention import choose_attention, register_attention
from trainer.model.source import list_tensors
from trainer.recipe import load_recipe

logger = logging.getLogger(__name__)
Split = Literal["train", "validation", "test"]
NOT_OF_THE_MODEL = {"eval", "checkpoint", "tracking", "slurm", "export"}  # sections that say how a run is looked after
LARGEST_EXPONENT = 700.0  # of 1e304, just below what a float holds


@dataclass(frozen=True)
class Score:
    """What a model is worth on some rows.

    Attributes:
        loss: mean cross entropy over the rows' trained tokens, in nats.
        perplexity: ``exp(loss)``.
        token_accuracy: share of the trained tokens that the model holds for the likeliest, given those before; 0 to 1.
        exact_match: share of prompts whose greedy answer equals the reference, 0 to 1; None when not asked for.
        f1: mean `word_f1` of these answers; None when not asked for.
        rows: that the loss and the accuracy are of.
        answered: prompts that exact match and F1 are of.
        tokens: trained tokens.
    """

    loss: float
    perplexity: float
    token_accuracy: float
    exact_match: float | None
    f1: float | None
    rows: int
    answered: int
    tokens: int


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured of one model.

    Attributes:
        path: the folder, or the recipe of a base.
        total: over all rows of the split.
        sources: by data set, where the split has several.
        base_gib: size of the loaded model without its adapter, in GiB.
    """

    path: Path
    split: Split
    total: Score
    sources: dict[str, Score]
    base_gib: float


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate, looked at but not loaded.

    Attributes:
        path: a folder, or a recipe, which stands for its base as it is before training.
        result: what the folder holds; None of a recipe.
        config: the recipe the model was made by, where it is known.
        data: the recipe that names the rows.
    """

    path: Path
    result: Result | None
    config: RunConfig | None
    data: RunConfig


@dataclass
class _Tally:
    """Sums over the rows of one source."""

    loss: float = 0.0
    hits: int = 0
    tokens: int = 0
    rows: int = 0
    answered: int = 0
    equal: int = 0
    f1: float = 0.0

    def __add__(self, other: _Tally) -> _Tally:
        return _Tally(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def score(self) -> Score:
        loss, answered = self.loss / max(self.tokens, 1), self.answered
        return Score(
            loss=loss,
            perplexity=math.exp(min(loss, LARGEST_EXPONENT)),
            token_accuracy=self.hits / max(self.tokens, 1),
            exact_match=self.equal / answered if answered else None,
            f1=self.f1 / answered if answered else None,
            rows=self.rows,
            answered=answered,
            tokens=self.tokens,
        )


# -------------------------------------------------------------------------------------------- before anything is loaded


def find_candidates(paths: Sequence[Path], recipe: Path | None, split: Split) -> list[Candidate]:
    """Looks at everything that can be seen without loading a model.

    Args:
        paths: run dirs, model or adapter folders, or recipes.
        recipe: names the data; default: the one each model was made by.

    Raises:
        UserError: a model is not there or not whole, no recipe is known, the split has no rows, or the models'
            recipes name different rows.
    """
    given = load_recipe(recipe) if recipe else None
    candidates, first_rows = [], ""
    for path in paths:
        with _named(path):
            candidate = _look_at(path, given)
            rows = _describe_rows(candidate.data, split)
        candidates.append(candidate)
        first_rows = first_rows or rows
        if rows != first_rows:
            raise UserError(
                str(path),
                f"its recipe names other {split} rows than that of {paths[0]}",
                "models that are asked the same",
                "name one recipe for all: --recipe RECIPE",
            )
    return candidates


def varied_fields(candidates: Sequence[Candidate]) -> dict[str, list[Any]]:
    """Recipe fields in which the models differ: dotted name -> the value of each, None where it has none."""
    flat = [
        dict(_flatten(candidate.config.model_dump(mode="json"))) if candidate.config else {} for candidate in candidates
    ]
    names = dict.fromkeys(name for fields in flat for name in fields if name.partition(".")[0] not in NOT_OF_THE_MODEL)
    values = {name: [fields.get(name) for fields in flat] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def _look_at(path: Path, given: RunConfig | None) -> Candidate:
    result = None if path.is_file() else find_result(path)
    config = result.config if result else load_recipe(path)
    if result and result.kind == "adapter":
        check_adapter(result.folder, result.adapter_recipe)
        if config:
            list_tensors(locate_base(result))
    elif result:
        if any(result.folder.glob("*.safetensors")):
            list_tensors(ModelConfig(path=str(result.folder)))
    elif config:
        list_tensors(config.model)
    data = given or config
    if data is None:
        raise UserError(str(path), "records no recipe, so its data is unknown", fix="name one: --recipe RECIPE")
    return Candidate(path, result, config, data)


def _describe_rows(config: RunConfig, split: Split) -> str:
    """Equal for equal rows of equal sources, read the same way."""
    digest = blake3()
    parts = draw_splits(config).get(split)
    if not parts:
        raise UserError(f"data.split.{split}", "the recipe has no such rows", "a share above 0, or sources", "set it")
    for part in parts:
        digest.update(repr([part.rows.content_hash, part.source.format, sorted(part.columns.items())]).encode())
        digest.update(part.indices.tobytes())
    return digest.hexdigest()


def _flatten(fields: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        elif value is not None:
            yield prefix + name, value


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Has every error say which of the models it is about."""
    try:
        yield
    except UserError as error:
        if error.where.startswith(str(path)):
            raise
        raise UserError(str(path), f"{error.where}: {error.found}", error.allowed, error.fix) from error


# ------------------------------------------------------------------------------------------------------------ measuring


def evaluate(
    candidate: Candidate,
    split: Split = "validation",
    exact_match: bool = True,
    max_rows: int | None = None,
    device: torch.device | None = None,
) -> Evaluation:
    """Loads one model and measures it; nothing of it stays in memory.

    Args:
        exact_match: also answer the split's prompts greedily.
        max_rows: answer only the first so many prompts of each source.

    Raises:
        UserError: the model cannot be loaded, or a row has no answer to compare with.
    """
    try:
        with _named(candidate.path):
            return _evaluate(candidate, split, exact_match, max_rows, device or default_device())
    finally:
        gc.collect()  # modules refer to one another
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _evaluate(
    candidate: Candidate, split: Split, exact_match: bool, max_rows: int | None, device: torch.device
) -> Evaluation:
    if candidate.result is None:
        assert candidate.config is not None
        loaded = load_base(candidate.config, device)
    else:
        loaded = load_for_inference(candidate.path, device)
    data = _as_trained(candidate, loaded)
    packs = dict(load_splits(data, loaded.tokenizer).items())[split]
    examples = _first(load_split_examples(data, split, loaded.tokenizer), max_rows) if exact_match else []
    references = [reference_answer(example) for example in examples]
    tallies = _tally_tokens(loaded.model, packs, candidate.config or data, device)
    if examples:
        _tally_answers(tallies, loaded, examples, references, data)
    total = sum(tallies.values(), _Tally()).score()
    scores = {source: tally.score() for source, tally in tallies.items()} if len(tallies) > 1 else {}
    return Evaluation(candidate.path, split, total, scores, _base_bytes(loaded.model) / 2**30)


def _as_trained(candidate: Candidate, loaded: InferenceModel) -> RunConfig:
    """The recipe of the rows, which are rendered by a model's own template unless another recipe is given for them."""
    if candidate.result is None or candidate.data is not candidate.config:
        return candidate.data
    return loaded.prompting.as_trained(candidate.data)


def _first(examples: list[Example], max_rows: int | None) -> list[Example]:
    """At most so many of each source."""
    taken: dict[str, list[Example]] = {}
    for example in examples:
        taken.setdefault(example.source, []).append(example)
    return [example for of_source in taken.values() for example in of_source[:max_rows]]


@torch.no_grad()
def _tally_tokens(model: nn.Module, packs: ArrowPacks, config: RunConfig, device: torch.device) -> dict[str, _Tally]:
    """Losses and hits of the packs' trained tokens by source, through the forward that training uses."""
    module = PackedCausalLM(model, getattr(torch, config.compute_dtype)).eval()
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    register_attention()
    # As it trained if it can here: a run on an H200 is evaluated on a laptop too.
    wish = "sdpa" if config.model.attention == "sdpa" else "auto"
    attention = choose_attention(wish, causal_lm.config, config.compute_dtype, device)
    causal_lm.set_attn_implementation(attention)  # type: ignore[operator]
    tallies: dict[str, _Tally] = {}
    for index, pack in enumerate(packs):
        batch = collate([pack])
        losses, hits = (scores.cpu() for scores in module.score(batch.to(device)))
        documents = torch.bucketize(batch.trained_positions, batch.cu_seqlens[1:], right=True)
        for document, source in enumerate(packs.sources(index)):
            own = documents == document
            tallies[source] = tallies.setdefault(source, _Tally()) + _Tally(
                loss=losses[own].sum(dtype=torch.float64).item(),
                hits=int(hits[own].sum()),
                tokens=int(own.sum()),
                rows=1,
            )
    return tallies


def _tally_answers(
    tallies: dict[str, _Tally],
    loaded: InferenceModel,
    examples: list[Example],
    references: list[str],
    config: RunConfig,
) -> None:
    """Compares greedy answers with the examples' last assistant messages."""
    template = load_template(config.data.template, loaded.tokenizer)
    prompts = [render_prompt(example, template, loaded.tokenizer) for example in examples]
    # The longest reference, its stop token and one more: an answer that goes on is wrong anyhow.
    ids = loaded.tokenizer([text.strip() for text in references], add_special_tokens=False, verbose=False)["input_ids"]
    answers = loaded.answer(prompts, max(map(len, ids)) + 2)
    for example, answer, reference in zip(examples, answers, references, strict=True):
        found = _Tally(answered=1, equal=is_equal(answer, reference), f1=word_f1(answer, reference))
        tallies[example.source] += found


def _base_bytes(model: nn.Module) -> int:
    own = [p for name, p in model.named_parameters() if "lora_" not in name and ".modules_to_save." not in name]
    return sum(parameter.numel() * parameter.element_size() for parameter in own)
