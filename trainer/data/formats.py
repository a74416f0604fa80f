"""Formats: how a source's row becomes the messages of an `Example`.

- ``alpaca``: instruction, input (or context), output (or response). The user asks the instruction, a blank line and the
  input; the assistant answers the output.
- ``messages``: messages, a list of ``{role, content}`` as OpenAI has them; a message may say ``"train": false``.
- ``prompt_completion``: prompt, completion. The user asks the prompt, the assistant answers the completion.
- ``text``: text, as it is, without template; for pre-training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.config import Source
from trainer.data.types import Example
from trainer.errors import UserError

TEXT_ROLE = "text"
Message = dict[str, Any]


class BadRow(ValueError):
    """A row that cannot be read; its text is the reason it is counted under."""


@dataclass(frozen=True)
class Field:
    """A field of a format.

    Attributes:
        names: columns it is looked for in when the recipe maps none, best first.
    """

    names: tuple[str, ...]
    required: bool = True


@dataclass(frozen=True)
class Format:
    """Fields by name, and how their values make messages."""

    fields: dict[str, Field]
    to_messages: Callable[[dict[str, Any]], list[Message]]


def find_columns(source: Source, columns: list[str], where: str) -> dict[str, str]:
    """Which column each field of the format is read from.

    Raises:
        UserError: a mapping names no field of the format or no column, or a required field has no column.
    """
    fields = FORMATS[source.format].fields
    found: dict[str, str] = {}
    for name in source.columns:
        if name not in fields:
            raise UserError(
                f"{where}.columns",
                f"{name!r} is no field of {source.format}",
                ", ".join(fields),
                "map a field to a column",
            )
    for name, field in fields.items():
        wanted = (source.columns[name],) if name in source.columns else field.names
        present = [column for column in wanted if column in columns]
        if present:
            found[name] = present[0]
        elif field.required or name in source.columns:
            raise UserError(
                f"{where}.columns",
                f"{source.path} has no column {' or '.join(map(repr, wanted))} for {source.format}'s field {name!r}",
                f"its columns: {', '.join(columns)}",
                f"name the column with `columns: {{{name}: ...}}`, or correct the format",
            )
    return found


def read_example(row: Mapping[str, Any], index: int, source: Source, columns: Mapping[str, str]) -> Example:
    """The `Example` of a row.

    Args:
        columns: of `find_columns`.

    Raises:
        BadRow: a field is missing or is not what the format wants.
    """
    fields = {name: row.get(column) for name, column in columns.items()}
    return Example(source.path, index, FORMATS[source.format].to_messages(fields))


def _alpaca(fields: dict[str, Any]) -> list[Message]:
    instruction, context = _text(fields, "instruction"), _optional_text(fields, "input")
    user = {"role": "user", "content": instruction}
    if context.strip():  # the alpaca template shows instruction and input apart
        user = {"role": "user", "content": f"{instruction}\n\n{context}", "instruction": instruction, "input": context}
    return [user, {"role": "assistant", "content": _text(fields, "output")}]


def _prompt_completion(fields: dict[str, Any]) -> list[Message]:
    return [
        {"role": "user", "content": _text(fields, "prompt")},
        {"role": "assistant", "content": _text(fields, "completion")},
    ]


def _plain_text(fields: dict[str, Any]) -> list[Message]:
    text = _text(fields, "text")
    if not text.strip():
        raise BadRow("text is empty")
    return [{"role": TEXT_ROLE, "content": text}]


def _messages(fields: dict[str, Any]) -> list[Message]:
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRow("messages is not a list of messages")
    return [_message(message) for message in messages]


def _message(message: Any) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadRow("a message has no role")
    if message["role"] == TEXT_ROLE:
        raise BadRow(f"a message has the role {TEXT_ROLE!r}")
    if not isinstance(message.get("train", True), bool | None):
        raise BadRow("a message's train is neither true nor false")
    kept = {key: value for key, value in message.items() if value is not None}  # Arrow fills absent keys with null
    return {**kept, "content": _content(message.get("content"))}


def _content(content: Any) -> str:
    """Text, also of OpenAI's list of text parts."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise BadRow("a message's content is not text")
    return _whole(content, "a message's content")


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool) and not _is_absent(value):
        return str(value)
    if not isinstance(value, str):
        raise BadRow(f"{name} is not text")
    return _whole(value, name)


def _optional_text(fields: dict[str, Any], name: str) -> str:
    return "" if _is_absent(fields.get(name)) else _text(fields, name)


def _is_absent(value: Any) -> bool:
    """pandas writes NaN where a cell is empty."""
    return value is None or value != value


def _whole(text: str, name: str) -> str:
    """`text`, if no character was cut in two: JSON can escape half a surrogate pair, which no tokenizer takes."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise BadRow(f"{name} holds half a character (a lone surrogate)")
    return text


FORMATS = {
    "alpaca": Format(
        {
            "instruction": Field(("instruction",)),
            "input": Field(("input", "context"), required=False),
            "output": Field(("output", "response")),
        },
        _alpaca,
    ),
    "messages": Format({"messages": Field(("messages",))}, _messages),
    "prompt_completion": Format(
        {"prompt": Field(("prompt",)), "completion": Field(("completion",))}, _prompt_completion
    ),
    "text": Format({"text": Field(("text",))}, _plain_text),
}
