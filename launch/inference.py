"""`packtrain generate` and `chat`: what a trained model says."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from trainer.errors import UserError

LOWEST_TEMPERATURE = 0.001  # logits divided by much less are no longer finite
SAMPLING: dict[str, tuple[type | UnionType, Callable[[Any], bool], str]] = {
    "max_new_tokens": (int, lambda value: value >= 1, "a whole number of at least 1"),
    "temperature": (
        int | float,
        lambda value: value == 0 or LOWEST_TEMPERATURE <= value < math.inf,
        f"0, or a number of at least {LOWEST_TEMPERATURE}",
    ),
    "top_p": (int | float, lambda value: 0 < value <= 1, "a number above 0 and at most 1"),
    "num_beams": (int, lambda value: value >= 1, "a whole number of at least 1"),
}
Seed = Annotated[int, Parameter(validator=Number(gte=0, lt=2**63))]
Engine = Literal["auto", "vllm", "transformers"]


def generate(
    folder: Path,
    *,
    prompt: list[str] | None = None,
    prompts: Path | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_beams: int = 1,
    seed: Seed = 0,
    engine: Engine = "auto",
    out: Path | None = None,
) -> None:
    """Answers prompts, asked in the tokens the model was trained on.

    Args:
        folder: run dir, merged or plain model, or adapter folder.
        prompt: a user's text; may be given several times.
        prompts: a .txt file with one prompt a line, or .jsonl with objects {"prompt": ...} or {"messages": [...]} that
            may carry max_new_tokens, temperature, top_p and num_beams of their own.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 always takes the likeliest token.
        top_p: share of probability that sampling draws from.
        num_beams: width of the beam search.
        seed: of the sampling.
        engine: what computes the answers; auto: vLLM where it is installed and a GPU is visible or it is built for
            CPUs, else transformers.
        out: write one JSON object a line there instead of printing the answers.
    """
    defaults: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "num_beams": num_beams,
    }
    _check_sampling(defaults)
    requests: list[dict[str, Any]] = [{"prompt": text, **defaults} for text in prompt or []]
    for request in requests:
        _check_conversation("--prompt", request)
    requests += [{**defaults, **request} for request in (_read_prompts(prompts) if prompts else [])]
    if not requests:
        raise UserError("--prompt", "no prompt is given", "--prompt TEXT (any number) or --prompts FILE")
    if out and out.exists():
        raise UserError("--out", f"{out} exists", "a file that does not exist yet", "remove it or name another")
    answers = _answer(folder, requests, seed, engine)
    records = [{**request, "answer": answer} for request, answer in zip(requests, answers, strict=True)]
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
        print(f"{len(records)} answer{'s' * (len(records) != 1)} in {out}")
        return
    for record in records:
        asked = record["prompt"] if "prompt" in record else record["messages"][-1]["content"]
        print(f"> {asked}\n{record['answer']}\n")


def chat(
    folder: Path,
    *,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: Seed = 0,
    engine: Engine = "auto",
) -> None:
    """Talks with a model; it sees the conversation so far. /reset forgets it, /exit or end of input leaves.

    Args:
        folder: run dir, merged or plain model, or adapter folder.
        system: a system message put before the conversation.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 always takes the likeliest token.
        top_p: share of probability that sampling draws from.
        seed: of the sampling.
        engine: what computes the answers; auto: vLLM where it is installed and a GPU is visible or it is built for
            CPUs, else transformers, whose answers come word by word.
    """
    from transformers import TextStreamer

    from trainer.answering import load_answerer

    _check_sampling({"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p})
    loaded = load_answerer(folder, engine, seed)
    beginning = [{"role": "system", "content": system}] if system else []
    history = list(beginning)
    while (text := _read_line()) is not None:
        if text == "/exit":
            return
        if text == "/reset":
            history = list(beginning)
            continue
        if not text:
            continue
        _check_conversation("the prompt", {"prompt": text})
        history.append({"role": "user", "content": text})
        streamer = TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)  # writes to stdout
        ids = loaded.prompt_ids(history)
        (answer,) = loaded.answer([ids], max_new_tokens, temperature=temperature, top_p=top_p, streamer=streamer)
        history.append({"role": "assistant", "content": answer})


def _read_line() -> str | None:
    """The user's next line, or None at the end of input. The prompt mark shows on terminals only."""
    if sys.stdin is None:  # closed by whoever started us
        return None
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None


def _answer(folder: Path, requests: list[dict[str, Any]], seed: int, engine: Engine) -> list[str]:
    """Answers in the order of `requests`; those with equal settings share batches."""
    from trainer.answering import load_answerer

    beams = any(request["num_beams"] > 1 for request in requests)
    loaded = load_answerer(folder, engine, seed, beams=beams)
    groups: dict[tuple[tuple[str, Any], ...], list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(tuple(sorted((k, request[k]) for k in SAMPLING)), []).append(index)
    answers = [""] * len(requests)
    for settings, members in groups.items():
        ids = [loaded.prompt_ids(requests[i].get("messages") or requests[i]["prompt"]) for i in members]
        for index, answer in zip(members, loaded.answer(ids, **dict(settings)), strict=True):
            answers[index] = answer
    return answers


def _read_prompts(path: Path) -> list[dict[str, Any]]:
    """Requests of a .txt or .jsonl file.

    Raises:
        UserError: a line that is no request, with its number.
    """
    if not path.is_file():
        raise UserError("--prompts", f"{path} is no file", "a .txt or .jsonl file")
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError("--prompts", f"{path} has no ending that tells its format", ".txt or .jsonl", "rename it")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError("--prompts", f"{path} is no text: {error}", "a .txt or .jsonl file in UTF-8") from error
    # Not splitlines: it also splits at characters that JSON lets stand inside a string.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix != ".jsonl":
        return [{"prompt": line.rstrip("\r")} for _, line in lines]
    return [_parse_request(f"{path}:{number}", line) for number, line in lines]


def _parse_request(where: str, line: str) -> dict[str, Any]:
    allowed = {"prompt", "messages"} | set(SAMPLING)
    try:
        request = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(where, f"not JSON: {error}", 'one object a line, {"prompt": "..."}') from error
    if not isinstance(request, dict) or len({"prompt", "messages"} & set(request)) != 1 or set(request) - allowed:
        raise UserError(where, line.strip()[:200], f"prompt or messages, and any of {', '.join(SAMPLING)}")
    _check_conversation(where, request)
    _check_sampling(request, f"{where}: ")
    return request


def _check_sampling(settings: dict[str, Any], where: str = "--") -> None:
    """Refuses what the generation would stumble over, or take for something else."""
    for name, (kind, is_right, allowed) in SAMPLING.items():
        value = settings.get(name, 1)
        if not isinstance(value, kind) or isinstance(value, bool) or not is_right(value):
            raise UserError(where + (name.replace("_", "-") if where == "--" else name), f"found {value!r}", allowed)


def _check_conversation(where: str, request: dict[str, Any]) -> None:
    from trainer.data.formats import FORMATS, BadRow, check_characters

    messages = [{"role": "user", "content": request["prompt"]}] if "prompt" in request else request["messages"]
    try:
        FORMATS["messages"].to_messages({"messages": messages})
        check_characters(messages)
    except BadRow as error:
        allowed = 'a prompt of text, or messages: [{"role": "user", "content": "..."}]'
        raise UserError(where, str(error), allowed) from error
