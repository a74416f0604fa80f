"""`packtrain generate` and `chat`: what a trained model says."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from trainer.errors import UserError

if TYPE_CHECKING:
    from trainer.answering import Answerer

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
Request = tuple[str, dict[str, Any]]  # where it was given, such as prompts.jsonl:3; prompt or messages, and settings

logger = logging.getLogger(__name__)


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
            may carry max_new_tokens, temperature, top_p and num_beams of their own. An answer that messages end with
            is not shown to the model; --out has it as "reference".
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
    requests: list[Request] = [("--prompt", {"prompt": text, **defaults}) for text in prompt or []]
    for request in requests:
        _check_conversation(*request)
    requests += [(where, {**defaults, **request}) for where, request in (_read_prompts(prompts) if prompts else [])]
    if not requests:
        raise UserError("--prompt", "no prompt is given", "--prompt TEXT (any number) or --prompts FILE")
    if out and out.exists():
        raise UserError("--out", f"{out} exists", "a file that does not exist yet", "remove it or name another")
    answers = _answer(folder, requests, seed, engine)
    records = [{**request, "answer": answer} for (_, request), answer in zip(requests, answers, strict=True)]
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


def _answer(folder: Path, requests: list[Request], seed: int, engine: Engine) -> list[str]:
    """Answers in the order of `requests`; those with equal settings share batches."""
    from trainer.answering import load_answerer

    beams = any(request["num_beams"] > 1 for _, request in requests)
    loaded = load_answerer(folder, engine, seed, beams=beams)
    ids = [_render(loaded, *request) for request in requests]
    groups: dict[tuple[tuple[str, Any], ...], list[int]] = {}
    for index, (_, request) in enumerate(requests):
        groups.setdefault(tuple(sorted((k, request[k]) for k in SAMPLING)), []).append(index)
    answers = [""] * len(requests)
    for settings, members in groups.items():
        for index, answer in zip(members, loaded.answer([ids[i] for i in members], **dict(settings)), strict=True):
            answers[index] = answer
    return answers


def _render(loaded: Answerer, where: str, request: dict[str, Any]) -> list[int]:
    try:
        return loaded.prompt_ids(request.get("messages") or request["prompt"])
    except UserError as error:  # which does not know the line
        raise UserError(where, error.found, error.allowed, error.fix) from error


def _read_prompts(path: Path) -> list[Request]:
    """Requests of a .txt or .jsonl file.

    Raises:
        UserError: a line that is no request, with its number; no line.
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
    if not lines:
        raise UserError("--prompts", f"{path} has no prompt in it", "a prompt a line")
    if path.suffix != ".jsonl":
        return [(f"{path}:{number}", {"prompt": line.rstrip("\r")}) for number, line in lines]
    requests = [(where, _parse_request(where, line)) for where, line in ((f"{path}:{n}", line) for n, line in lines)]
    if answered := sum("reference" in request for _, request in requests):
        logger.info("%s: %d of %d end with an answer, which the model is not shown", path, answered, len(requests))
    return requests


def _parse_request(where: str, line: str) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(where, f"not JSON: {error}", 'one object a line, {"prompt": "..."}') from error
    allowed = f"prompt or messages, and any of {', '.join(SAMPLING)}"
    if not isinstance(request, dict) or len({"prompt", "messages"} & set(request)) != 1:
        raise UserError(where, line.strip()[:200], allowed)
    if unknown := sorted(set(request) - {"prompt", "messages", *SAMPLING}):
        raise UserError(where, f"unknown key {unknown[0]!r}", allowed)
    _check_conversation(where, request)
    _check_sampling(request, f"{where}: ")
    return _without_answer(where, request)


def _without_answer(where: str, request: dict[str, Any]) -> dict[str, Any]:
    """A conversation that ends with an answer, such as a row trained on, is asked up to it."""
    messages = request.get("messages", [])
    if not messages or messages[-1]["role"] != "assistant":
        return request
    if len(messages) == 1:
        raise UserError(where, "an answer without a question", "messages that end with the user's")
    return {**request, "messages": messages[:-1], "reference": messages[-1].get("content")}


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
