"""Tokenising, masking and packing on one core, beside TRL's (https://github.com/huggingface/trl) on the same rows.

    pip install trl
    python benchmarks/preprocessing.py --data alpaca.json --tokenizer meta-llama/Llama-2-7b-hf

The file is a list of rows of instruction, input and output, of which as many as asked for are drawn and numbered, so
that no two are alike. A line of json each. Seconds are the process's CPU time, so that a busy machine tells the same;
waiting for the disk does not count. A ratio is TRL's seconds over packtrain's.

- ``preprocess``: conversations to packs that are ready to train on. packtrain's time is all that `packtrain preprocess`
  does with a new recipe: reading, hashing and writing the cache too. It masks each row in two ways and drops it when
  they disagree; ``packtrain_marks`` has a template with the marks that TRL's ``assistant_only_loss`` needs as one of
  them. TRL's time is that of making an `SFTTrainer` over rows in memory, less that of making one over a few: from
  messages with ``assistant_only_loss``, and from prompts and completions as plain texts, rendered beforehand.
- ``packing``: of tokenised rows. TRL's ``pack_dataset(strategy="bfd")`` is measured by thousands of rows, as
  `SFTTrainer` calls it, and over all rows at once. It copies tokens and labels; packtrain writes which row lies where,
  and copies a pack when it is trained on. Copying is less than a third of TRL's time.

On one core of a shared 2-core host, Llama-2's tokenizer, 999 rows of Alpaca drawn from, TRL 1.16, transformers 5.23:

====================  =========  ==========  =============  ==========
.                     packtrain  with marks  TRL, messages  TRL, texts
====================  =========  ==========  =============  ==========
20,000 rows to packs  12.6 s     12.5 s      13.6 s         14.6 s
their fill            99.88%     99.88%      99.02%         99.12%
====================  =========  ==========  =============  ==========

======================  ===============  =================  ==============
.                       packtrain        TRL, by thousands  TRL, at once
======================  ===============  =================  ==============
packing 200,000 rows    0.018 s, 99.93%  4.6 s, 98.94%      5.5 s, 99.93%
packing 1,000,000 rows  0.042 s, 99.94%  23.9 s, 98.96%     29.9 s, 99.94%
======================  ===============  =================  ==============
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

os.environ["TOKENIZERS_PARALLELISM"] = "false"
Row = dict[str, Any]
WARM_UP = 8  # rows
PROMPT = "### Instruction:\n{}\n\n### Response:\n"
MARKED = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'user' %}
{{- '### Instruction:\\n' + message.content + '\\n\\n### Response:\\n' }}
{%- else %}
{%- generation %}{{- message.content + eos_token }}{%- endgeneration %}
{%- endif %}
{%- endfor %}"""
UNMARKED = MARKED.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")


def main() -> None:
    """Prints the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="json file of rows of instruction, input and output")
    parser.add_argument("--tokenizer", required=True, help="folder, or name on the hub")
    parser.add_argument("--rows", type=int, default=20_000, help="rows to tokenise")
    parser.add_argument("--packed-rows", type=int, nargs="*", default=[200_000], help="tokenised rows to pack")
    parser.add_argument("--pack-length", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    try:
        import trl  # noqa: F401 - its import counts for nobody
        from datasets import disable_caching, disable_progress_bars
    except ImportError:
        parser.exit(2, "TRL is not installed in this environment: pip install trl\n")
    disable_caching()
    disable_progress_bars()
    logging.disable(logging.WARNING)

    random = np.random.default_rng(arguments.seed)
    read = [read_row(row) for row in json.loads(arguments.data.read_text(encoding="utf-8"))]
    drawn = random.integers(len(read), size=arguments.rows)
    rows = [(f"{number}. {read[index][0]}", read[index][1]) for number, index in enumerate(drawn)]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PACKTRAIN_CACHE"] = folder
        lengths = compare_preprocessing(rows, arguments.tokenizer, arguments.pack_length, Path(folder))
        for count in arguments.packed_rows:
            compare_packing(random.choice(lengths, count), arguments.pack_length, Path(folder))


def read_row(row: Row) -> tuple[str, str]:
    """What the user asks and the assistant answers."""
    return "\n\n".join(part for part in (row["instruction"], row.get("input")) if part), row["output"]


# ------------------------------------------------------------------------------------------------------- preprocessing


def compare_preprocessing(rows: list[tuple[str, str]], tokenizer: str, pack_length: int, folder: Path) -> np.ndarray:
    """Prints ``preprocess``; gives the rows' lengths in tokens."""
    conversations: list[Row] = [{"messages": [message("user", asked), message("assistant", a)]} for asked, a in rows]
    texts: list[Row] = [{"prompt": PROMPT.format(asked), "completion": answer} for asked, answer in rows]
    found: Row = {"what": "preprocess", "rows": len(rows), "pack_length": pack_length}
    for name, template in (("packtrain", UNMARKED), ("packtrain_marks", MARKED)):
        splits, seconds = preprocess(conversations, template, tokenizer, pack_length, folder)
        report = splits.reports["train"]
        found[name] = figures_of(seconds, report.packs, report.tokens, report.trained_tokens, pack_length)
    for name, given in (("trl_messages", conversations), ("trl_texts", texts)):
        prepare = trl_preparation(name == "trl_messages", tokenizer, pack_length, folder)
        _, warm_up = timed(prepare, given[:WARM_UP])
        packs, seconds = timed(prepare, given)
        ids, labels = (column(packs, name) for name in ("input_ids", "labels"))
        trained = int((labels != -100).sum())
        found[name] = figures_of(seconds - warm_up, len(packs), len(ids), trained, pack_length)
    show(found)
    return np.array(report.lengths)


def message(role: str, content: str) -> Row:
    """One of a conversation."""
    return {"role": role, "content": content}


def preprocess(rows: list[Row], template: str, tokenizer: str, pack_length: int, folder: Path) -> tuple[Any, float]:
    """What `packtrain preprocess` does; the splits, and the seconds."""
    from trainer.config import RunConfig
    from trainer.data.prepare import load_splits

    path, jinja = folder / "rows.jsonl", folder / "template.jinja"
    jinja.write_text(template, encoding="utf-8")
    data = {"train": [{"path": str(path), "format": "messages"}], "template": str(jinja), "pack_length": pack_length}
    config = RunConfig.model_validate({"model": {"path": tokenizer}, "data": data})
    loaded = load_tokenizer(tokenizer)
    for some in (rows[:WARM_UP], rows):  # imports count for nobody
        path.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
        splits, seconds = timed(load_splits, config, loaded)
    return splits, seconds


def trl_preparation(
    is_conversation: bool, tokenizer: str, pack_length: int, folder: Path
) -> Callable[[list[Row]], Any]:
    """What `SFTTrainer` does before it trains: rows to a data set of packs."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    loaded = load_tokenizer(tokenizer)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(loaded), **sizes))
    config = SFTConfig(
        output_dir=str(folder / "trl"),
        packing=True,
        packing_strategy="bfd",
        max_length=pack_length,
        assistant_only_loss=is_conversation,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )

    def prepare(rows: list[Row]) -> Any:
        dataset = Dataset.from_list(rows)
        return SFTTrainer(model, config, train_dataset=dataset, processing_class=loaded).train_dataset

    return prepare


def load_tokenizer(name: str) -> Any:
    """With the template that has marks."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.chat_template = MARKED
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    return tokenizer


# ------------------------------------------------------------------------------------------------------------- packing


def compare_packing(lengths: np.ndarray, pack_length: int, folder: Path) -> None:
    """Prints ``packing``."""
    import pyarrow as pa
    from datasets import Dataset
    from trl import pack_dataset

    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    tokens = pa.ListArray.from_arrays(offsets, pa.array(np.zeros(lengths.sum(), np.int32)))
    dataset = Dataset(pa.table({"input_ids": tokens, "labels": tokens}))
    found: Row = {"what": "packing", "rows": len(lengths), "pack_length": pack_length}
    packs, seconds = timed(pack, lengths, pack_length, folder)
    found["packtrain"] = figures_of(seconds, len(packs), int(lengths.sum()), 0, pack_length)
    for name, size in (("trl_by_thousands", 1000), ("trl_at_once", len(lengths))):
        packs, seconds = timed(pack_dataset, dataset, pack_length, "bfd", {"batch_size": size})
        found[name] = figures_of(seconds, len(packs), len(column(packs, "input_ids")), 0, pack_length)
        del packs
    show(found)


def pack(lengths: np.ndarray, pack_length: int, folder: Path) -> Any:
    """As preparing a split does, its index written."""
    from trainer.data.cache import write_packs
    from trainer.data.packing import pack_sequences

    packs = pack_sequences(lengths, pack_length)
    write_packs(folder, packs)
    return packs


# ------------------------------------------------------------------------------------------------------------- figures


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What it returns, and the seconds of CPU time that it took."""
    start = time.process_time()
    result = function(*arguments)
    return result, time.process_time() - start


def column(packs: Any, name: str) -> np.ndarray:
    """All values of a data set's column of lists, end to end."""
    chunks = packs.with_format("arrow")[:].column(name).chunks
    return np.concatenate([chunk.flatten().to_numpy() for chunk in chunks])


def figures_of(seconds: float, packs: int, tokens: int, trained_tokens: int, pack_length: int) -> Row:
    """Of one way to do it."""
    trained = {"trained_tokens": trained_tokens} if trained_tokens else {}
    return {"seconds": seconds, "packs": packs, "fill": tokens / (packs * pack_length), "tokens": tokens, **trained}


def show(found: Row) -> None:
    """Adds the ratios and prints the line."""
    for name, figures in found.items():
        if isinstance(figures, dict) and name.startswith("trl"):
            figures["ratio"] = figures["seconds"] / found["packtrain"]["seconds"]
    sys.stdout.write(json.dumps(found, default=float) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
