"""Where messages lie in rendered text, by characters.

The template is rendered once with a mark in place of every text of the messages. What stands between the marks is the
template's own (literals); a row's rendered text must be those literals with the row's texts between them. That finds
each message's characters without searching, so text that looks like the template, or occurs twice, misleads nobody; and
a template that drops, alters or reorders messages is seen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.data.templates import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Span = tuple[int, int]

ALTERED = "the template alters a message's text"
LEFT_OUT = "the template leaves out or reorders messages"
NO_STOP = "the template writes no stop token after an answer"
NO_PROMPT_END = "the template's generation prompt is not what precedes the answer"
STARTS_WITH_ANSWER = "the conversation starts with the answer"
_OPEN, _CLOSE = "\ue000", "\ue001"  # private use: no template looks for them
_MARK = re.compile(f"{_OPEN}(\\d+)\\.(\\d+){_CLOSE}")


class Rejected(Exception):
    """A row that must not be trained on; its text is the reason it is counted under."""


@dataclass(frozen=True)
class Layout:
    """A template around conversations of one shape.

    Attributes:
        literals: the template's text before, between and after the slots, ``[slots + 1]``.
        slots: ``(message index, field)`` of the text that goes there, in the order of the text.
    """

    literals: tuple[str, ...]
    slots: tuple[tuple[int, str], ...]


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
            numbers = zip(map(int, pieces[1::3]), map(int, pieces[2::3]), strict=True)
            slots = tuple((i, _text_fields(messages[i])[field]) for i, field in numbers)
            order = [i for i, _ in slots]
            if order != sorted(order) or set(order) != set(range(len(messages))):
                raise Rejected(LEFT_OUT)
            self._known[key] = Layout(tuple(pieces[::3]), slots)
        return self._known[key]

    def text_spans(self, messages: Sequence[Message], text: str) -> list[Span]:
        """Characters of `text`, the rendered `messages`, that each message's own texts take up.

        Raises:
            Rejected: `text` is not the layout with the messages' texts. A template may trim the texts it asks with,
                as Llama-2's does; of an answer every character counts.
        """
        layout = self.find(messages)
        spans: dict[int, Span] = {}
        position = len(layout.literals[0])
        if not text.startswith(layout.literals[0]):
            raise Rejected(ALTERED)
        for (i, field), after in zip(layout.slots, layout.literals[1:], strict=True):
            value = messages[i][field]
            variants = [value] if messages[i]["role"] == "assistant" else [value, value.strip()]
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
        before, after = layout.literals[mine[0]], layout.literals[mine[-1] + 1]
        prompt_end = self.find(messages[:index], add_generation_prompt=True).literals[-1]
        lead = before[len(prompt_end) :]
        if not before.startswith(prompt_end) or lead.strip():
            raise Rejected(NO_PROMPT_END)
        stop = self._stop.match(after) if self._stop else None
        if stop is None:
            raise Rejected(NO_STOP)
        return spans[index][0] - len(lead), spans[index][1] + stop.end()

    def stop_token(self) -> str | None:
        """The token that ends an answer, by a question and its answer; None when there is none."""
        layout = self.find([{"role": "user", "content": ""}, {"role": "assistant", "content": ""}])
        found = self._stop.match(layout.literals[-1]) if self._stop else None
        return found[1] if found else None


def stop_candidates(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Added and special tokens that can end an answer, by id: all but those that begin a text or stand for no text."""
    tokens = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    tokens |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    unfit = {tokenizer.bos_token_id, tokenizer.unk_token_id} - {tokenizer.eos_token_id}
    return {i: token for i, token in tokens.items() if i not in unfit}


def _text_fields(message: Message) -> list[str]:
    return sorted(key for key, value in message.items() if isinstance(value, str) and key != "role")


def _mark_texts(index: int, message: Message) -> Message:
    """`message` with marks for texts: characters that a filter such as `upper` or `trim` leaves alone."""
    marks = {field: f"{_OPEN}{index}.{number}{_CLOSE}" for number, field in enumerate(_text_fields(message))}
    return {key: marks.get(key, value) for key, value in message.items() if key != "train"}
