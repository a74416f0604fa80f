"""Facts of a SLURM cluster, as its commands tell them: partitions, nodes, times. Imports no torch.

Output is asked for in columns of our choice, which SLURM has kept alike since 14.x; its JSON changes with each version
and is not built in everywhere.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import PacktrainError, UserError

SECONDS_TO_ANSWER = 10.0  # slurmctld answers in milliseconds; a client waits minutes for one that is down
# Settings of the user's own that filter or reshape what these commands print.
RESHAPING = re.compile(r"(SQUEUE|SINFO|SACCT|SCONTROL)_\w+|SLURM_TIME_FORMAT")
SEPARATOR = "|"  # in no name that SLURM allows
SECONDS_A_DAY, SECONDS_AN_HOUR, SECONDS_A_MINUTE = 86400, 3600, 60


class SlurmError(PacktrainError):
    """A SLURM command failed or did not answer.

    Attributes:
        command: its words.
        status: its exit status; None when it did not answer in time.
        stderr: what it said.
    """

    def __init__(self, command: Sequence[str], status: int | None, stderr: str) -> None:
        self.command, self.status, self.stderr = tuple(command), status, stderr.strip()
        how = "did not answer" if status is None else f"ended with status {status}"
        super().__init__(f"{command[0]} {how}: {self.stderr or 'it said nothing'}")


class SlurmMissing(UserError):
    """A SLURM command is not on PATH."""

    def __init__(self, command: str) -> None:
        super().__init__(
            command,
            "no such command: SLURM is not on this host, or not on PATH",
            fix="run this on a login node of the cluster, after `module load slurm` where SLURM is a module",
        )


@dataclass(frozen=True)
class Partition:
    """A partition; of nodes that differ, the most that one of them has.

    Attributes:
        is_up: jobs may start in it.
        max_minutes: longest job; None: without limit.
        gpu_types: as in ``--gres=gpu:a100:4``; empty where the cluster gives its GPUs no type.
        features: of any of its nodes, for ``--constraint``.
    """

    name: str
    is_default: bool
    is_up: bool
    max_minutes: int | None
    num_nodes: int
    gpus_per_node: int
    gpu_types: frozenset[str]
    cpus_per_node: int
    memory_mib: int
    features: frozenset[str]


@dataclass(frozen=True)
class ClusterFacts:
    """Partitions by name, in the order SLURM lists them, and the names of all their nodes."""

    partitions: dict[str, Partition]
    nodes: list[str]

    @property
    def default(self) -> Partition | None:
        """Where a job goes that names no partition."""
        return next((partition for partition in self.partitions.values() if partition.is_default), None)


def run_slurm(*argv: str, timeout: float = SECONDS_TO_ANSWER, environ: Mapping[str, str] | None = None) -> str:
    """What a SLURM command prints.

    Args:
        argv: the command's words, such as ``"sinfo", "-h"``.
        timeout: seconds.
        environ: variables laid over the process's own, from which those that reshape output are taken away.

    Raises:
        SlurmMissing: (a UserError) the command is not there.
        SlurmError: it failed, or did not answer in time.
    """
    kept = {name: value for name, value in os.environ.items() if not RESHAPING.fullmatch(name)}
    try:
        result = subprocess.run(
            argv,
            env={**kept, "LC_ALL": "C", **(environ or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
        )
    except (FileNotFoundError, PermissionError) as error:
        raise SlurmMissing(argv[0]) from error
    except OSError as error:  # a stub of a package for another machine, a file that is no program
        raise SlurmError(argv, 126, str(error)) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(argv, None, f"nothing within {timeout:g} s; is slurmctld up?") from error
    if result.returncode:
        raise SlurmError(argv, result.returncode, result.stderr or result.stdout)
    return result.stdout


def find_profile(given: Path | None) -> Path | None:
    """The cluster's profile: the one that was given, else ``~/.config/packtrain/cluster.yaml`` where that exists."""
    own = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "packtrain" / "cluster.yaml"
    return given or (own if own.exists() else None)


def read_cluster() -> ClusterFacts:
    """Asks ``sinfo``, once.

    Raises:
        SlurmMissing, SlurmError: see `run_slurm`.
    """
    # --all: hidden partitions too, as a job may be sent there. --exact: 8 CPUs here and 16 there are not "8+".
    columns = SEPARATOR.join(["%R", "%P", "%a", "%l", "%G", "%c", "%m", "%f", "%N"])
    return parse_cluster(run_slurm("sinfo", "--noheader", "--all", "--exact", "-o", columns))


def parse_cluster(text: str) -> ClusterFacts:
    """`read_cluster` of what sinfo printed: name, marked name, availability, limit, gres, CPUs, MiB, features, nodes.

    A partition has a line for each kind of node in it; one without nodes has a line too.
    """
    lines: dict[str, list[list[str]]] = {}
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(SEPARATOR)]
        if len(fields) == 9 and fields[0]:  # else a heading of several clusters
            lines.setdefault(fields[0], []).append(fields)
    partitions, every_node = {}, dict[str, None]()
    for name, rows in lines.items():
        _, marked, availability, limit, *_ = rows[0]
        nodes = {node: None for row in rows for node in expand_hosts(row[8])}
        every_node |= nodes
        gpus = [parse_gpus(row[4]) for row in rows]
        partitions[name] = Partition(
            name=name,
            is_default=marked.endswith("*"),
            is_up=availability == "up",
            max_minutes=parse_limit(limit),
            num_nodes=len(nodes),
            gpus_per_node=max(sum(found.values()) for found in gpus),
            gpu_types=frozenset(kind for found in gpus for kind in found if kind),
            cpus_per_node=max(_leading_number(row[5]) for row in rows),
            memory_mib=max(_leading_number(row[6]) for row in rows),
            features=frozenset(feature for row in rows for feature in _split_list(row[7])),
        )
    return ClusterFacts(partitions, list(every_node))


def read_config() -> dict[str, str]:
    """``scontrol show config`` as it is, by name; values may be ``(null)``.

    Raises:
        SlurmMissing, SlurmError: see `run_slurm`.
    """
    return parse_config(run_slurm("scontrol", "show", "config"))


def cluster_name() -> str:
    """Of the cluster that SLURM's commands on this host speak of; empty where scontrol does not tell."""
    try:
        return read_config().get("ClusterName", "")
    except PacktrainError:
        return ""


def parse_config(text: str) -> dict[str, str]:
    """The lines ``Name = value``, by name."""
    found = (re.match(r"\s*([\w\[\]]+)\s*= ?(.*)", line) for line in text.splitlines())
    return {match[1]: match[2].strip() for match in found if match}


def parse_gpus(gres: str) -> dict[str, int]:
    """GPUs by type in a node's generic resources: ``gpu:a100:8(S:0-1),nvme:1`` is ``{"a100": 8}``; no type is ""."""
    found: dict[str, int] = {}
    for entry in re.split(r",(?![^(]*\))", gres):
        name, *rest = re.sub(r"\([^)]*\)", "", entry).strip().split(":")
        if name != "gpu":
            continue
        rest = [word for word in rest if word != "no_consume"]
        count = int(rest.pop()) if rest and rest[-1].isdecimal() else 1
        kind = rest[0] if rest else ""
        found[kind] = found.get(kind, 0) + count
    return found


def expand_hosts(text: str) -> list[str]:
    """``n[01-03,7],gpu05`` as its names, in order, as ``scontrol show hostnames`` does. Needs no SLURM."""
    if text in ("", "(null)", "None assigned", "n/a"):
        return []
    names: list[str] = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        parts = re.split(r"\[([^\]]*)\]", item)  # fixed text and ranges by turns
        choices = [_expand_ranges(part) if index % 2 else [part] for index, part in enumerate(parts)]
        names += ["".join(chosen) for chosen in itertools.product(*choices)]
    return names


def parse_limit(text: str) -> int | None:
    """A limit in minutes as SLURM prints it; None: there is none, or none that can be read."""
    seconds = parse_duration(text)
    return None if seconds is None else -(-seconds // SECONDS_A_MINUTE)


def parse_duration(text: str) -> int | None:
    """Seconds of one of SLURM's time forms; None for what is no time, ``UNLIMITED`` among it.

    A number alone counts minutes, two with a colon minutes and seconds, unless days stand before them.
    """
    found = re.fullmatch(r"(?:([0-9]{1,8})-)?([0-9]{1,8})(?::([0-9]{1,8}))?(?::([0-9]{1,8}))?", text.strip())
    if not found:
        return None
    days, *rest = found.groups()
    numbers = [int(number) for number in rest if number is not None]
    if days is not None or len(numbers) == 3:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    else:
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    return int(days or 0) * SECONDS_A_DAY + hours * SECONDS_AN_HOUR + minutes * SECONDS_A_MINUTE + seconds


def _expand_ranges(text: str) -> list[str]:
    """``01-03,7`` as 01, 02, 03, 7: as many digits as the first number of a range has."""
    names = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.isdecimal() and last.isdecimal():
            names += [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
        else:
            names.append(part)
    return names


def _split_list(text: str) -> list[str]:
    return [] if text == "(null)" else [word for word in text.split(",") if word]


def _leading_number(text: str) -> int:
    """8 of ``8`` and of ``8+``, 0 of ``n/a``."""
    found = re.match(r"[0-9]+", text)
    return int(found[0]) if found else 0
