"""`make demo`: from an untrained shape to a fine-tuned, merged model that answers, in minutes on two cores.

A tiny Llama first learns a little text (lines such as ``rev(a b c d)=d c b a``), then QLoRA teaches it to follow chat
instructions ("Write a b c d backwards."). Every step is a `packtrain` command that a reader can copy; this file only
writes the inputs and reads the commands' json. The tests build their toys with the functions of this file.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

DEMO = Path("demo")
RECIPES = Path(__file__).resolve().parent.parent / "recipes"
NUM_TEXTS, NUM_TRAIN, NUM_TEST = 20_000, 4_000, 200
MOST_BEFORE, LEAST_AFTER = 0.1, 0.9  # exact match of the base and of the fine-tuned model

Row = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """What a model is worth, read from the files that `packtrain evaluate` and `generate` wrote."""

    validation_loss: float
    exact_match: float
    answers: list[str]


def main() -> int:
    """Writes ``demo/`` in the current folder and runs the main job in it.

    Returns:
        Exit status: 0 when the fine-tuned model answers as it should, else 1.
    """
    started = time.monotonic()
    examples = write_inputs()
    # More threads gain a toy nothing, and slow it down manyfold where cores are shared.
    threads = os.environ.setdefault("OMP_NUM_THREADS", "1")
    say(command_line("export", f"OMP_NUM_THREADS={threads}"))
    try:
        say(heading("1. A base model: a tiny Llama, random at first, learns lines of text"))
        packtrain("train", recipe("demo-pretrain"), "--run-dir", "demo/pretrain")
        say(heading("2. What the fine-tuning will train on: coloured tokens count in the loss"))
        packtrain("preprocess", recipe("demo"), "--show", "2")
        say(heading("3. The base model on instructions"))
        before = measure("demo/pretrain/model", "before", examples)
        say(heading("4. Fine-tune with QLoRA, merge the adapter into the base, verify the merged model"))
        packtrain("train", recipe("demo"), "--run-dir", "demo/qlora")
        packtrain("verify", "demo/qlora/merged")
        say(heading("5. The merged model on the same instructions"))
        after = measure("demo/qlora/merged", "after", examples)
    except subprocess.CalledProcessError as error:
        say(f"The demo stopped: the last command ended with status {error.returncode}")
        return 1
    return conclude(before, after, examples, time.monotonic() - started)


def write_inputs() -> list[Row]:
    """Writes tokenizer, untrained shape and data in place of those of an earlier demo.

    Returns:
        A test row of each kind of instruction.
    """
    for name in ("data", "shape", "pretrain", "qlora", "measured"):
        shutil.rmtree(DEMO / name, ignore_errors=True)
    texts, rows = list(text_rows(NUM_TEXTS, seed=1)), list(chat_rows(NUM_TRAIN + NUM_TEST, seed=2))
    train, test = rows[:NUM_TRAIN], rows[NUM_TRAIN:]
    assert {prompt_of(row) for row in train}.isdisjoint(map(prompt_of, test))
    write_jsonl(DEMO / "data" / "pretrain.jsonl", texts)
    write_jsonl(DEMO / "data" / "train.jsonl", train)
    write_jsonl(DEMO / "data" / "test.jsonl", test)

    seen = [row["text"] for row in texts[:2000]] + [message["content"] for row in train for message in row["messages"]]
    tokenizer = train_tokenizer(seen)
    tokenizer.save_pretrained(DEMO / "shape")
    llama_config(tokenizer, hidden=128, layers=3, heads=4, kv_heads=4).save_pretrained(DEMO / "shape")
    kinds = [instruction.split("{}") for instruction in INSTRUCTIONS.values()]
    return [next(r for r in test if prompt_of(r).startswith(a) and prompt_of(r).endswith(b)) for a, b in kinds]


def measure(model: str, name: str, examples: list[Row]) -> Measured:
    """Runs the commands that say what `model` is worth, and reads what they wrote."""
    files = {what: DEMO / "measured" / f"{name}_{what}" for what in ("validation.json", "test.json", "answers.jsonl")}
    validation, test, answers = files.values()
    evaluate = ("evaluate", model, "--recipe", recipe("demo"), "--split")
    packtrain(*evaluate, "validation", "--no-exact-match", "--json", str(validation))
    packtrain(*evaluate, "test", "--json", str(test))
    prompts = [argument for row in examples for argument in ("--prompt", prompt_of(row))]
    packtrain("generate", model, *prompts, "--max-new-tokens", "16", "--out", str(answers))
    (on_validation,), (on_test,) = (json.loads(file.read_text()) for file in (validation, test))
    assert on_test["rows"] == NUM_TEST
    return Measured(
        on_validation["loss"],
        on_test["exact_match"],
        [json.loads(line)["answer"] for line in answers.read_text().splitlines()],
    )


def conclude(before: Measured, after: Measured, examples: list[Row], seconds: float) -> int:
    """Prints what changed, and says whether that is what was asked for."""
    answers = Table("prompt", "before", "after", "right answer", title="Answers to prompts that were not trained on")
    for row, *shown in zip(examples, before.answers, after.answers, strict=True):
        answers.add_row(*map(Text, (prompt_of(row), *shown, row["messages"][-1]["content"])))
    exact = f"exact match on {NUM_TEST} prompts"
    checks = [
        ("validation loss", before.validation_loss, after.validation_loss, "lower"),
        (exact, before.exact_match, after.exact_match, f"<= {MOST_BEFORE}, then >= {LEAST_AFTER}"),
    ]
    figures = Table("measured", "before", "after", "asked for", title="Base and fine-tuned model")
    for what, first, second, asked in checks:
        figures.add_row(what, f"{first:.3f}", f"{second:.3f}", asked)
    is_reached = (
        after.validation_loss < before.validation_loss
        and before.exact_match <= MOST_BEFORE
        and after.exact_match >= LEAST_AFTER
    )
    say(heading("6. What changed"), answers, figures)
    verdict = "reached" if is_reached else "NOT reached"
    say(f"{verdict} in {seconds:.0f} s. The run's page: demo/qlora/report.html")
    say(f"Talk to the model: {shlex.join((command(), 'chat', 'demo/qlora/merged'))}")
    return 0 if is_reached else 1


# -------------------------------------------------------------------------------------------------------- the commands


def packtrain(*arguments: str) -> None:
    """Shows a command as a reader would type it, and runs it.

    Raises:
        subprocess.CalledProcessError: it failed; it has said why.
    """
    line = (command(), *arguments)
    say(command_line(*line))
    subprocess.run(line, check=True)


def command_line(*words: str) -> Text:
    """A command as one types it."""
    return Text("$ " + shlex.join(words), style="bold cyan")


def command() -> str:
    """The `packtrain` of this Python's environment."""
    return os.path.relpath(Path(sys.executable).with_name("packtrain"))


def recipe(name: str) -> str:
    """Path of a recipe of this checkout, as short as can be."""
    return os.path.relpath(RECIPES / f"{name}.yaml")


def prompt_of(row: Row) -> str:
    """The user's text."""
    return row["messages"][0]["content"]


def heading(text: str) -> Text:
    """What the next commands are for."""
    return Text(f"\n{text}", style="bold")


def say(*what: RenderableType) -> None:
    """Shows `what` at once, so that it comes before the output of the next command."""
    console = Console(soft_wrap=True)
    for item in what:
        console.print(item)
    console.file.flush()


# ------------------------------------------------------------------------------------------------------------- the toys

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
OPERATIONS: dict[str, Callable[[list[str]], list[str]]] = {
    "rev": lambda items: items[::-1],
    "sort": sorted,
    "copy": list,
    "upper": lambda items: [item.upper() for item in items],
    "rot": lambda items: items[1:] + items[:1],
}
INSTRUCTIONS = {
    "rev": "Write {} backwards.",
    "copy": "Repeat {}.",
    "upper": "Write {} in capitals.",
    "rot": "Move the first of {} to the end.",
}


def draw_items(rng: random.Random) -> list[str]:
    """Four letters."""
    return rng.choices(LETTERS, k=4)


def text_rows(count: int, seed: int) -> Iterator[Row]:
    """Rows of plain text, ``{"text": "rev(a b c d)=d c b a"}``, over all operations."""
    rng = random.Random(seed)
    for _ in range(count):
        name, items = rng.choice(list(OPERATIONS)), draw_items(rng)
        yield {"text": f"{name}({' '.join(items)})={' '.join(OPERATIONS[name](items))}"}


def chat_rows(count: int, seed: int) -> Iterator[Row]:
    """Distinct instructions and their answers, ``{"messages": [user, assistant]}``."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while len(seen) < count:
        name, items = rng.choice(list(INSTRUCTIONS)), draw_items(rng)
        prompt = INSTRUCTIONS[name].format(" ".join(items))
        if prompt not in seen:
            seen.add(prompt)
            answer = " ".join(OPERATIONS[name](items))
            yield {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def train_tokenizer(texts: Iterable[str], num_merges: int = 110) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a chat template, as a Llama has: begin and end tokens, one token a role.

    Encoding text puts the begin token first, and the chat template writes it too.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [PAD, BEGIN, END, *ROLES]
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + len(special) + num_merges,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin = (BEGIN, tokenizer.token_to_id(BEGIN))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[begin]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def llama_config(
    tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int, heads: int, kv_heads: int, tied: bool = False
) -> LlamaConfig:
    """The shape of a small Llama for `tokenizer`; its MLP is 8/3 of `hidden` wide, as Llama's."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
    )


def write_jsonl(path: Path, rows: Iterable[Row]) -> Path:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main())
