"""Tiny tokenizers of every family, and conversations to render and mask with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from trainer.config import DataConfig
from trainer.data.masking import Dropped, build_labels, load_template
from trainer.data.templates import Template
from trainer.data.types import IGNORE_INDEX, Example, TokenizedRow

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|stop|>"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]  # Llama-3's
CORPUS = [
    "Question and answer. What is the name of the blue bird? It is a kingfisher, says the book.",
    "assistant user system Below is an instruction that describes a task.\n\n### Response:\nyes",
] * 20


def make_tokenizer(kind: str, corpus: list[str] = CORPUS, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """A tiny tokenizer of a family: Llama-2's (metaspace), its older form, Llama-3's (byte level, trimmed offsets)."""
    byte_level = kind == "byte_level"
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=not byte_level, fuse_unk=not byte_level))
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else []
    fallback = [] if byte_level else [f"<0x{i:02X}>" for i in range(256)]
    begin = [processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])] if adds_bos else []
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), *begin])
    else:
        if kind == "metaspace":
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps)
        if begin:
            tokenizer.post_processor = begin[0]
    size = len(SPECIAL) + len(fallback) + 420
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL + fallback, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=_without_special_bytes(tokenizer, fallback),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def _without_special_bytes(tokenizer: Tokenizer, fallback: list[str]) -> Tokenizer:
    """Byte tokens belong to the vocabulary, as in Llama-2's; the trainer made them special."""
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in fallback]
    return Tokenizer.from_str(json.dumps(state))


def data_config(**fields: Any) -> DataConfig:
    return DataConfig.model_validate({"train": [{"path": "rows", "format": "messages"}], **fields})


def template_of(text: str, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Template:
    path = folder / "chat.jinja"
    path.write_text(text, encoding="utf-8")
    return load_template(str(path), tokenizer)


def chat(*texts: str, system: str | None = None) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system is not None else []) + messages


def label_one(
    messages: list[dict[str, Any]], template: Template, tokenizer: PreTrainedTokenizerFast, **data: Any
) -> TokenizedRow | Dropped:
    return build_labels([Example("rows", 0, messages)], template, tokenizer, data_config(**data))[0]


def kept(row: TokenizedRow | Dropped) -> TokenizedRow:
    assert isinstance(row, TokenizedRow), row
    return row


def trained_text(row: TokenizedRow, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Text of each stretch of trained tokens."""
    stretches: list[list[int]] = []
    previous = IGNORE_INDEX
    for label in row.labels:
        if label != IGNORE_INDEX:
            if previous == IGNORE_INDEX:
                stretches.append([])
            stretches[-1].append(label)
        previous = label
    return [str(tokenizer.decode(stretch)) for stretch in stretches]
