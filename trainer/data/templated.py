"""Text that a template was applied to already, back to the messages in it.

The messages are found between the template's own texts, and count only if the template makes the same text of them
again: what a row is trained on is then as certain as if it had come as messages.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from trainer.data.formats import BadRow
from trainer.data.layout import Layout, Layouts, Message, Rejected, stop_candidates
from trainer.data.templates import Template
from trainer.data.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOT_OF_TEMPLATE = "the text is not what data.template writes"
TURN = ("user", "assistant")


class TemplateReader:
    """Finds messages in the texts of one template: turns of user and assistant, maybe after a system message."""

    def __init__(self, template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
        self._template, self._tokenizer = template, tokenizer
        self._layouts = Layouts(template, tokenizer)
        self._bos = str(tokenizer.bos_token or "")
        self._special = [token for token in {self._bos, *stop_candidates(tokenizer).values()} if token]

    def read(self, example: Example) -> Example:
        """`example`, whose one message is a whole text, with the messages in that text.

        Raises:
            BadRow: the template does not write this text.
        """
        text = example.messages[0]["content"]
        for beginning in (("system",), ()):
            with contextlib.suppress(Rejected, TemplateError):
                messages = self._split(text, beginning)
                if messages and self._writes(messages, text):
                    return replace(example, messages=messages)
        raise BadRow(NOT_OF_TEMPLATE)

    def _writes(self, messages: Sequence[Message], text: str) -> bool:
        """Whether the template makes `text` of `messages`, in which no token stands that ends an answer."""
        if any(token in message["content"] for message in messages for token in self._special):
            return False
        return self._bare(self._template.render(self._tokenizer, messages)) == self._bare(text)

    def _split(self, text: str, beginning: tuple[str, ...]) -> list[Message]:
        """The messages of `text`, none where it is no conversation that begins so."""
        between = self._layout([*beginning, *TURN]).literals[-2].strip()  # question and answer
        roles = [*beginning, *TURN * max(1, text.count(between) if between else 1)]
        layout = self._layout(roles)
        # A message that holds the template's own text could be taken for several.
        own = "-".join(layout.literals[:-1])
        pieces = {piece.strip() for piece in layout.literals[1:-1]} - {""}
        if any(text.count(piece) != own.count(piece) for piece in pieces):
            return []
        start = layout.literals[0].lstrip().removeprefix(self._bos).lstrip()
        return _between(self._bare(text), [start, *layout.literals[1:-1]], roles)

    def _layout(self, roles: Sequence[str]) -> Layout:
        return self._layouts.find([{"role": role, "content": "-"} for role in roles])

    def _bare(self, text: str) -> str:
        """Without what an author may have left out or put twice: space around it, BOS, and the last stop token."""
        text = text.strip().removeprefix(self._bos).strip()
        stop = self._layouts.stop_token()
        return text.removesuffix(stop).strip() if stop else text


def _between(text: str, literals: Sequence[str], roles: Sequence[str]) -> list[Message]:
    """What stands after each of `literals`, up to the next; none where they are not there in this order."""
    if not text.startswith(literals[0]):
        return []
    position, messages = len(literals[0]), []
    for role, after in zip(roles, [*literals[1:], None], strict=True):
        end = len(text) if after is None else text.find(after, position)
        if end < 0:
            return []
        messages.append({"role": role, "content": text[position:end]})
        position = end + len(after or "")
    return messages
