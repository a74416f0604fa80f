"""What the processes of a run print, from all their files, now and as it comes. Imports no torch.

A rank has up to three files: ``logs/rank_N.log`` (what packtrain logs, with times, over all starts), what the task
prints under the submission's ``script/`` (rank 0's has the batch shell's lines too), and ``logs/rank_N.out`` where the
run is local. Most lines are in two of them and are shown once.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from slurm.history import ATTEMPTS, read_job
from slurm.jobs import ask as ask_slurm
from slurm.status import RunStatus, read_run
from trainer.checkpoint.layout import RunDir

TAIL_BYTES = 1 << 20  # of a file, that its last lines are taken from
POLL_SECONDS = 0.25
SCAN_SECONDS = 2.0  # between looks for new files
SHORTEST_WAIT, LONGEST_WAIT = 2, 15  # seconds between questions to SLURM
MOST_REMEMBERED = 10_000  # lines of a rank
OVER = {"done", "failed", "cancelled", "lost", "stopped"}
LOGGED = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ [\w.]+: (.*)")  # as trainer/record.py writes


def find_logs(run_dir: Path) -> dict[int, list[Path]]:
    """The files of each rank, of all starts of the newest submission, and what earlier ones left in ``logs/``."""
    found: dict[int, list[Path]] = {}
    places = [(RunDir(run_dir).logs, r"rank_(\d+)\.(?:log|out)")]
    job = read_job(run_dir)
    if "job_id" in job:
        places.append((Path(job["submission"]) / "script", rf"{re.escape(str(job['job_id']))}_(\d+)_log\.(?:out|err)"))
    for folder, pattern in places:
        with contextlib.suppress(OSError):
            for name in sorted(os.listdir(folder)):
                if match := re.fullmatch(pattern, name):
                    found.setdefault(int(match[1]), []).append(folder / name)
    return dict(sorted(found.items()))


@dataclass
class Tail:
    """Reads one file from where it was left, also when it is replaced, or cut off and written anew."""

    path: Path
    _position: int = 0
    _inode: int = -1
    _rest: bytes = b""

    def last_lines(self) -> list[str]:
        """The file's end; `new_lines` goes on from there."""
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                self._inode = status.st_ino
                start = max(0, status.st_size - TAIL_BYTES)
                file.seek(start)
                if start:
                    file.readline()
                content = file.read()
                self._position = file.tell()
        except OSError:
            return []
        return self._split(content)

    def new_lines(self, to_the_end: bool = False) -> list[str]:
        """Whole lines since the last call; `to_the_end`: half a line too."""
        content = b""
        with contextlib.suppress(OSError):
            status = os.stat(self.path)
            if status.st_ino != self._inode or status.st_size < self._position:
                self._position, self._inode, self._rest = 0, status.st_ino, b""
            if status.st_size > self._position:
                with open(self.path, "rb") as file:
                    file.seek(self._position)
                    content = file.read()
                    self._position = file.tell()
        lines = self._split(content)
        if to_the_end and self._rest:
            lines.append(self._rest.decode(errors="replace"))
            self._rest = b""
        return lines

    def _split(self, content: bytes) -> list[str]:
        *whole, self._rest = (self._rest + content).split(b"\n")
        return [line.decode(errors="replace").rstrip("\r") for line in whole]


@dataclass
class RankLog:
    """All that one rank prints."""

    tails: dict[Path, Tail] = field(default_factory=dict)
    _shown: tuple[Counter[str], Counter[str]] = field(default_factory=lambda: (Counter(), Counter()))

    def add(self, path: Path) -> None:
        """A file that is there now; one that came later than the first look is read from its beginning."""
        self.tails.setdefault(path, Tail(path))

    def last_lines(self, number: int) -> list[tuple[Path, str]]:
        """Of each file the last lines, each with its file; the file that was written last at the end."""
        found = {
            path: list(self._once(path, self.tails[path].last_lines())) for path in sorted(self.tails, key=_is_output)
        }
        return [(path, line) for path in sorted(found, key=_written) for line in found[path][-number:] if number]

    def new_lines(self, to_the_end: bool = False) -> Iterator[tuple[Path, str]]:
        """What came since, each line with its file."""
        for path in sorted(self.tails, key=_is_output):
            for line in self._once(path, self.tails[path].new_lines(to_the_end)):
                yield path, line

    def _once(self, path: Path, lines: Sequence[str]) -> Iterator[str]:
        """Leaves out what another file has said, with or without the time before it, and whichever came first."""
        own, other = self._shown if _is_output(path) else self._shown[::-1]
        for line in lines:
            match = LOGGED.fullmatch(line)
            said = match[1] if match else line
            if said in other:
                other[said] -= 1
                if not other[said]:
                    del other[said]
                continue
            if len(own) > MOST_REMEMBERED:
                own.clear()
            own[said] += 1
            yield line


class Watcher(threading.Thread):
    """Asks after the run's state now and then, on the side: slurmctld may take its time, the lines do not wait.

    Attributes:
        status: the newest answer; None before the first.
    """

    def __init__(self, run_dir: Path) -> None:
        super().__init__(daemon=True)
        self.run_dir = run_dir
        self.status: RunStatus | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while True:
                said = self._said()
                self.status = ask(self.run_dir)
                self._wait(said)
        except BaseException as error:
            self.error = error

    def _wait(self, said: tuple[float, ...]) -> None:
        """Less long where the run says something new, or that it is over."""
        is_over = RunDir(self.run_dir).read_state().get("state") in OVER
        for second in range(LONGEST_WAIT):
            time.sleep(1.0)
            if second + 1 >= SHORTEST_WAIT and (is_over or self._said() != said):
                return

    def _said(self) -> tuple[float, ...]:
        return tuple(_written(self.run_dir / name) for name in (RunDir(self.run_dir).state.name, ATTEMPTS))


def ask(run_dir: Path) -> RunStatus:
    """The run's status as of now."""
    return read_run(run_dir, ask_slurm([run_dir]), time.time())


def is_over(status: RunStatus) -> bool:
    """Whether nothing more will come."""
    return status.state in OVER and not (status.job and status.job.is_alive)


def follow(
    run_dir: Path,
    logs: dict[int, RankLog],
    wanted: Callable[[int], bool],
    show: Callable[[int, Path, str], None],
    tell: Callable[[RunStatus], None],
) -> RunStatus:
    """Shows lines as they come, over restarts, until the run is over.

    Args:
        logs: of the ranks that are known; more are added as their files appear.
        wanted: whether a rank is shown.
        show: takes a rank, a file of it and a line.
        tell: takes the status each time that it has changed.
    """
    watcher = Watcher(run_dir)
    watcher.start()
    told: tuple[str, str] | None = None
    scanned = 0.0
    while True:
        status = watcher.status  # before the files are read: what is over has written all
        if time.monotonic() - scanned > SCAN_SECONDS or (status and is_over(status)):
            scanned = time.monotonic()
            for rank, paths in find_logs(run_dir).items():
                for path in paths if wanted(rank) else []:
                    logs.setdefault(rank, RankLog()).add(path)
        ends = status is not None and is_over(status)
        for rank, log in sorted(logs.items()):
            for path, line in log.new_lines(to_the_end=ends):
                show(rank, path, line)
        if watcher.error:
            raise watcher.error
        if status and (status.state, status.job.state if status.job else "") != told:
            told = (status.state, status.job.state if status.job else "")
            tell(status)
        if status and ends:
            return status
        time.sleep(POLL_SECONDS)


def _is_output(path: Path) -> bool:
    """What a task prints, against what packtrain logs."""
    return path.suffix != ".log"


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
