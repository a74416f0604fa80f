"""Masks: which tokens of a conversation count in the loss.

The loss counts the assistant's answers and the stop token after each. Their tokens are found twice, by ways that share
nothing but the tokenised row:

- by tokens: the row begins with the tokens of the prompt alone and goes on to those of the conversation up to the
  answer; or, where the template has ``{% generation %}`` marks, those mark the answers;
- by characters: the template's layout says which characters of the rendered text are the answer and its stop token, and
  the tokenizer's offsets say which tokens those are.

Where the two differ the row is not trained on, and is counted under the reason.
"""

from __future__ import annotations

import contextlib
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar, cast

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from trainer.config import DataConfig
from trainer.data.formats import TEXT_ROLE, TOOL_CALLS
from trainer.data.layout import NO_STOP, Layouts, Rejected, Span, stop_candidates, texts_of
from trainer.data.templates import Template, adds_bos, fixed_date, load_template, template_text
from trainer.data.types import IGNORE_INDEX, Example, TokenizedRow
from trainer.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Dropped",
    "build_labels",
    "load_template",
    "reference_answer",
    "render_prompt",
    "stop_token_ids",
    "template_text",
]

TOO_LONG = "longer than pack_length"
ANSWER_TOO_FAR = "its answer starts beyond pack_length"
NOTHING_TRAINED = "no trained token"
EMPTY_ANSWER = "an answer is empty"
HOLDS_SPECIAL = "a message holds a special token's text"
NO_TOOLS = "the template does not write the row's tools"
DISAGREE = "the two derivations of the mask differ"
NOT_PREFIX_STABLE = "the template is not prefix-stable"
STRADDLES = "a token straddles the answer's start"
DOUBLE_BOS = "it begins with two BOS tokens"
NO_BOS = "it begins without BOS"
REFUSED = "the template refuses it"
LONGEST_REASON = 200
CHARACTERS_AT_A_TIME = 1 << 20
MANY_ANSWERS = 4
T = TypeVar("T")
R = TypeVar("R")
GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class Dropped:
    """A row that is not trained on, and why."""

    source: str
    row: int
    reason: str


@dataclass
class _Answer:
    """An assistant's message to find in the row.

    Attributes:
        prompt: rendered text of what comes before it, with the generation prompt.
        whole: rendered text up to and with it.
        chars: what to train on, by the layout.
    """

    index: int
    prompt: str
    whole: str
    chars: Span


@dataclass
class _Draft:
    """A rendered row, before it is tokenised."""

    example: Example
    text: str
    answers: list[_Answer]
    muted: list[Span]  # characters of messages that are not to train although all others are


def build_labels(
    examples: Sequence[Example], template: Template, tokenizer: PreTrainedTokenizerBase, data: DataConfig
) -> list[TokenizedRow | Dropped]:
    """Renders, tokenises and masks rows.

    Returns:
        For each example its row, cut to ``data.pack_length``, or why it is dropped.
    """
    drafter = _Drafter(template, tokenizer, data)
    marked = bool(template.text and GENERATION_MARK.search(template.text))
    made: list[TokenizedRow | Dropped] = []
    for drafts in _batches(_attempt(example, drafter.draft, example) for example in examples):
        texts = [text for draft in drafts if isinstance(draft, _Draft) for text in _texts_of(draft, marked)]
        encodings = _encode(tokenizer, list(dict.fromkeys(texts)))
        label = _Labeller(template, tokenizer, data, encodings, marked).label
        made += [_attempt(draft.example, label, draft) if isinstance(draft, _Draft) else draft for draft in drafts]
    return made


def _batches(drafts: Iterable[_Draft | Dropped]) -> Iterator[list[_Draft | Dropped]]:
    """So many at a time that their encodings, some hundred times as large as their text, stay small."""
    batch: list[_Draft | Dropped] = []
    size = 0
    for draft in drafts:
        batch.append(draft)
        size += sum(map(len, _texts_of(draft, marked=False))) if isinstance(draft, _Draft) else 0
        if size > CHARACTERS_AT_A_TIME:
            yield batch
            batch, size = [], 0
    yield batch


def render_prompt(example: Example, template: Template, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of `example` up to where its last answer starts, exactly as the row is trained.

    Without an answer at the end it is all messages and the generation prompt; a plain text goes on as it stands.
    """
    messages = example.messages
    if messages[0]["role"] == TEXT_ROLE:
        text, bos = messages[0]["content"], str(tokenizer.bos_token or "")
        return _encode_one(tokenizer, text if not adds_bos(tokenizer) or text.startswith(bos) else bos + text)
    template = replace(template, tools=example.tools)
    if messages[-1]["role"] != "assistant":
        return _encode_one(tokenizer, template.render(tokenizer, messages, add_generation_prompt=True))
    prompt = _encode_one(tokenizer, template.render(tokenizer, messages[:-1], add_generation_prompt=True))
    whole = _encode_one(tokenizer, template.render(tokenizer, messages))
    return whole[: _common_prefix(prompt, whole)]


def reference_answer(example: Example) -> str:
    """The assistant's last message.

    Raises:
        UserError: there is none.
    """
    for message in reversed(example.messages):
        if message["role"] == "assistant":
            return message["content"]
    raise UserError(
        f"{example.source}, row {example.row}",
        "the row has no answer to compare with",
        fix="evaluate rows with answers",
    )


def stop_token_ids(template: Template, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the tokenizer's EOS and the one the template writes after answers."""
    ids = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    if template.text is not None:
        with contextlib.suppress(Rejected, TemplateError):  # it takes no plain question and answer
            stop = Layouts(template, tokenizer).stop_token()
            ids |= {tokenizer.convert_tokens_to_ids(stop)} if stop else set()
    return sorted(ids)


def _attempt(example: Example, build: Callable[[T], R], argument: T) -> R | Dropped:
    """``build(argument)``, or why the row is dropped."""
    try:
        return build(argument)
    except Rejected as rejection:
        return Dropped(example.source, example.row, str(rejection))
    except TemplateError as error:
        said = "".join(character if character.isprintable() else " " for character in str(error)[:LONGEST_REASON])
        return Dropped(example.source, example.row, f"{REFUSED}: {said}")


class _Drafter:
    """Renders rows, and finds by characters what to train on."""

    def __init__(self, template: Template, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> None:
        self._template, self._tokenizer, self._data = template, tokenizer, data
        self._layouts = Layouts(template, tokenizer)
        self._adds_bos = adds_bos(tokenizer)
        self._special = _special_tokens(tokenizer)

    def draft(self, example: Example) -> _Draft:
        messages = example.messages
        if messages[0]["role"] == TEXT_ROLE:
            return _Draft(example, self._frame_text(messages[0]["content"]), [], [])
        if example.tools and not self._template.tools:
            return self._draft_with_tools(example)
        if any(self._special.search(text) for message in messages for text in texts_of(message).values()):
            raise Rejected(HOLDS_SPECIAL)
        wanted, silent = _choose_messages(messages, self._data.train_on)
        if self._data.train_on != "all":
            self._check_wanted([messages[i] for i in wanted])
        text = self._template.render(self._tokenizer, messages)
        if not wanted and not silent:
            return _Draft(example, text, [], [])
        spans = self._layouts.text_spans(messages, text)
        if len(wanted) > MANY_ANSWERS:
            wanted = self._within_reach(wanted, text, spans)
        answers = [self._answer(messages, i, text, spans) for i in wanted]
        return _Draft(example, text, answers, [spans[i] for i in silent])

    def _draft_with_tools(self, example: Example) -> _Draft:
        drafter = _Drafter(replace(self._template, tools=example.tools), self._tokenizer, self._data)
        draft = drafter.draft(example)
        if draft.text == self._template.render(self._tokenizer, example.messages):
            raise Rejected(NO_TOOLS)
        return draft

    def _within_reach(self, wanted: list[int], text: str, spans: Sequence[Span]) -> list[int]:
        """Of many answers those that begin within ``data.pack_length``: what is cut away needs no proof, and to prove
        an answer all that precedes it is rendered and tokenised."""
        limit, encoding = self._data.pack_length, _encode(self._tokenizer, [text])[text]
        if len(encoding.ids) <= limit:
            return wanted
        if self._data.long_rows == "drop":
            raise Rejected(TOO_LONG)
        reach = encoding.offsets[limit - 1][1]
        within = [i for i in wanted if spans[i][0] <= reach]
        if not within and self._data.train_on != "all":
            raise Rejected(ANSWER_TOO_FAR)
        return within

    def _answer(self, messages: Sequence[dict[str, Any]], index: int, text: str, spans: Sequence[Span]) -> _Answer:
        chars = self._layouts.answer_span(messages, index, spans)
        prompt = self._template.render(self._tokenizer, messages[:index], add_generation_prompt=True)
        is_last = index == len(messages) - 1
        whole = text if is_last else self._template.render(self._tokenizer, messages[: index + 1])
        return _Answer(index, prompt, whole, chars)

    def _frame_text(self, text: str) -> str:
        """Plain text between BOS and EOS, each once."""
        bos, eos = str(self._tokenizer.bos_token or ""), str(self._tokenizer.eos_token or "")
        begun = bos + text if self._adds_bos and not text.startswith(bos) else text
        return begun if begun.endswith(eos) else begun + eos

    def _check_wanted(self, answers: list[dict[str, Any]]) -> None:
        if not answers:
            raise Rejected(NOTHING_TRAINED)
        if not all(answer["content"].strip() or answer.get(TOOL_CALLS) for answer in answers):
            raise Rejected(EMPTY_ANSWER)


def _choose_messages(messages: Sequence[dict[str, Any]], train_on: str) -> tuple[list[int], list[int]]:
    """Indices of the answers whose tokens must be found, and of other messages to leave out where all is trained."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    silent = {i for i, message in enumerate(messages) if message.get("train") is False}
    if train_on == "all":
        return [i for i in answers if i in silent], sorted(silent.difference(answers))
    chosen = answers[-1:] if train_on == "last_assistant" else answers
    return [i for i in chosen if i not in silent], []


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """What a tokenizer takes for control tokens wherever it stands, such as ``<s>`` in a page of HTML."""
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens |= set(tokenizer.all_special_tokens)
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def _texts_of(draft: _Draft, marked: bool) -> list[str]:
    """What has to be tokenised; where the template marks the answers no prompt is compared."""
    compared = [] if marked else [text for answer in draft.answers for text in (answer.prompt, answer.whole)]
    return [draft.text, *compared]


class _Labeller:
    """Finds the trained tokens of drafts whose texts are tokenised."""

    def __init__(
        self,
        template: Template,
        tokenizer: PreTrainedTokenizerBase,
        data: DataConfig,
        encodings: dict[str, Encoding],
        marked: bool,
    ) -> None:
        self._template, self._tokenizer, self._data, self._encodings = template, tokenizer, data, encodings
        self._stops = set(stop_candidates(tokenizer))
        self._bos = tokenizer.bos_token_id
        self._adds_bos = adds_bos(tokenizer)
        self._marked = marked

    def label(self, draft: _Draft) -> TokenizedRow:
        encoding = self._encodings[draft.text]
        ids = encoding.ids
        self._check_bos(ids)
        spans = [_tokens_of(encoding, draft.text, answer.chars) for answer in draft.answers]
        found = self._spans_by_marks(draft, encoding) if self._marked else self._spans_by_prefix(draft, ids)
        if spans != found:
            raise Rejected(DISAGREE)
        if self._data.train_on == "all":
            labels = list(ids)
            for start, end in spans + [_tokens_of(encoding, draft.text, chars) for chars in draft.muted]:
                labels[start:end] = [IGNORE_INDEX] * (end - start)
        else:
            labels = [IGNORE_INDEX] * len(ids)
            for start, end in spans:
                labels[start:end] = ids[start:end]
        labels[:1] = [IGNORE_INDEX]
        return self._fit(draft.example, ids, labels)

    def _fit(self, example: Example, ids: list[int], labels: list[int]) -> TokenizedRow:
        """Cuts a long row from the right, if the start of its answer stays."""
        limit = self._data.pack_length
        first = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), None)
        if first is None:
            raise Rejected(NOTHING_TRAINED)
        if len(ids) > limit and self._data.long_rows == "drop":
            raise Rejected(TOO_LONG)
        if first >= limit:
            raise Rejected(ANSWER_TOO_FAR)
        return TokenizedRow(example.source, example.row, ids[:limit], labels[:limit], truncated=len(ids) > limit)

    def _check_bos(self, ids: list[int]) -> None:
        if self._bos is not None and ids[:2] == [self._bos, self._bos]:
            raise Rejected(DOUBLE_BOS)
        if self._adds_bos and ids[:1] != [self._bos]:
            raise Rejected(NO_BOS)

    def _spans_by_prefix(self, draft: _Draft, ids: list[int]) -> list[Span]:
        """Tokens after the prompt's, to the last stop token among those of the conversation up to the answer."""
        spans = []
        for answer in draft.answers:
            if not draft.text.startswith(answer.prompt) or not draft.text.startswith(answer.whole.rstrip()):
                raise Rejected(NOT_PREFIX_STABLE)
            prompt, whole = self._encodings[answer.prompt].ids, self._encodings[answer.whole].ids
            start, reach = _common_prefix(prompt, ids), _common_prefix(whole, ids)
            # A prompt that ends in a space leaves a token that sentencepiece joins to the answer's first word.
            if not (self._is_blank(prompt[start:]) and self._is_blank(whole[reach:])):
                raise Rejected(STRADDLES)
            end = next((i + 1 for i in reversed(range(start, reach)) if ids[i] in self._stops), None)
            if end is None:
                raise Rejected(NO_STOP)
            spans.append((start, end))
        return spans

    def _is_blank(self, ids: list[int]) -> bool:
        return not ids or not str(self._tokenizer.decode(ids)).strip()

    def _spans_by_marks(self, draft: _Draft, encoding: Encoding) -> list[Span]:
        """Tokens that the template's ``{% generation %}`` marks say the assistant wrote."""
        messages = draft.example.messages
        rendered: Any = render_jinja_template(
            [[{key: value for key, value in message.items() if key != "train"} for message in messages]],
            tools=list(draft.example.tools) or None,
            chat_template=self._template.text,
            return_assistant_tokens_mask=True,
            strftime_now=fixed_date,
            **cast(dict[str, Any], self._tokenizer.special_tokens_map),
        )
        texts, marks = rendered  # for one conversation, each in a list
        if texts[0] != draft.text:
            raise Rejected(DISAGREE)
        mask = [0] * len(encoding.ids)
        for start, end in marks[0]:
            first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
            if first is None or last is None:
                raise Rejected(DISAGREE)
            mask[first : last + 1] = [1] * (last + 1 - first)
        edges = [i for i, (left, right) in enumerate(pairwise([0, *mask, 0])) if left != right]
        runs = list(zip(edges[::2], edges[1::2], strict=True))
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if len(runs) != len(answers):
            raise Rejected(DISAGREE)
        return [runs[answers.index(answer.index)] for answer in draft.answers]


def _tokens_of(encoding: Encoding, text: str, chars: Span) -> Span:
    """Tokens that hold the characters `chars`; a leading space may lie before them in the first token.

    Offsets never decrease. Tokens of one character's bytes share its offsets.
    """
    start, end = chars
    offsets = encoding.offsets
    first = bisect_right(offsets, start, key=lambda offset: offset[1])
    last = bisect_left(offsets, end, key=lambda offset: offset[0])
    if first < last and text[offsets[first][0] : start].strip():
        raise Rejected(STRADDLES)
    return first, max(first, last)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> dict[str, Encoding]:
    """Encodings by text. Rendered text has its special tokens: none are added."""
    if not texts:
        return {}
    batch = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    assert batch.encodings is not None
    return dict(zip(texts, batch.encodings, strict=True))


def _encode_one(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(_encode(tokenizer, [text])[text].ids)


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    length = min(len(left), len(right))
    return next((i for i in range(length) if left[i] != right[i]), length)
