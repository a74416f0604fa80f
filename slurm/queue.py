"""What SLURM says of jobs: squeue first, sacct for those it has forgotten, scontrol where squeue fails.

Asking never fails: who watches a run wants to see what its folder tells also while slurmctld is down.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from slurm.cluster import SlurmError, SlurmMissing, expand_hosts, parse_duration, parse_limit, run_slurm
from trainer.errors import PacktrainError

UNKNOWN = "UNKNOWN"
WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
ENDED = {
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY"),
    *("DEADLINE", "REVOKED", "LAUNCH_FAILED", "RECONFIG_FAIL"),
}
# Field and width, as widths are what every version takes; a fixed width cuts off, and no text here is longer.
COLUMNS = {
    "JobArrayID": 40,
    "State": 20,
    "Reason": 200,
    "NodeList": 2000,
    "TimeUsed": 20,
    "StartTime": 24,
    "TimeLimit": 20,
    "RestartCnt": 12,
}
SACCT_COLUMNS = "JobID,State,NodeList,ElapsedRaw,Start,Timelimit"
# Times as seconds since 1970, whatever the time zones; lists of an array's tasks not cut short.
PLAINLY = {"SLURM_TIME_FORMAT": "%s", "SLURM_BITSTR_LEN": "0"}
JOB_ID = re.compile(r"(\d+)(?:_(\d+))?")
NO_TEXT = {"", "None", "(null)", "None assigned", "N/A"}


@dataclass(frozen=True)
class JobState:
    """A job as SLURM sees it.

    Attributes:
        job_id: such as ``12``, or ``12_3`` in an array.
        state: SLURM's word, such as PENDING, RUNNING, NODE_FAIL; UNKNOWN where nobody could be asked or knows it.
        reason: why it waits; of an unknown one, why it is unknown.
        nodes: as SLURM lists them, ``n[1-2]``; empty before it has any.
        elapsed: seconds since it was last started.
        start: when it was last started, or is expected to be; seconds since 1970.
        time_limit: minutes; None: without limit, or not known.
        restarts: how often it was queued again; None: not known.
        answered: slurmctld or the database was asked and answered, so an unknown job is gone.
    """

    job_id: str
    state: str = UNKNOWN
    reason: str = ""
    nodes: str = ""
    elapsed: int = 0
    start: float | None = None
    time_limit: int | None = None
    restarts: int | None = None
    answered: bool = True

    @property
    def text(self) -> str:
        """For people: SLURM's word, or in brackets why there is none."""
        if self.state != UNKNOWN:
            return self.state
        return f"({self.reason})" if self.answered else "(unknown)"

    @property
    def is_waiting(self) -> bool:
        return self.state in WAITING

    @property
    def is_alive(self) -> bool:
        """SLURM has it, waiting or running."""
        return self.state != UNKNOWN and self.state not in ENDED

    @property
    def is_gone(self) -> bool:
        """It has ended for good, also where SLURM has forgotten how."""
        return self.state in ENDED or (self.state == UNKNOWN and self.answered)


def job_states(job_ids: Iterable[str]) -> dict[str, JobState]:
    """Asks SLURM for all jobs at once. Never raises for what SLURM cannot tell."""
    asked = list(dict.fromkeys(job_ids))
    open_ids = [job_id for job_id in asked if JOB_ID.fullmatch(job_id)]
    found: dict[str, JobState] = {}
    troubles: list[str] = []
    in_queue = try_scontrol = False
    if open_ids:
        try:
            found = _choose(open_ids, _ask_squeue(open_ids))
            in_queue = True
        except PacktrainError as error:
            troubles.append(_first_line(error))
            try_scontrol = not (isinstance(error, SlurmError) and _is_unreachable(error))
    if missing := [job_id for job_id in open_ids if job_id not in found]:
        found |= _ask_sacct(missing, in_queue, troubles)
    if try_scontrol:  # squeue is missing or broken; what it knows, scontrol knows too
        found |= _ask_scontrol([job_id for job_id in open_ids if job_id not in found])
    reason = "SLURM does not know it any more" if in_queue else "; ".join(troubles)
    return {
        job_id: found.get(job_id)
        or JobState(job_id, reason=reason if job_id in open_ids else "no job id", answered=in_queue)
        for job_id in asked
    }


def parse_squeue(text: str) -> list[JobState]:
    """squeue's lines in the widths of `COLUMNS`."""
    states = []
    for line in text.splitlines():
        if len(line.rstrip()) <= COLUMNS["JobArrayID"]:  # a heading of several clusters
            continue
        fields, position = [], 0
        for width in COLUMNS.values():
            fields.append(line[position : position + width].strip())
            position += width
        job_id, state, reason, nodes, used, start, limit, restarts = fields
        states.append(
            JobState(
                job_id,
                _state_word(state),
                _text(reason),
                _text(nodes),
                parse_duration(used) or 0,
                _time(start),
                parse_limit(limit),
                int(restarts) if restarts.isdecimal() else None,
            )
        )
    return states


def parse_sacct(text: str) -> list[JobState]:
    """sacct's lines of `SACCT_COLUMNS`; the last one of a job that was queued again is its newest."""
    states: dict[str, JobState] = {}
    for line in text.splitlines():
        fields = line.split("|")
        if len(fields) != 6:
            continue
        job_id, state, nodes, elapsed, start, limit = fields
        seconds = int(elapsed) if elapsed.isdecimal() else 0
        states[job_id] = JobState(
            job_id, _state_word(state), "", _text(nodes), seconds, _time(start), parse_limit(limit)
        )
    return list(states.values())


def parse_scontrol(text: str) -> list[JobState]:
    """Lines of ``scontrol show job --oneliner``."""
    states = []
    for line in text.splitlines():
        fields = dict(re.findall(r"(?:^|\s)([A-Z]\w*)=(\S*)", line))
        if "JobId" not in fields:
            continue
        array, task = fields.get("ArrayJobId"), fields.get("ArrayTaskId", "")
        job_id = fields["JobId"] if array is None else f"{array}_{task if task.isdecimal() else f'[{task}]'}"
        restarts = fields.get("Restarts", "")
        states.append(
            JobState(
                job_id,
                _state_word(fields.get("JobState", "")),
                _text(fields.get("Reason", "")),
                _text(fields.get("NodeList", "")),
                parse_duration(fields.get("RunTime", "")) or 0,
                _time(fields.get("StartTime", "")),
                parse_limit(fields.get("TimeLimit", "")),
                int(restarts) if restarts.isdecimal() else None,
            )
        )
    return states


def _ask_squeue(job_ids: Sequence[str]) -> list[JobState]:
    columns = ",".join(f"{name}:{width}" for name, width in COLUMNS.items())
    command = ["squeue", "--noheader", "--array", "--all", "--states=all", f"--jobs={','.join(job_ids)}"]
    try:
        return parse_squeue(run_slurm(*command, f"--Format={columns}", environ=PLAINLY))
    except SlurmError as error:
        if "Invalid job id specified" in error.stderr:  # so it says of a single one that has been forgotten
            return []
        raise


def _ask_sacct(job_ids: Sequence[str], in_queue: bool, troubles: list[str]) -> dict[str, JobState]:
    """For jobs that squeue did not tell of; what goes wrong is added to `troubles`."""
    command = ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(job_ids)}"]
    try:
        found = _choose(job_ids, parse_sacct(run_slurm(*command, f"--format={SACCT_COLUMNS}", environ=PLAINLY)))
    except PacktrainError as error:
        troubles.append(_first_line(error))
        return {}
    # The database may have missed the end of a job; slurmctld, where it answered, knows all that wait or run.
    return {job_id: state for job_id, state in found.items() if not (in_queue and state.is_alive)}


def _ask_scontrol(job_ids: Sequence[str]) -> dict[str, JobState]:
    """Takes one id at a time."""
    found: dict[str, JobState] = {}
    for job_id in job_ids:
        try:
            shown = run_slurm("scontrol", "show", "job", "--oneliner", job_id, environ=PLAINLY)
        except SlurmMissing:
            break
        except SlurmError as error:
            if _is_unreachable(error):  # it would take as long for each
                break
            continue
        found |= _choose([job_id], parse_scontrol(shown))
    return found


def _is_unreachable(error: SlurmError) -> bool:
    return error.status is None or "contact slurm controller" in error.stderr


def _choose(job_ids: Iterable[str], states: Sequence[JobState]) -> dict[str, JobState]:
    """The state of each id; of an array as a whole, that of a task that is alive, if any."""
    found: dict[str, JobState] = {}
    for job_id in job_ids:
        matching = [state for state in states if _covers(state.job_id, job_id)]
        if matching:
            best = max(enumerate(matching), key=lambda item: (item[1].is_alive, item[0]))[1]
            found[job_id] = JobState(**{**best.__dict__, "job_id": job_id})
    return found


def _covers(printed: str, asked: str) -> bool:
    """``12_[0-3,7%2]`` covers ``12_1``, and any of ``12_1`` and ``12_[0-3]`` is of ``12``."""
    base, _, tasks = printed.partition("_")
    asked_base, _, asked_task = asked.partition("_")
    if base != asked_base:
        return False
    if not asked_task or printed == asked:
        return True
    return asked_task in expand_hosts(re.sub(r"%\d+", "", tasks)) if tasks.startswith("[") else False


def _state_word(text: str) -> str:
    """``CANCELLED`` of ``CANCELLED by 1000`` and of sacct's ``CANCELLED+``."""
    found = re.match(r"[A-Z_]+", text)
    return found[0] if found else UNKNOWN


def _text(text: str) -> str:
    return "" if text in NO_TEXT else text


def _time(text: str) -> float | None:
    """Seconds since 1970, also of local time where the command did not take our format."""
    if text.isdecimal():
        return float(text)
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def _first_line(error: PacktrainError) -> str:
    return f"no {error.where} on this host" if isinstance(error, SlurmMissing) else str(error).splitlines()[0]
