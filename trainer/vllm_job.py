"""Questions to vLLM, and the process of its own in which it answers them; this file never imports vLLM."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainer.children import die_with
from trainer.errors import PacktrainError, first_error
from trainer.servable import Servable

ROOT = Path(__file__).resolve().parents[1]
SHOWN_OF_LOG = 2000
SECONDS_TO_STOP = 15.0  # vLLM gives its processes 5


@dataclass(frozen=True)
class Scores:
    """What a model makes of the scored tokens of one row.

    Attributes:
        logprobs: of the row's own tokens, in nats.
        tops: the likeliest token at each place.
        margins: log-probability of the likeliest less that of the next; empty where the engine does not tell.
    """

    logprobs: list[float]
    tops: list[int]
    margins: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """A greedy answer to a conversation.

    Attributes:
        prompt_ids: tokens the engine made of the messages. ids: the answer's, with the token it stopped at.
        stopped: the engine ended it at a stop token, not for its length.
    """

    prompt_ids: list[int]
    ids: list[int]
    stopped: bool


@dataclass(frozen=True)
class Job:
    """Questions to one engine.

    Attributes:
        conversations: each ``{"messages": [...], "tools": [...]}``, to be asked through the engine's own chat path.
        rows: each ``(ids, start)``: tokens to score from position `start` on.
        max_length: tokens that the longest conversation may take with its answer.
        stop_ids: tokens that end answers beside those that the folder's files name.
    """

    servable: Servable
    conversations: list[dict[str, Any]]
    rows: list[tuple[list[int], int]]
    max_new_tokens: int
    max_length: int
    stop_ids: list[int]


@dataclass(frozen=True)
class Served:
    """The engine's replies, in the order of the job's questions.

    Attributes:
        engine: name and version.
        without_adapter: scores of the same rows by the base alone, where an adapter is served unmerged.
    """

    engine: str
    answers: list[Answer]
    scores: list[Scores]
    without_adapter: list[Scores] | None


def serve_in_child(job: Job) -> Served:
    """Has vLLM do `job` in a process of its own, whose end gives all of its GPU memory back.

    Raises:
        PacktrainError: it failed; with the end of what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="packtrain-vllm-") as place:
        asked, replied, log = (Path(place) / name for name in ("job.json", "served.json", "log.txt"))
        asked.write_text(json.dumps(asdict(job)), encoding="utf-8")
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-P", "-m", "trainer.vllm_engine", str(asked), str(replied)]
        status = _run(command, os.environ | {"PYTHONPATH": path}, log)
        if not replied.exists():  # written whole, last of all; vLLM 0.25 may abort while it ends after that
            said = log.read_text(errors="replace").strip()
            why = first_error(said) or "it named no error"
            what = f"vLLM failed on {job.servable.model} (exit status {status}): {why}"
            raise PacktrainError(f"{what}\n{said[-SHOWN_OF_LOG:]}")
        return _parse_served(json.loads(replied.read_text(encoding="utf-8")))


def _run(command: Sequence[str], environ: Mapping[str, str], log: Path) -> int:
    """Its exit status. Ctrl-C and what else ends the waiting ends the command too, with all it has started.

    It is a session of its own: a terminal's Ctrl-C would reach vLLM's processes before the one that ends them in order.
    """
    with (
        log.open("w") as out,
        subprocess.Popen(
            command,
            env=environ,
            stdout=out,
            stderr=out,
            start_new_session=True,
            preexec_fn=die_with(os.getpid(), signal.SIGTERM),
        ) as child,
    ):
        try:
            return child.wait()
        except BaseException:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(SECONDS_TO_STOP)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            raise


def parse_job(record: dict[str, Any]) -> Job:
    """A job as `serve_in_child` writes it."""
    rows = [(ids, start) for ids, start in record["rows"]]
    return Job(**{**record, "servable": Servable(**record["servable"]), "rows": rows})


def _parse_served(record: dict[str, Any]) -> Served:
    base = record["without_adapter"]
    return Served(
        engine=record["engine"],
        answers=[Answer(**answer) for answer in record["answers"]],
        scores=[Scores(**scores) for scores in record["scores"]],
        without_adapter=None if base is None else [Scores(**scores) for scores in base],
    )
