"""Proves that an engine serves the model that was trained: the same tokens asked, the same log-probabilities given.

The reference is transformers in the model's own dtype, streamed layer by layer, on rows rendered as for the training.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from transformers import PreTrainedTokenizerBase

from trainer.checkpoint.layout import read_manifest
from trainer.checkpoint.result import Result, check_files, find_result
from trainer.config import ModelConfig
from trainer.errors import PacktrainError
from trainer.export.as_trained import find_adapter
from trainer.export.base import BaseTensors, base_of_result
from trainer.export.parity_rows import ParityRow, collect_rows
from trainer.export.references import Score, score_adapted, score_base_of_merge, score_plain
from trainer.export.verify import find_merged
from trainer.generate import default_device
from trainer.prompting import Prompting, load_prompting
from trainer.servable import Servable, find_servable
from trainer.vllm_job import Answer, Job, Scores, Served, serve_in_child

MAX_MEAN_DIFFERENCE = 0.02  # of log-probabilities, in nats
MIN_EFFECT = 3 * MAX_MEAN_DIFFERENCE  # of what was trained; below it nothing tells the trained model from its base
LOGIT_STEPS = 64  # of the dtype's epsilon: 4 roundings of a logit between 16 and 32
SHORTEST_ANSWER, LONGEST_ANSWER = 16, 512
Chat = tuple[ParityRow, Answer]


@dataclass(frozen=True)
class ParityReport:
    """Evidence that an engine serves what was trained.

    Attributes:
        engine: its name and version. served: what it loaded, in words.
        prompts: the rows compared on, in words. conversations: of them, those sent as messages through its chat path.
        tokens: tokens scored: of the run's rows, and only where there are none of the fixed prompts.
        mean_difference: mean of ``|log p_engine - log p_transformers|`` over them, in nats. largest_difference: theirs.
        tops: tokens whose likeliest was compared, its margin being above `margin` nats; all agree.
        effect: mean of ``|log p_trained - log p_base|``, in nats; None where there is no base to compare with.
        stopped: share of the greedy answers that ended at the trained stop token, 0 to 1; None without references.
        computed: dtype and device of the reference.
        seconds: wall-clock time.
    """

    folder: Path
    engine: str
    served: str
    prompts: str
    conversations: int
    tokens: int
    mean_difference: float
    largest_difference: float
    tops: int
    margin: float
    effect: float | None
    stopped: float | None
    computed: str
    seconds: float


@dataclass(frozen=True)
class _Subject:
    """What is served, and how transformers scores it and its base."""

    servable: Servable
    served: str
    trained: Score
    base: Score | None


def check_parity(folder: Path, serve: Callable[[Job], Served] = serve_in_child) -> ParityReport:
    """Holds an engine against transformers on a merged folder or a run's, a whole model, or an adapter served unmerged.

    Args:
        serve: loads a model in the engine and asks it.

    Raises:
        UserError: there is no model that the engine could serve; see `find_servable`.
        PacktrainError: it does not serve what was trained; the text is the evidence.
    """
    started = time.monotonic()
    result = find_result(find_merged(folder) or folder)
    subject = _subject_of(result)
    prompting = _prompting_of(result)
    tokenizer, stop_ids = prompting.tokenizer, prompting.stop_ids
    rows, prompts = collect_rows(result.config, prompting, subject.servable.max_length - 1)
    torch.cuda.empty_cache()  # what verifying took on the GPU is the engine's now
    asked = [row for row in rows if row.messages is not None]
    scored = [row for row in rows if not row.is_fixed] or rows
    served = serve(_job(subject.servable, asked, scored, stop_ids))
    comparison = Comparison(subject, served, scored)
    chats = list(zip(asked, served.answers, strict=True))
    stopped, not_stopped = compare_stops(chats, comparison.num_stops)
    if problems := compare_prompts(chats, tokenizer) + comparison.problems() + not_stopped:
        text = "\n".join(f"  - {problem}" for problem in problems)
        raise PacktrainError(f"{served.engine} does not serve {result.folder} as it was trained ({prompts}):\n{text}")
    return ParityReport(
        folder=result.folder,
        engine=served.engine,
        served=subject.served,
        prompts=prompts,
        conversations=len(asked),
        tokens=comparison.num_tokens,
        mean_difference=comparison.mean_difference,
        largest_difference=comparison.largest_difference,
        tops=comparison.num_tops,
        margin=comparison.margin,
        effect=comparison.effect,
        stopped=stopped,
        computed=f"{subject.servable.dtype} on {default_device().type}",
        seconds=round(time.monotonic() - started, 3),
    )


class Comparison:
    """An engine's scores of rows beside transformers'.

    Attributes:
        num_stops: rows at whose end transformers finds their stop token the likeliest.
        margin: how far the likeliest token has to be above the next to be compared, in nats.
        effect: of what was trained on the log-probabilities; None without a base.
    """

    def __init__(self, subject: _Subject, served: Served, rows: list[ParityRow]) -> None:
        self._found, self._scored = served.scores, [row.scored for row in rows]
        self._unmerged = subject.servable.adapter is not None
        self._wanted = subject.trained(self._scored)
        base = served.without_adapter or (subject.base(self._scored) if subject.base else None)
        differences = _differences(self._found, self._wanted)
        self.num_tokens = len(differences)
        self.mean_difference, self.largest_difference = fmean(differences), max(differences)
        self.effect = fmean(_differences(self._found, base)) if base else None
        self.margin = max(MAX_MEAN_DIFFERENCE, LOGIT_STEPS * torch.finfo(getattr(torch, subject.servable.dtype)).eps)
        self.num_tops = sum(margin > self.margin for scores in self._wanted for margin in scores.margins)

        self.num_stops = sum(scores.tops[-1] == row.stop for row, scores in zip(rows, self._wanted, strict=True))

    def problems(self) -> list[str]:
        """What exceeds its bound, with the figures."""
        return self._compare_logprobs() + self._compare_tops() + self._compare_effect()

    def _compare_logprobs(self) -> list[str]:
        if self.mean_difference <= MAX_MEAN_DIFFERENCE:  # NaN is not
            return []
        beside = "" if self.effect is None else f"; from the base's own they differ by {self.effect:.3g}"
        return [
            f"log-probabilities differ from transformers' by {self.mean_difference:.3g} nats on average over "
            f"{self.num_tokens:,} tokens, at most {MAX_MEAN_DIFFERENCE} is allowed; by up to "
            f"{self.largest_difference:.3g}{beside}"
        ]

    def _compare_tops(self) -> list[str]:
        rows = zip(self._scored, self._found, self._wanted, strict=True)
        wrong = [
            (row, start + place)
            for row, ((_, start), found, wanted) in enumerate(rows)
            for place, margin in enumerate(wanted.margins)
            if margin > self.margin and found.tops[place] != wanted.tops[place]
        ]
        if not wrong:
            return []
        row, place = wrong[0]
        return [
            f"the likeliest token is another one at {len(wrong):,} of {self.num_tops:,} places where transformers puts "
            f"it more than {self.margin:.3g} nats above the next; first at token {place} of row {row}"
        ]

    def _compare_effect(self) -> list[str]:
        if self.effect is None or self.effect >= MIN_EFFECT:
            return []
        between = "with and without the adapter" if self._unmerged else "between the model and its base"
        return [
            f"log-probabilities differ by {self.effect:.3g} nats on average {between}, at least {MIN_EFFECT:.2g} is "
            "needed to tell the two apart: the adapter is not applied, or the training changed next to nothing"
        ]


def compare_prompts(chats: list[Chat], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Whether the engine makes of each row's messages the tokens that stood before its answer in the training."""
    wrong = [(answer.prompt_ids, row.prompt) for row, answer in chats if answer.prompt_ids != row.prompt]
    if not wrong:
        return []
    found, wanted = wrong[0]
    place = next((i for i, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]), len(wanted))
    double = "two BOS tokens, " if found[:2] == [tokenizer.bos_token_id] * 2 else ""
    return [
        f"of {len(wrong)} of {len(chats)} conversations the engine's chat makes other tokens than were trained on: "
        f"{double}from token {place} on {tokenizer.decode(found[place : place + 8])!r} ({len(found)} in all) for "
        f"{tokenizer.decode(wanted[place : place + 8])!r} ({len(wanted)})"
    ]


def compare_stops(chats: list[Chat], num_likeliest: int) -> tuple[float | None, list[str]]:
    """Whether greedy answers end where the training's did.

    A model need not have learnt every row, so an answer may run on; but none may run past a stop token that it has
    given, and not all may run on where all references end.

    Args:
        num_likeliest: references at whose end transformers finds the stop token the likeliest; for the message.

    Returns:
        The share of answers that ended at a trained stop token, of those whose reference does; and the problems.
    """
    trained = {row.stop for row, _ in chats if row.stop is not None}
    ended = [i for i, (row, _) in enumerate(chats) if row.stop is not None]
    if not ended:
        return None, []
    share = sum(_stops_at(chats[i][1], trained) for i in ended) / len(ended)
    past = sum(not trained.isdisjoint(answer.ids[:-1] if answer.stopped else answer.ids) for _, answer in chats)
    if past:
        return share, [
            f"{past} of {len(chats)} answers run past the stop token {sorted(trained)} that was trained: the engine "
            "does not know it; generation_config.json has to name it"
        ]
    if share == 0:
        return share, [
            f"none of {len(ended)} answers ends at the stop token {sorted(trained)}, as their references do; at the "
            f"end of a reference transformers finds it likeliest in {num_likeliest} of {len(ended)}"
        ]
    return share, []


def _stops_at(answer: Answer, stops: set[int]) -> bool:
    return answer.stopped and answer.ids[-1] in stops


def _differences(found: list[Scores], wanted: list[Scores]) -> list[float]:
    """Of the log-probabilities of all scored tokens."""
    return [abs(a - b) for f, w in zip(found, wanted, strict=True) for a, b in zip(f.logprobs, w.logprobs, strict=True)]


def _job(servable: Servable, asked: list[ParityRow], scored: list[ParityRow], stop_ids: list[int]) -> Job:
    """Answers get room for twice the longest reference; where they end the folder's own files have to say."""
    says_ends = servable.adapter is None or servable.generation_config is not None  # a checkpoint's adapter does not
    longest = max(len(row.ids) - len(row.prompt) for row in scored)
    max_new_tokens = min(max(2 * longest, SHORTEST_ANSWER), LONGEST_ANSWER)
    # What the engine makes of messages may be longer than what was trained on: to find that out it has to fit.
    max_length = 2 * (max(len(row.ids) for row in [*asked, *scored]) + max_new_tokens)
    return Job(
        servable=servable,
        conversations=[{"messages": row.messages, "tools": row.tools} for row in asked],
        rows=[row.scored for row in scored],
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        stop_ids=[] if says_ends else stop_ids,
    )


def _prompting_of(result: Result) -> Prompting:
    """Of the training: a merge's from the adapter that was merged, else the folder's own, which are as written."""
    if result.kind == "model" and find_merged(result.folder):
        return load_prompting(find_adapter(result.folder, read_manifest(result.folder)))
    check_files(result)
    return load_prompting(result)


def _subject_of(result: Result) -> _Subject:
    servable = find_servable(result)
    dtype, folder = getattr(torch, servable.dtype), Path(servable.model)
    if servable.adapter:
        base = base_of_result(result)
        return _Subject(servable, "the adapter, unmerged", score_adapted(base, result.folder, dtype), None)
    trained = score_plain(BaseTensors(ModelConfig(path=str(folder))), dtype)
    if find_merged(folder):
        return _Subject(servable, "the merged model", trained, score_base_of_merge(folder, dtype))
    config = result.config
    has_base = config is not None and config.model.init != "random"
    base_score = score_plain(BaseTensors(config.model, config.train.seed), dtype) if config and has_base else None
    return _Subject(servable, "the whole model", trained, base_score)
