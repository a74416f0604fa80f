"""Masks: what is trained is the answers and their stop tokens, whatever messages, tokenizer or template bring.

The reference is made without rendering or offsets: where special tokens stand around every message, a conversation's
tokens are those of its messages one after the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chats import CORPUS, chat, data_config, kept, label_one, make_tokenizer, template_of, trained_text
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from trainer.data import layout, masking
from trainer.data.masking import (
    Dropped,
    build_labels,
    load_template,
    reference_answer,
    render_prompt,
    stop_token_ids,
    template_text,
)
from trainer.data.templates import BUILT_IN
from trainer.data.types import IGNORE_INDEX, Example
from trainer.errors import UserError

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = none %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% set content = message['content'] %}"
    "{% if loop.first and system is not none %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + content %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start|>' + message.role + '<|stop|>\\n\\n' + message.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\\n\\n' }}{% endif %}"
)
SPACED = (  # the prompt ends in a space, which sentencepiece joins to the answer's first word
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}{{ 'A: ' + message.content }}"
    "{{ eos_token }}{% else %}{{ 'Q: ' + message.content + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizers_by_kind() -> dict[str, PreTrainedTokenizerFast]:
    return {kind: make_tokenizer(kind) for kind in ("metaspace", "prepending", "byte_level")}


TEMPLATE_TEXT = [
    "<|assistant|>",
    "<|end|>",
    "<|begin|>",
    "<|user|>",
    "{{ bos_token }}",
    "{% endfor %}",
    "\ue0001.content\ue001",
]
contents = st.lists(st.one_of(st.text(max_size=12), st.sampled_from(TEMPLATE_TEXT)), max_size=4).map("".join)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Any roles in any order after a first question, any texts, some messages not to train."""
    messages = [{"role": "user", "content": draw(contents)}]
    for role in draw(st.lists(st.sampled_from(["user", "assistant", "assistant", "system"]), max_size=8)):
        message: dict[str, Any] = {"role": role, "content": draw(contents)}
        if draw(st.booleans()):
            message["train"] = draw(st.booleans())
        messages.append(message)
    return messages


@given(conversations(), st.sampled_from(["assistant", "last_assistant", "all"]))
@settings(max_examples=300, deadline=None)
def test_masks_of_generated_conversations(
    toy_tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], train_on: str
) -> None:
    template = load_template("tokenizer", toy_tokenizer)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    chosen = answers[-1:] if train_on == "last_assistant" else answers
    wanted = [i for i in chosen if messages[i].get("train", True)]
    ids, labels = [toy_tokenizer.bos_token_id], [IGNORE_INDEX]
    for i, message in enumerate(messages):
        head = [toy_tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>")]
        body = toy_tokenizer(message["content"], add_special_tokens=False).input_ids
        stop = [toy_tokenizer.eos_token_id]
        ids += head + body + stop
        if train_on == "all":
            silent = message.get("train") is False
            is_answer = message["role"] == "assistant"
            body_labels = [IGNORE_INDEX] * len(body) if silent else body
            labels += head + body_labels + ([IGNORE_INDEX] if silent and is_answer else stop)
        else:
            labels += [IGNORE_INDEX] * len(head)
            labels += body + stop if i in wanted else [IGNORE_INDEX] * (len(body) + 1)
    row = label_one(messages, template, toy_tokenizer, train_on=train_on)
    special = [str(token) for token in toy_tokenizer.added_tokens_decoder.values()]
    if any(token in message["content"] for message in messages for token in special):
        assert row == Dropped("rows", 0, masking.HOLDS_SPECIAL)
    elif train_on == "all" or (wanted and all(messages[i]["content"].strip() for i in wanted)):
        assert kept(row).ids == ids and kept(row).labels == labels
    else:
        assert isinstance(row, Dropped)


OF_FILES = {
    "llama2 of the hub": LLAMA2,
    "chatml without BOS": CHATML,
    "others' headers": LLAMA3,
    "spaced": SPACED,
    "marked": MARKED,
}
STOPS = {
    "llama2 of the hub": " </s>",
    "spaced": "</s>",
    "alpaca": "</s>",
    "llama2": " </s>",
    "llama3": "<|eot_id|>",
}


@pytest.mark.parametrize("kind", ["metaspace", "prepending", "byte_level"])
@pytest.mark.parametrize("name", [*OF_FILES, *BUILT_IN])
def test_answers_and_stop_tokens_are_trained_under_every_template(
    tokenizers_by_kind: dict[str, PreTrainedTokenizerFast], tmp_path: Path, kind: str, name: str
) -> None:
    tokenizer = tokenizers_by_kind[kind]
    template = template_of(OF_FILES[name], tokenizer, tmp_path) if name in OF_FILES else load_template(name, tokenizer)
    stop = STOPS.get(name, "<|im_end|>")
    messages = chat(
        "What is the bird?", "It is a kingfisher 🐦", "And 名前?", "blue, ß says the book", system="Be brief."
    )
    row = kept(label_one(messages, template, tokenizer))
    assert [text.strip() for text in trained_text(row, tokenizer)] == [
        f"It is a kingfisher 🐦{stop}",
        f"blue, ß says the book{stop}",
    ]
    last = kept(label_one(messages, template, tokenizer, train_on="last_assistant"))
    assert [text.strip() for text in trained_text(last, tokenizer)] == [f"blue, ß says the book{stop}"]
    prompt = render_prompt(Example("rows", 0, messages), template, tokenizer)
    first = next(i for i, label in enumerate(last.labels) if label != IGNORE_INDEX)
    assert prompt == last.ids[:first], "what is asked at inference is what the row has before its answer"
    assert tokenizer.convert_tokens_to_ids(stop.strip()) in stop_token_ids(template, tokenizer)
    assert tokenizer.eos_token_id in stop_token_ids(template, tokenizer)


def test_alpaca_is_the_published_text(tokenizers_by_kind: dict[str, PreTrainedTokenizerFast]) -> None:
    tokenizer = tokenizers_by_kind["metaspace"]
    template = load_template("alpaca", tokenizer)
    paired = {"role": "user", "content": "Add.\n\n1 2", "instruction": "Add.", "input": "1 2"}
    answer = {"role": "assistant", "content": "3"}
    assert template.render(tokenizer, [paired, answer]) == (
        "<s>Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
        "### Response:\n3</s>"
    )
    assert template.render(tokenizer, chat("Add 1 2."), add_generation_prompt=True) == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd 1 2.\n\n### Response:\n"
    )
    assert template.render(tokenizer, chat("a", "b", "c", system="S")) == (
        "<s>S\n\n### Instruction:\na\n\n### Response:\nb</s>\n\n### Instruction:\nc\n\n"
    )
    row = kept(label_one([paired, answer], template, tokenizer))
    assert trained_text(row, tokenizer) == ["3</s>"]
    refused = label_one([*chat("a"), {"role": "tool", "content": "t"}, answer], template, tokenizer)
    assert isinstance(refused, Dropped) and "tool" in refused.reason


PREAMBLE = "{{ bos_token }}{% for m in messages %}"
ENDING = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
HEAD = "{{ '<|im_start|>' + m.role + '\\n' }}"
FAULTS = {
    "trims answers": (PREAMBLE + HEAD + "{{ m.content | trim }}{{ eos_token }}" + ENDING, layout.ALTERED),
    "trims the last": (
        PREAMBLE + HEAD + "{{ m.content | trim if loop.last else m.content }}{{ eos_token }}" + ENDING,
        layout.ALTERED,
    ),
    "capitals": (PREAMBLE + HEAD + "{{ m.content | upper }}{{ eos_token }}" + ENDING, layout.ALTERED),
    "drops the stop token": (PREAMBLE + HEAD + "{{ m.content }}" + ENDING, layout.NO_STOP),
    "stops at the end only": (
        PREAMBLE + HEAD + "{{ m.content }}{% if m.role == 'user' or loop.last %}{{ eos_token }}{% endif %}" + ENDING,
        masking.NOT_PREFIX_STABLE,
    ),
    "begins where it should stop": (PREAMBLE + HEAD + "{{ m.content }}{{ bos_token }}" + ENDING, layout.NO_STOP),
    "reorders": (
        PREAMBLE.replace("messages", "messages | reverse") + HEAD + "{{ m.content }}{{ eos_token }}" + ENDING,
        layout.LEFT_OUT,
    ),
    "leaves out system messages": (
        PREAMBLE + "{% if m.role != 'system' %}" + HEAD + "{{ m.content }}{{ eos_token }}{% endif %}" + ENDING,
        layout.LEFT_OUT,
    ),
    "ignores add_generation_prompt": (
        PREAMBLE + HEAD + "{{ m.content }}{{ eos_token }}{% endfor %}",
        layout.NO_PROMPT_END,
    ),
    "another generation prompt": (
        PREAMBLE + HEAD + "{{ m.content }}{{ eos_token }}" + ENDING.replace("assistant", "model"),
        layout.NO_PROMPT_END,
    ),
    "counts the messages": (
        "{{ bos_token }}{{ messages | length }}{% for m in messages %}"
        + HEAD
        + "{{ m.content }}{{ eos_token }}"
        + ENDING,
        masking.NOT_PREFIX_STABLE,
    ),
    "two BOS": ("{{ bos_token }}" + PREAMBLE + HEAD + "{{ m.content }}{{ eos_token }}" + ENDING, masking.DOUBLE_BOS),
    "BOS now and then": (
        "{% if messages | length < 3 %}{{ bos_token }}{% endif %}{% for m in messages %}"
        + HEAD
        + "{{ m.content }}{{ eos_token }}"
        + ENDING,
        masking.NO_BOS,
    ),
    "marks without stop": (
        PREAMBLE
        + HEAD
        + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}"
        + "{% else %}{{ m.content + eos_token }}{% endif %}"
        + ENDING,
        masking.DISAGREE,
    ),
    "marks with the role": (
        PREAMBLE
        + "{% if m.role == 'assistant' %}"
        + "{% generation %}<|im_start|>assistant\n{{ m.content + eos_token }}{% endgeneration %}"
        + "{% else %}"
        + HEAD
        + "{{ m.content + eos_token }}{% endif %}"
        + ENDING,
        masking.DISAGREE,
    ),
    "marks every message": (
        PREAMBLE + HEAD + "{% generation %}{{ m.content + eos_token }}{% endgeneration %}" + ENDING,
        masking.DISAGREE,
    ),
    "raises": ("{{ raise_exception('not today') }}", f"{masking.REFUSED}: not today"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["metaspace", "byte_level"])
def test_faulty_templates_train_nothing(
    tokenizers_by_kind: dict[str, PreTrainedTokenizerFast], tmp_path: Path, kind: str, fault: str
) -> None:
    text, reason = FAULTS[fault]
    tokenizer = tokenizers_by_kind[kind]
    messages = chat("What is it? ", " a bird \n", "And this? ", "a book ", system=" Be brief. ")
    row = label_one(messages, template_of(text, tokenizer, tmp_path), tokenizer)
    assert row == Dropped("rows", 0, reason)


@pytest.mark.parametrize("shift", [-1, 1])
@pytest.mark.parametrize("derivation", ["chars", "tokens"])
def test_a_derivation_off_by_one_is_caught(
    tokenizers_by_kind: dict[str, PreTrainedTokenizerFast],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    derivation: str,
    shift: int,
) -> None:
    tokenizer = tokenizers_by_kind["metaspace"]
    template = template_of(CHATML, tokenizer, tmp_path)
    kept(label_one(chat("What is it?", "a bird"), template, tokenizer))
    if derivation == "chars":
        right = masking._tokens_of
        monkeypatch.setattr(masking, "_tokens_of", lambda *a: tuple(edge + shift for edge in right(*a)))
    else:
        found = masking._Labeller._spans_by_prefix
        shifted = lambda *a: [(start + shift, end + shift) for start, end in found(*a)]  # noqa: E731
        monkeypatch.setattr(masking._Labeller, "_spans_by_prefix", shifted)
    row = label_one(chat("What is it?", "a bird"), template, tokenizer)
    assert row == Dropped("rows", 0, masking.DISAGREE)


def test_a_token_that_holds_prompt_and_answer_is_not_trained(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("metaspace", corpus=[*CORPUS, *["A:xyz"] * 50])
    text = SPACED.replace("'A: '", "'A:'")
    template = template_of(text, tokenizer, tmp_path)
    row = label_one(chat("What?", "xyz"), template, tokenizer)
    assert row == Dropped("rows", 0, masking.STRADDLES)
    assert trained_text(kept(label_one(chat("What?", "bird"), template, tokenizer)), tokenizer) == ["bird</s>"]


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("template_writes", [True, False])
def test_there_is_one_bos_at_most(tmp_path: Path, adds_bos: bool, template_writes: bool) -> None:
    tokenizer = make_tokenizer("metaspace", adds_bos=adds_bos)
    text = ("{{ bos_token }}" if template_writes else "") + CHATML
    template = template_of(text, tokenizer, tmp_path)
    row = kept(label_one(chat("What?", "bird"), template, tokenizer))
    expected = 1 if adds_bos or template_writes else 0
    assert row.ids.count(tokenizer.bos_token_id) == expected
    assert row.ids[:1] == [tokenizer.bos_token_id] or not expected
    served = tokenizer.apply_chat_template(
        chat("What?", "bird"), chat_template=template_text(template), return_dict=True
    )["input_ids"]
    assert list(served) == row.ids, "the exported template renders what was trained"


def test_the_tokenizers_own_template_is_exported_as_it_is(toy_tokenizer: PreTrainedTokenizerFast) -> None:
    assert template_text(load_template("tokenizer", toy_tokenizer)) is None
    exported = template_text(load_template("alpaca", toy_tokenizer))
    assert exported is not None and "### Instruction" in exported


@pytest.mark.parametrize("text", ["Once", "<s>Once", "<s>[INST] q [/INST] a</s>", "Once</s>"])
def test_plain_text_has_bos_and_eos_once(tokenizers_by_kind: dict[str, PreTrainedTokenizerFast], text: str) -> None:
    tokenizer = tokenizers_by_kind["metaspace"]
    template = load_template("tokenizer", tokenizer)
    example = Example("rows", 0, [{"role": "text", "content": text}])
    row = kept(build_labels([example], template, tokenizer, data_config(train_on="all"))[0])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert row.ids[0] == bos and row.ids.count(bos) == 1 and row.ids[-1] == eos and row.ids.count(eos) == 1
    assert row.labels == [IGNORE_INDEX, *row.ids[1:]]
    prompt = render_prompt(example, template, tokenizer)
    assert row.ids[: len(prompt)] == prompt and prompt.count(bos) == 1


def test_pad_that_is_eos_masks_no_stop_token(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("metaspace")
    tokenizer.pad_token = tokenizer.eos_token
    row = kept(label_one(chat("a", "b", "c", "d"), template_of(SPACED, tokenizer, tmp_path), tokenizer))
    stops = [i for i, token in enumerate(row.ids) if token == tokenizer.eos_token_id]
    assert len(stops) == 2 and all(row.labels[i] == tokenizer.eos_token_id for i in stops)


@pytest.mark.parametrize("cut", range(-3, 4))
def test_long_rows_are_cut_only_while_the_answer_starts(toy_tokenizer: PreTrainedTokenizerFast, cut: int) -> None:
    template = load_template("tokenizer", toy_tokenizer)
    messages = chat("Write a b c d backwards.", "d c b a and much more")
    whole = kept(label_one(messages, template, toy_tokenizer))
    start = next(i for i, label in enumerate(whole.labels) if label != IGNORE_INDEX)
    row = label_one(messages, template, toy_tokenizer, pack_length=start + cut)
    if cut > 0:
        assert kept(row).ids == whole.ids[: start + cut] and kept(row).labels == whole.labels[: start + cut]
        assert kept(row).truncated and sum(label != IGNORE_INDEX for label in kept(row).labels) == cut
    else:
        assert row == Dropped("rows", 0, masking.ANSWER_TOO_FAR)
    dropped = label_one(messages, template, toy_tokenizer, pack_length=start + cut, long_rows="drop")
    assert dropped == Dropped("rows", 0, masking.TOO_LONG)
    fits = label_one(messages, template, toy_tokenizer, pack_length=len(whole.ids), long_rows="drop")
    assert kept(fits) == whole and not whole.truncated


def test_rows_without_anything_to_train(toy_tokenizer: PreTrainedTokenizerFast) -> None:
    template = load_template("tokenizer", toy_tokenizer)
    silent = [*chat("a"), {"role": "assistant", "content": "b", "train": False}]
    assert label_one(chat("only asked"), template, toy_tokenizer) == Dropped("rows", 0, masking.NOTHING_TRAINED)
    assert label_one(silent, template, toy_tokenizer) == Dropped("rows", 0, masking.NOTHING_TRAINED)
    assert label_one(chat("a", "b", "c", " "), template, toy_tokenizer, train_on="last_assistant") == Dropped(
        "rows", 0, masking.EMPTY_ANSWER
    )
    greeting = [{"role": "assistant", "content": "Hello"}, *chat("a", "b")]
    assert label_one(greeting, template, toy_tokenizer) == Dropped("rows", 0, layout.STARTS_WITH_ANSWER)


def test_a_tokenizer_without_template_is_told_about_alpaca() -> None:
    tokenizer = make_tokenizer("metaspace")
    with pytest.raises(UserError, match="template: alpaca"):
        label_one(chat("a", "b"), load_template("tokenizer", tokenizer), tokenizer)


@pytest.mark.parametrize(
    ("name", "message"), [("llama9", "no template"), ("gone.jinja", "cannot read"), ("broken.jinja", "line 2")]
)
def test_templates_that_cannot_be_had(
    toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jinja").write_text("{{ bos_token }}\n{% for %}")
    with pytest.raises(UserError, match=message) as caught:
        load_template(name, toy_tokenizer)
    assert caught.value.where == "data.template"


def test_templates_run_in_the_sandbox(toy_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    template = template_of("{{ ''.__class__.__mro__[1].__subclasses__() }}", toy_tokenizer, tmp_path)
    row = label_one(chat("a", "b"), template, toy_tokenizer)
    assert isinstance(row, Dropped) and "unsafe" in row.reason


def test_reference_answer_is_the_last() -> None:
    assert reference_answer(Example("rows", 0, chat("a", "b", "c", "d", "e"))) == "d"
    with pytest.raises(UserError, match="row 3"):
        reference_answer(Example("rows", 3, chat("a")))
