"""`packtrain logs`: what a run prints."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from trainer.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from slurm.status import RunStatus

ALL = "all"


def logs(
    run_dir: Path,
    *,
    follow: Annotated[bool, Parameter(name=["--follow", "-f"], negative=())] = False,
    rank: str = "0",
    lines: Annotated[int, Parameter(validator=Number(gte=0))] = 40,
) -> None:
    """Show the last lines of a run: what rank 0 logs, and what its job prints; and where jobs that follow it log.

    Lines of a rank that has several files have a heading where a file begins; of several ranks each line has its rank's
    number before it.

    Args:
        run_dir: folder of a run, submitted or not.
        follow: go on with lines as they come, across restarts, until the run is over.
        rank: whose lines: a number, or all.
        lines: how many of the last lines to show, of each file.
    """
    from slurm.history import check_run
    from slurm.logs import RankLog, ask, find_logs, is_over
    from slurm.logs import follow as follow_logs

    check_run(run_dir)
    found = find_logs(run_dir)
    status = None if follow else ask(run_dir)
    _check_rank(run_dir, rank, list(found), follow)
    width = len(str(max(found, default=0)))
    current: dict[int, Path] = {}  # of each rank the file whose lines are being shown

    def wanted(number: int) -> bool:
        return rank in (ALL, str(number))

    def show(number: int, path: Path, line: str) -> None:
        if path != current.get(number) and (number in current or number in several):
            print("\n" * bool(current) + f"==> {path} <==")
        current[number] = path
        print(f"[{number:>{width}}] {line}" if rank == ALL else line, flush=follow)

    ranks = {number: RankLog() for number in found if wanted(number)}
    for number, log in ranks.items():
        for path in found[number]:
            log.add(path)
    last = [(number, path, line) for number, log in ranks.items() for path, line in log.last_lines(lines)]
    files = Counter(number for number, _ in {(number, path) for number, path, _ in last})
    several = {number for number, count in files.items() if count > 1}
    for number, path, line in last:
        show(number, path, line)
    if status is None:
        status = follow_logs(run_dir, ranks, wanted, show, _tell)
    elif not is_over(status) or not ranks:
        _tell(status)
    for follower in status.then:
        print(f"-- then {follower.command}: {follower.text}", file=sys.stderr)


def _check_rank(run_dir: Path, rank: str, known: Sequence[int], follow: bool) -> None:
    from slurm.history import read_job

    if rank == ALL:
        return
    if not rank.isdecimal():
        raise UserError("--rank", repr(rank), f"a number from 0, or {ALL}")
    job = read_job(run_dir)
    world_size = int(job.get("nodes", 0)) * int(job.get("tasks_per_node", 0))
    if int(rank) in known or (follow and int(rank) < world_size):
        return
    if known or int(rank) >= max(1, world_size):
        ranks = _spans(known) if known else f"0 to {max(1, world_size) - 1}"
        raise UserError("--rank", f"{rank} has no log in {run_dir}", f"{ranks}, or {ALL}")


def _spans(numbers: Sequence[int]) -> str:
    """0 to 3, 6"""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    return ", ".join(" to ".join(map(str, span)) for span in spans)


def _tell(status: RunStatus) -> None:
    """Where the run stands, beside its lines."""
    detail = "".join(f": {text}" for text in (status.detail, status.trouble) if text)
    job = f" (job {status.job.job_id})" if status.job else ""
    print(f"-- {status.run_dir} is {status.state}{job}{detail}", file=sys.stderr, flush=True)
