"""Formats: rows of every shape become messages; a column that is not there is named with those that are."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.config import Source
from trainer.data.formats import BadRow, find_columns, read_example
from trainer.errors import UserError


def read(format: str, row: dict[str, Any], **columns: str) -> list[dict[str, Any]]:
    source = Source.model_validate({"path": "rows.jsonl", "format": format, "columns": columns})
    example = read_example(row, 7, source, find_columns(source, list(row), "data.train[0]"))
    assert (example.source, example.row) == ("rows.jsonl", 7)
    return example.messages


def asked(question: str, answer: str, **extra: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question, **extra}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("names", [("input", "output"), ("context", "response")])
def test_alpaca(names: tuple[str, str]) -> None:
    context, answer = names
    messages = read("alpaca", {"instruction": "Add.", context: "1 2", answer: "3"})
    assert messages == asked("Add.\n\n1 2", "3", instruction="Add.", input="1 2")
    assert read("alpaca", {"instruction": "Add.", context: "  ", answer: "3"}) == asked("Add.", "3")
    assert read("alpaca", {"instruction": "Add.", context: None, answer: "3"}) == asked("Add.", "3")
    assert read("alpaca", {"instruction": "Add.", answer: "3"}) == asked("Add.", "3")


def test_columns_are_mapped() -> None:
    row = {"q": "Add.", "given": "1 2", "input": "decoy", "a": "3"}
    assert read("alpaca", row, instruction="q", input="given", output="a") == asked(
        "Add.\n\n1 2", "3", instruction="Add.", input="1 2"
    )


def test_a_field_may_be_the_text_of_several_columns() -> None:
    mapped = {"input": "{schema}\n\n{question}\n{evidence}", "output": "SQL"}
    source = Source.model_validate({"path": "rows", "format": "input_output", "columns": mapped})
    row = {"schema": "CREATE TABLE {a}", "question": "How many?", "evidence": None, "SQL": "SELECT 1"}
    example = read_example(row, 0, source, find_columns(source, list(row), "w"))
    assert [message["content"] for message in example.messages] == ["CREATE TABLE {a}\n\nHow many?", "SELECT 1"]
    with pytest.raises(UserError, match="no column") as caught:
        find_columns(source, ["schema", "question", "SQL"], "w")
    assert "its columns" not in caught.value.found and "schema, question, SQL" in str(caught.value)


def test_what_a_column_begins_with_stays_and_what_surrounds_an_empty_one_goes() -> None:
    mapped = {"input": "{instruction}\n\n{input}", "output": "{code}"}
    row = {"instruction": "Write it.", "input": "", "code": "    return 1\n"}
    assert read("input_output", row, **mapped) == asked("Write it.", "    return 1\n")


def test_each_row_is_read_from_the_name_that_it_has() -> None:
    source = Source(path="rows", format="alpaca")
    columns = find_columns(source, ["instruction", "input", "context", "output"], "w")
    rows = [{"instruction": "i", "input": "a", "context": None, "output": "o"}, {"instruction": "i", "context": "b"}]
    first, second = (read_example({"output": "o", **row}, 0, source, columns).messages[0] for row in rows)
    assert (first["input"], second["input"]) == ("a", "b")


def test_openai_weights_silence_a_message() -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad", "weight": 0}]}
    assert read("messages", row)[1] == {"role": "assistant", "content": "bad", "train": False}
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "good", "weight": 1}]
    assert read("sharegpt", {"conversations": turns})[1] == {"role": "assistant", "content": "good"}


def test_other_formats_keys_are_not_the_alpaca_templates() -> None:
    row = {"messages": [{"role": "user", "content": "q", "instruction": "i", "input": "x"}]}
    assert read("messages", row) == [{"role": "user", "content": "q"}]


def test_prompt_completion_and_text() -> None:
    assert read("prompt_completion", {"prompt": "Add 1 2.", "completion": 3}) == asked("Add 1 2.", "3")
    assert read("text", {"body": "<s>Once"}, text="body") == [{"role": "text", "content": "<s>Once"}]


def test_messages_keep_what_templates_read() -> None:
    row = {
        "messages": [
            {"role": "system", "content": "Be brief.", "train": None, "name": None},
            {"role": "user", "content": [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]},
            {"role": "assistant", "content": "Hi", "train": False, "reasoning_content": "greet"},
        ]
    }
    assert read("messages", row) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi", "train": False, "reasoning_content": "greet"},
    ]


@pytest.mark.parametrize(
    ("format", "columns", "wanted"),
    [
        ("alpaca", {}, "'output' or 'response'"),
        ("alpaca", {"output": "reply"}, "'reply'"),
        ("alpaca", {"output": "answer", "input": "contxt"}, "'contxt'"),
        ("messages", {}, "'messages'"),
        ("prompt_completion", {}, "'prompt'"),
        ("text", {}, "'text'"),
    ],
)
def test_a_missing_column_is_named_with_source_and_columns(format: str, columns: dict[str, str], wanted: str) -> None:
    source = Source.model_validate({"path": "rows.jsonl", "format": format, "columns": columns})
    with pytest.raises(UserError) as caught:
        find_columns(source, ["instruction", "answer"], "data.train[3]")
    assert caught.value.where == "data.train[3].columns" and caught.value.exit_status == 2
    assert f"rows.jsonl has no column {wanted}" in caught.value.found
    assert "instruction, answer" in caught.value.allowed and "columns: {" in caught.value.fix


def test_a_mapping_of_no_field_is_refused() -> None:
    source = Source.model_validate({"path": "rows.jsonl", "format": "alpaca", "columns": {"question": "q"}})
    with pytest.raises(UserError, match="'question' is no field of alpaca") as caught:
        find_columns(source, ["q"], "data.train[0]")
    assert "instruction, input, output" in caught.value.allowed


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("alpaca", {"instruction": "a", "output": None}),
        ("alpaca", {"instruction": ["a"], "output": "b"}),
        ("prompt_completion", {"prompt": "a", "completion": True}),
        ("text", {"text": {"a": 1}}),
        ("messages", {"messages": []}),
        ("messages", {"messages": "hello"}),
        ("messages", {"messages": [{"content": "a"}]}),
        ("messages", {"messages": [{"role": "user", "content": 1}]}),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        ("messages", {"messages": [{"role": "user", "content": "a", "train": "no"}]}),
        ("messages", {"messages": [{"role": "text", "content": "a"}]}),
        ("messages", {"messages": ["hello"]}),
        ("messages", {"messages": [{"role": "Assistant", "content": "a"}]}),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}),
        ("messages", {"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}),
        ("messages", {"messages": [{"role": "assistant", "content": "a", "reasoning_content": 5}]}),
        ("messages", {"messages": [{"role": "assistant", "content": "a", "reasoning_content": "\ud83d"}]}),
        ("prompt_completion", {"prompt": "a", "completion": float("inf")}),
        ("prompt_completion", {"prompt": " ", "completion": "a"}),
        ("alpaca", {"instruction": "", "output": "a"}),
        ("sharegpt", {"conversations": [{"from": "Alice", "value": "a"}]}),
    ],
)
def test_rows_that_are_no_example_are_told_apart(format: str, row: dict[str, Any]) -> None:
    with pytest.raises(BadRow):
        read(format, row)
