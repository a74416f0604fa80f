"""One mouth for a run: every fact goes to metrics.jsonl, to the trackers and to whoever watches."""

from __future__ import annotations

from typing import Any

from trainer.metrics.progress import Progress
from trainer.metrics.trackers import MetricsLog, Trackers

STEP_SCALARS = ("loss", "lr", "grad_norm", "tokens_per_second", "mfu", "gpu_memory_gib")


class Recorder:
    """Writes each record once to each of its three places."""

    def __init__(self, log: MetricsLog, trackers: Trackers, progress: Progress) -> None:
        self.log, self.trackers, self.progress = log, trackers, progress

    def step(self, record: dict[str, Any]) -> None:
        """One optimizer step."""
        self.log.write({"kind": "step", **record})
        scalars = {f"train/{key}": record[key] for key in STEP_SCALARS if record[key] is not None}
        self.trackers.log(scalars, record["step"])
        self.progress.step(record)

    def evaluation(self, record: dict[str, Any]) -> None:
        """One pass over the validation set."""
        self.log.write({"kind": "eval", **record})
        self.trackers.log({f"eval/{key}": record[key] for key in ("loss", "perplexity")}, record["step"])
        self.progress.evaluation(record)

    def sample(self, step: int, prompt: str, answer: str) -> None:
        """One generated answer."""
        self.log.write({"kind": "sample", "step": step, "prompt": prompt, "answer": answer})
        self.trackers.log_text(f"sample: {prompt[:60]}", answer, step)

    def event(self, step: int, event: str, text: str, **values: float) -> None:
        """Something that happened once: start, resume, a skipped step, a checkpoint; with its numbers."""
        self.log.write({"kind": "event", "step": step, "event": event, "text": text, **values})
        self.progress.note(text)

    def close(self) -> None:
        """Ends the progress display, flushes the trackers and closes the file."""
        self.progress.close()
        self.trackers.close()
        self.log.close()


class Silence(Recorder):
    """Of every rank but the first, which speaks for all."""

    def __init__(self) -> None:
        pass

    def step(self, record: dict[str, Any]) -> None:
        pass

    def evaluation(self, record: dict[str, Any]) -> None:
        pass

    def sample(self, step: int, prompt: str, answer: str) -> None:
        pass

    def event(self, step: int, event: str, text: str, **values: float) -> None:
        pass

    def close(self) -> None:
        pass
