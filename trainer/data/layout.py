"""Where messages lie in rendered text, by characters.

The template is rendered once with a mark in place of every text of the messages. What stands between the marks is the
template's own (literals); a row's rendered text must be those literals with the row's texts between them. That finds
each message's characters without searching, so text that looks like the template, or occurs twice, misleads nobody; and
a template that drops, alters or reorders messages is seen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.data.formats import TOOL_CALLS
from trainer.data.templates import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Span = tuple[int, int]
Place = tuple[str | int, ...]  # such as ("content",) or ("tool_calls", 0, "function", "name")

ALTERED = "the template alters a message's text"
LEFT_OUT = "the template leaves out or reorders messages"
NO_CALLS = "the template does not write a message's tool calls"
NO_STOP = "the template writes no stop token after an answer"
NO_PROMPT_END = "the template's generation prompt is not what precedes the answer"
STARTS_WITH_ANSWER = "the conversation starts with the answer"
CONTENT: Place = ("content",)
_OPEN, _CLOSE = "\ue000", "\ue001"  # private use: no template looks for them
_MARK = re.compile(f"{_OPEN}(\\d+)\\.(\\d+){_CLOSE}")


class Rejected(Exception):
    """A row that must not be trained on; its text is the reason it is counted under."""


@dataclass(frozen=True)
class Layout:
    """A template around conversations of one shape.

    Attributes:
        literals: the template's text before, between and after the slots, ``[slots + 1]``.
        slots: ``(message index, place in the message)`` of the text that goes there, in the order of the text.
    """

    literals: tuple[str, ...]
    slots: tuple[tuple[int, Place], ...]


class Layouts:
    """The layouts of a template, each found once, and answers' characters by them."""

    def __init__(self, template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
        self._template, self._tokenizer = template, tokenizer
        self._known: dict[tuple[str, bool], Layout] = {}
        stops = sorted(stop_candidates(tokenizer).values(), key=len, reverse=True)
        self._stop = re.compile("\\s*(" + "|".join(map(re.escape, stops)) + ")") if stops else None

    def find(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> Layout:
        """The layout of conversations shaped as `messages`.

        Raises:
            Rejected: the template leaves messages out or changes their order.
        """
        marked = [_mark_texts(i, message) for i, message in enumerate(messages)]
        key = (json.dumps(marked, sort_keys=True, default=str), add_generation_prompt)
        if key not in self._known:
            text = self._template.render(self._tokenizer, marked, add_generation_prompt)
            pieces = _MARK.split(text)
            places = {(i, n): place for i, message in enumerate(messages) for n, place in enumerate(texts_of(message))}
            numbers = list(zip(map(int, pieces[1::3]), map(int, pieces[2::3]), strict=True))
            if not places.keys() >= set(numbers):  # a role or a name that looks like a mark
                raise Rejected(ALTERED)
            slots = tuple((i, places[i, n]) for i, n in numbers)
            order = [i for i, _ in slots]
            if order != sorted(order) or set(order) != set(range(len(messages))):
                raise Rejected(LEFT_OUT)
            called = {i for (i, _), place in places.items() if place[0] == TOOL_CALLS}
            if called - {i for i, place in slots if place[0] == TOOL_CALLS}:
                raise Rejected(NO_CALLS)
            self._known[key] = Layout(tuple(pieces[::3]), slots)
        return self._known[key]

    def text_spans(self, messages: Sequence[Message], text: str) -> list[Span]:
        """Characters of `text`, the rendered `messages`, that each message's own texts take up.

        Raises:
            Rejected: `text` is not the layout with the messages' texts. A template may trim the texts it asks with,
                as Llama-2's does, and write a tool call's as JSON; else every character of an answer counts.
        """
        layout = self.find(messages)
        texts = [texts_of(message) for message in messages]
        spans: dict[int, Span] = {}
        position = len(layout.literals[0])
        if not text.startswith(layout.literals[0]):
            raise Rejected(ALTERED)
        for (i, place), after in zip(layout.slots, layout.literals[1:], strict=True):
            value = texts[i][place]
            variants = [value] if messages[i]["role"] == "assistant" else [value, value.strip()]
            if place[0] == TOOL_CALLS:
                variants.append(json.dumps(value, ensure_ascii=False)[1:-1])
            end = next((position + len(v) for v in variants if text.startswith(v + after, position)), None)
            if end is None:
                raise Rejected(ALTERED)
            spans[i] = (spans.get(i, (position, 0))[0], end)
            position = end + len(after)
        if position != len(text):
            raise Rejected(ALTERED)
        return [spans[i] for i in range(len(messages))]

    def answer_span(self, messages: Sequence[Message], index: int, spans: Sequence[Span]) -> Span:
        """Characters to train on for the assistant's message `index`: from the generation prompt's end to its stop
        token's end.

        Args:
            spans: of `text_spans`.

        Raises:
            Rejected: there is no stop token, or the generation prompt is not what precedes the answer.
        """
        if index == 0:
            raise Rejected(STARTS_WITH_ANSWER)
        layout = self.find(messages)
        mine = [slot for slot, (i, _) in enumerate(layout.slots) if i == index]
        first, last = (layout.slots[slot][1] for slot in (mine[0], mine[-1]))
        before, after = layout.literals[mine[0]], layout.literals[mine[-1] + 1]
        prompt_end = self.find(messages[:index], add_generation_prompt=True).literals[-1]
        lead = before[len(prompt_end) :]
        if not before.startswith(prompt_end) or (first == CONTENT and lead.strip()):
            raise Rejected(NO_PROMPT_END)
        # What a template writes around reasoning and tool calls is the assistant's to write.
        stop = self._match_stop(after) if last == CONTENT else self._search_stop(after)
        if stop is None:
            raise Rejected(NO_STOP)
        return spans[index][0] - len(lead), spans[index][1] + stop.end()

    def _match_stop(self, text: str) -> re.Match[str] | None:
        return self._stop.match(text) if self._stop else None

    def _search_stop(self, text: str) -> re.Match[str] | None:
        """The first token that ends plain answers, else the first that may end one: some mark the end of a call."""
        found = list(self._stop.finditer(text)) if self._stop else []
        usual = self.stop_token()
        return next((match for match in found if match[1] == usual), found[0] if found else None)

    def stop_token(self) -> str | None:
        """The token that ends an answer, by a question and its answer; None when there is none."""
        layout = self.find([{"role": "user", "content": ""}, {"role": "assistant", "content": ""}])
        found = self._match_stop(layout.literals[-1])
        return found[1] if found else None


def stop_candidates(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Added and special tokens that can end an answer, by id: all but those that begin a text or stand for no text."""
    tokens = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    tokens |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    unfit = {tokenizer.bos_token_id, tokenizer.unk_token_id} - {tokenizer.eos_token_id}
    return {i: token for i, token in tokens.items() if i not in unfit}


def texts_of(message: Message) -> dict[Place, str]:
    """The texts that a template may write of a message, by their place: never none, and empty ones only where all are.

    An empty text is left to the template as it is, which may write it, or what belongs to it, only if it is not empty.
    """
    texts = {place: text for place, text in _leaves(message) if place[0] != "role" and place[-1] != "type"}
    return {place: text for place, text in texts.items() if text} or texts


def _leaves(value: Any, place: Place = ()) -> Iterator[tuple[Place, str]]:
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for key in sorted(value):
            yield from _leaves(value[key], (*place, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, (*place, index))


def _mark_texts(index: int, message: Message) -> Message:
    """`message` with marks for texts: characters that a filter such as `upper` or `trim` leaves alone."""
    marks = {place: f"{_OPEN}{index}.{number}{_CLOSE}" for number, place in enumerate(texts_of(message))}
    return {key: _replace(value, (key,), marks) for key, value in message.items() if key != "train"}


def _replace(value: Any, place: Place, marks: dict[Place, str]) -> Any:
    if isinstance(value, dict):
        return {key: _replace(item, (*place, key), marks) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace(item, (*place, index), marks) for index, item in enumerate(value)]
    return marks.get(place, value)
