"""Where a run's numbers go: metrics.jsonl always, TensorBoard and Weights & Biases through accelerate's trackers."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

from trainer.checkpoint.layout import RunDir, write_atomically
from trainer.config import RunConfig, TrackingConfig
from trainer.errors import UserError

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

logger = logging.getLogger(__name__)

Record = dict[str, Any]


class MetricsLog:
    """Appends records to ``metrics.jsonl``, a line each, handed to the operating system at once (survives kill -9).

    NaN and infinities are written as null, so that every line is JSON for every reader. Events get the time of day.
    """

    def __init__(self, run_dir: RunDir) -> None:
        self._path = run_dir.metrics
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _cut_half_line(self._path)
        self._file = _open_for_lines(self._path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends `record`, which has at least ``kind`` and ``step``."""
        line = dict(record)
        if line["kind"] == "event":
            line.setdefault("time", datetime.now(UTC).isoformat(timespec="seconds"))
        self._file.write(_to_json(line) + "\n")

    def truncate_after(self, step: int) -> None:
        """Drops steps, evaluations and samples past `step`, as a run resumed there writes them again.

        Events stay: they tell what happened. The file is replaced at once; a crash leaves the old one or the new one.
        """
        kept = [r for r in read_metrics(self._path) if r["kind"] == "event" or r["step"] <= step]
        self._file.close()
        write_atomically(self._path, "".join(_to_json(record) + "\n" for record in kept))
        self._file = _open_for_lines(self._path)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path) -> Iterator[Record]:
    """The records of a metrics.jsonl, in order; none when there is no file. A damaged line is skipped and named."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                record["kind"], record["step"]
            except (json.JSONDecodeError, KeyError, TypeError):
                logger.warning("%s line %d is damaged and left out", path, number)
                continue
            yield record


def _open_for_lines(path: Path) -> TextIO:
    return open(path, "a", encoding="utf-8", buffering=1)


def _cut_half_line(path: Path) -> None:
    """Removes what a killed writer left after the last newline."""
    if not path.exists():
        return
    with open(path, "r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def _to_json(record: Mapping[str, Any]) -> str:
    return json.dumps(_without_nan(record), allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value


def check_trackers(config: TrackingConfig) -> None:
    """Says at once that a tracker is missing, before a model is loaded. Imports nothing.

    Raises:
        UserError: wandb is asked for and not installed.
    """
    if "wandb" not in config.to:
        return
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:  # no origin: only a folder called wandb, as wandb itself leaves behind
        raise UserError(
            "tracking.to",
            "wandb is asked for but not installed",
            fix="run `pip install wandb`, or remove wandb from tracking.to",
        )


class Trackers:
    """TensorBoard and Weights & Biases, as `tracking.to` asks. To be built by rank 0 alone.

    Build it after torch.distributed is set up, where it is used: accelerate looks at it once.

    Args:
        resumed_step: last step already done. TensorBoard hides what an earlier attempt logged past it; Weights &
            Biases continues its run and ignores steps it has already seen.

    Raises:
        UserError: a tracker is not installed, or cannot start (no login, no network).
    """

    def __init__(self, config: RunConfig, run_dir: RunDir, resumed_step: int = 0) -> None:
        check_trackers(config.tracking)
        self._trackers: list[GeneralTracker] = []
        if not config.tracking.to:
            return
        _initialise_accelerate_state()
        starters: dict[str, Callable[[], GeneralTracker]] = {
            "tensorboard": lambda: _start_tensorboard(run_dir, resumed_step),
            "wandb": lambda: _start_wandb(config, run_dir),
        }
        self._trackers = [starters[name]() for name in dict.fromkeys(config.tracking.to)]
        if resumed_step == 0 and run_dir.recipe.exists():
            self.log_text("recipe", run_dir.recipe.read_text(encoding="utf-8"), step=0)

    def log(self, values: Mapping[str, float | None], step: int) -> None:
        """Logs numbers of one step by name; a value of None is left out."""
        known = {name: value for name, value in values.items() if value is not None}
        for tracker in self._trackers:
            tracker.log(known, step=step)

    def log_text(self, name: str, text: str, step: int) -> None:
        """Logs a text, such as a generated answer, shown literally (TensorBoard would read it as Markdown)."""
        for tracker in self._trackers:
            if tracker.name == "wandb":
                tracker.log_table(name, columns=["step", "text"], data=[[step, text]], step=step)
            else:
                tracker.log({name: "\n".join("    " + line for line in text.splitlines() or [""])}, step=step)

    def close(self) -> None:
        """Writes out what is pending. May be called twice."""
        for tracker in self._trackers:
            tracker.finish()
        self._trackers = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _initialise_accelerate_state() -> None:
    """Gives accelerate's loggers, which its trackers use, the state they need, without starting torch.distributed.

    Under torchrun or accelerate launch `PartialState()` starts a process group when there is none yet; hiding
    LOCAL_RANK keeps it from doing so, and from choosing its backend.
    """
    import torch.distributed
    from accelerate.state import PartialState
    from accelerate.utils import patch_environment

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        PartialState()
        return
    with patch_environment(LOCAL_RANK="-1"):
        PartialState()


def _start_tensorboard(run_dir: RunDir, resumed_step: int) -> GeneralTracker:
    from accelerate.tracking import TensorBoardTracker

    folder = run_dir.tensorboard
    tracker = TensorBoardTracker(run_name=folder.name, logging_dir=folder.parent, purge_step=resumed_step + 1)
    tracker.main_process_only = False  # rank 0 alone has one; this spares accelerate's own check
    tracker.start()
    return tracker


def _start_wandb(config: RunConfig, run_dir: RunDir) -> GeneralTracker:
    import wandb
    from accelerate.tracking import WandBTracker

    tracker = WandBTracker(
        run_name=config.tracking.project,  # accelerate hands it to wandb as the project
        name=run_dir.path.resolve().name,
        dir=str(run_dir.path),
        id=_wandb_run_id(run_dir),
        resume="allow",
        settings=wandb.Settings(console="off"),  # the progress bar's redraws would fill its log
    )
    try:
        tracker.start()
    except wandb.errors.Error as error:
        raise UserError(
            "tracking.to",
            f"wandb cannot start: {error}",
            fix="run `wandb login`, or set the environment variable WANDB_MODE=offline",
        ) from error
    tracker.store_init_configuration(config.model_dump(mode="json"))
    return tracker


def _wandb_run_id(run_dir: RunDir) -> str:
    """The run's id at Weights & Biases, kept in the run dir so that a resumed run continues the same curves."""
    path = run_dir.path / "wandb" / "run_id"
    if not path.exists():
        write_atomically(path, uuid.uuid4().hex[:16])
    return path.read_text(encoding="utf-8").strip()
