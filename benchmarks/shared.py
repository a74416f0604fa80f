"""What every contender of speed.py reads alike: a shape, a tokenizer whose tokens are words, and documents of them.

Imports neither torch nor transformers, so that any interpreter can.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.model.shapes import SHAPES

TINY = {
    **SHAPES["Llama-2-7b"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
}
PAD, FIRST_WORD = 0, 3  # Llama-2's ids: 0 unknown, 1 begin, 2 end
MEDIAN, SIGMA = 200, 0.9  # of the documents' lengths in tokens, as sets of instructions have
PROMPT = 0.4  # share of a document that is not trained on
ADAPTER_RANK, ADAPTER_ALPHA = 16, 32
MASKED = "sdpa, 4-D mask"  # how transformers tells packed documents apart
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Writes a document's tokens and none between them.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}{{ message.content + ' ' }}"
    "{% else %}{{ message.content + eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Document:
    """Token ids with begin and end; the first `num_prompt` are not trained on."""

    ids: list[int]
    num_prompt: int


def shape_of(name: str) -> dict[str, Any]:
    """Keyword arguments of `LlamaConfig`: of a name in `SHAPES`, or ``tiny``."""
    return TINY if name == "tiny" else SHAPES[name]


def count_adapter(shape: dict[str, Any]) -> int:
    """Weights of an adapter of `ADAPTER_RANK` on all linear modules of the decoder's layers."""
    hidden, between = shape["hidden_size"], shape["intermediate_size"]
    queries = shape["num_attention_heads"] * shape["head_dim"]
    keys = shape["num_key_value_heads"] * shape["head_dim"]
    ends = 2 * (hidden + queries) + 2 * (hidden + keys) + 3 * (hidden + between)
    return shape["num_hidden_layers"] * ADAPTER_RANK * ends


def draw_documents(shape: dict[str, Any], num_tokens: int, pack_length: int, seed: int = 0) -> list[Document]:
    """Random tokens in documents of log-normal length, at most half a pack, `num_tokens` or a few more in all."""
    draw, documents, words = random.Random(seed), [], range(FIRST_WORD, _last_word(shape))
    while num_tokens > 0:
        length = round(MEDIAN * draw.lognormvariate(0, SIGMA))
        length = max(16, min(pack_length // 2, length))
        ids = [shape["bos_token_id"], *draw.choices(words, k=length - 2), shape["eos_token_id"]]
        documents.append(Document(ids, max(2, round(PROMPT * length))))
        num_tokens -= length
    return documents


def write_inputs(folder: Path, shape: dict[str, Any], documents: list[Document]) -> None:
    """Writes ``config.json``, a tokenizer and ``documents.jsonl``: the documents as words and as ids."""
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    LlamaConfig(**shape, architectures=["LlamaForCausalLM"], pad_token_id=PAD).save_pretrained(folder)
    names = {shape["bos_token_id"]: "<s>", shape["eos_token_id"]: "</s>", PAD: "<unk>"}
    vocabulary = {names.get(token, f"w{token}"): token for token in range(shape["vocab_size"])}
    PreTrainedTokenizerFast(
        tokenizer_object=_word_level(vocabulary),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
    ).save_pretrained(folder)
    lines = (_row(document) for document in documents)
    (folder / "documents.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def read_documents(folder: Path) -> list[Document]:
    """The documents that `write_inputs` wrote."""
    rows = map(json.loads, (folder / "documents.jsonl").read_text().splitlines())
    return [Document(row["ids"], row["num_prompt"]) for row in rows]


def _last_word(shape: dict[str, Any]) -> int:
    """Llama-3's special tokens stand behind its words."""
    special = shape["bos_token_id"]
    return special if special > FIRST_WORD else shape["vocab_size"]


def _word_level(vocabulary: dict[str, int]) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer


def _row(document: Document) -> dict[str, Any]:
    words = [f"w{token}" for token in document.ids]
    cut = document.num_prompt
    texts = {"prompt": " ".join(words[1:cut]), "completion": " ".join(words[cut:-1])}
    return {**texts, "ids": document.ids, "num_prompt": cut}
