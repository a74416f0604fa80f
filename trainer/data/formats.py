"""Formats: how a source's row becomes the messages of an `Example`.

- ``alpaca``: instruction, input (or context), output (or response). The user asks the instruction, a blank line and the
  input; the assistant answers the output.
- ``messages``: messages, a list of ``{role, content}`` as OpenAI has them, with tool_calls and reasoning_content where
  the template writes them; a message may say ``"train": false``. tools, if there, are the functions to call.
- ``sharegpt``: conversations, a list of ``{from, value}``; system and tools may stand in columns of their own.
- ``prompt_completion``: prompt, completion. The user asks the prompt, the assistant answers the completion.
- ``input_output``: the same under the names input and output.
- ``text``: text, as it is, without template; for pre-training.
- ``templated``: text that a template was applied to already, such as ``<s>[INST] ... [/INST] ... </s>``. With
  ``train_on: all`` it is trained as it is; else `templated.py` finds the messages in it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.config import Source
from trainer.data.types import Example
from trainer.errors import UserError

TEXT_ROLE = "text"
COLUMN = re.compile(r"\{([^{}]+)\}")
TOOL_CALLS = "tool_calls"
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
NO_QUESTION = "the question is empty"
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
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


def find_columns(source: Source, columns: list[str], where: str) -> dict[str, tuple[str, ...]]:
    """Which columns each field of the format is read from, the first that a row has, or the text of several:
    ``"{schema}\n\n{question}"``.

    Raises:
        UserError: a mapping names no field of the format or no column, or a required field has no column.
    """
    fields = FORMATS[source.format].fields
    found: dict[str, tuple[str, ...]] = {}
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
        present = tuple(column for column in wanted if column in columns or _names_columns(column, columns))
        if present:
            found[name] = present
        elif field.required or name in source.columns:
            raise UserError(
                f"{where}.columns",
                f"{source.path} has no column {' or '.join(map(repr, wanted))} for {source.format}'s field {name!r}",
                f"its columns: {', '.join(columns)}",
                f"name the column with `columns: {{{name}: ...}}`, or correct the format",
            )
    return found


def _names_columns(text: str, columns: list[str]) -> bool:
    names = COLUMN.findall(text)
    return bool(names) and set(names) <= set(columns)


def read_example(row: Mapping[str, Any], index: int, source: Source, columns: Mapping[str, tuple[str, ...]]) -> Example:
    """The `Example` of a row.

    Args:
        columns: of `find_columns`.

    Raises:
        BadRow: a field is missing or is not what the format wants.
    """
    values = {name: [_value(row, column) for column in wanted] for name, wanted in columns.items()}
    fields = {name: next((value for value in found if not _is_absent(value)), None) for name, found in values.items()}
    messages, tools = FORMATS[source.format].to_messages(fields), _tools(fields.get("tools"))
    check_characters([messages, tools])
    return Example(source.path, index, messages, tools)


def _value(row: Mapping[str, Any], column: str) -> Any:
    """What a field is read from: the column, or the columns that its text names, empty where they are."""
    names = COLUMN.findall(column)
    if column in row or not names:
        return row.get(column)
    texts = {name: _optional_text(row, name) for name in names}
    text = COLUMN.sub(lambda match: texts[match[1]], column)
    # What is left around a column that is empty is the recipe's; what a column begins or ends with is its own.
    text = text if texts[names[0]] else text.lstrip()
    return text if texts[names[-1]] else text.rstrip()


def _alpaca(fields: dict[str, Any]) -> list[Message]:
    instruction, context = _text(fields, "instruction"), _optional_text(fields, "input")
    if not (instruction + context).strip():
        raise BadRow(NO_QUESTION)
    user = {"role": "user", "content": instruction}
    if context.strip():  # the alpaca template shows instruction and input apart
        user = {"role": "user", "content": f"{instruction}\n\n{context}", "instruction": instruction, "input": context}
    return [user, {"role": "assistant", "content": _text(fields, "output")}]


def _question_and_answer(question: str, answer: str) -> Callable[[dict[str, Any]], list[Message]]:
    """What makes messages of two fields, by their names."""

    def to_messages(fields: dict[str, Any]) -> list[Message]:
        asked = _text(fields, question)
        if not asked.strip():
            raise BadRow(NO_QUESTION)
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": _text(fields, answer)}]

    return to_messages


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
    if message["role"] not in ROLES:
        raise BadRow(f"a message's role is none of {', '.join(ROLES)}")
    # Arrow fills absent keys with null; what the alpaca template reads is its own format's.
    kept = {key: value for key, value in message.items() if value is not None and key not in ("instruction", "input")}
    if (weight := kept.pop("weight", 1)) not in (0, 1):
        raise BadRow("a message's weight is neither 0 nor 1")
    if not isinstance(kept.get("train", True), bool):
        raise BadRow("a message's train is neither true nor false")
    if not weight:
        kept["train"] = False  # as OpenAI says it
    if not isinstance(kept.get("reasoning_content", ""), str):
        raise BadRow("a message's reasoning_content is not text")
    if not kept.get(TOOL_CALLS):
        kept.pop(TOOL_CALLS, None)
        return {**kept, "content": _content(message.get("content"))}
    # OpenAI has null where an assistant only calls.
    content = _content(message.get("content") or "")
    return {**kept, "content": content, TOOL_CALLS: [_tool_call(call) for call in _list(kept[TOOL_CALLS], TOOL_CALLS)]}


def _tool_call(call: Any) -> dict[str, Any]:
    """A call with its arguments as a dict, which templates want; OpenAI has them as JSON text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow("a tool call has no function with a name")
    arguments = _parsed(function.get("arguments") or {}, "a tool call's arguments")
    if not isinstance(arguments, dict):
        raise BadRow("a tool call's arguments are no object")
    kept = {key: value for key, value in call.items() if value is not None}
    return {**kept, "function": {"name": function["name"], "arguments": arguments}}


def _tools(tools: Any) -> list[dict[str, Any]]:
    """Functions as JSON schemas, from a list or its JSON text."""
    if _is_absent(tools) or tools in ("", []):
        return []
    found = _list(_parsed(tools, "tools"), "tools")
    if not all(isinstance(tool, dict) for tool in found):
        raise BadRow("tools is not a list of functions")
    return found


def _parsed(value: Any, name: str) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{name} is not JSON") from error


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise BadRow(f"{name} is not a list")
    return value


def _sharegpt(fields: dict[str, Any]) -> list[Message]:
    turns = fields.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise BadRow("conversations is not a list of turns")
    system = _optional_text(fields, "system")
    beginning = [{"role": "system", "content": system}] if system else []
    return beginning + [_turn(turn) for turn in turns]


def _turn(turn: Any) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get("from"), str):
        raise BadRow("a turn does not say who it is from")
    if turn["from"] not in SPEAKERS:
        raise BadRow(f"a turn is from none of {', '.join(SPEAKERS)}")
    told = {name: turn[name] for name in ("train", "weight") if name in turn}
    return _message({"role": SPEAKERS[turn["from"]], "content": turn.get("value"), **told})


def _content(content: Any) -> str:
    """Text, also of OpenAI's list of text parts."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        parts = [part.get("text") for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else None
    if not isinstance(content, str):
        raise BadRow("a message's content is not text")
    return content


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if not isinstance(value, str):
        raise BadRow(f"{name} is not text")
    return value


def _optional_text(fields: Mapping[str, Any], name: str) -> str:
    return "" if _is_absent(fields.get(name)) else _text(fields, name)


def _is_absent(value: Any) -> bool:
    """pandas writes NaN where a cell is empty."""
    return value is None or value != value


def check_characters(values: Any) -> None:
    """Refuses text with half a character: JSON can escape half a surrogate pair, and no tokenizer takes it."""
    try:
        json.dumps(values, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise BadRow("it holds half a character (a lone surrogate)") from error
    except RecursionError as error:
        raise BadRow("it nests too deep") from error


TOOLS = Field(("tools",), required=False)
FORMATS = {
    "alpaca": Format(
        {
            "instruction": Field(("instruction",)),
            "input": Field(("input", "context"), required=False),
            "output": Field(("output", "response")),
        },
        _alpaca,
    ),
    "messages": Format({"messages": Field(("messages",)), "tools": TOOLS}, _messages),
    "sharegpt": Format(
        {
            "conversations": Field(("conversations", "conversation")),
            "system": Field(("system",), required=False),
            "tools": TOOLS,
        },
        _sharegpt,
    ),
    "prompt_completion": Format(
        {"prompt": Field(("prompt",)), "completion": Field(("completion",))},
        _question_and_answer("prompt", "completion"),
    ),
    "input_output": Format(
        {"input": Field(("input",)), "output": Field(("output",))}, _question_and_answer("input", "output")
    ),
    "text": Format({"text": Field(("text",))}, _plain_text),
    "templated": Format({"text": Field(("text",))}, _plain_text),
}
