"""`packtrain doctor`: what of this host, its environment and its cluster works, and the fix for what does not."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.tables import as_texts, new_console, new_table
from trainer.errors import EXIT_FAILURE

if TYPE_CHECKING:
    from launch.checks import Check
    from slurm.cluster import ClusterFacts

SHOWN_AS = {
    "ok": ("ok", "green"),
    "warning": ("warn", "yellow"),
    "failed": ("FAIL", "bold red"),
    "not here": ("-", "dim"),
}
MOST_FEATURES = 6  # of a partition that are listed


def doctor(*, cluster: Path | None = None, json: bool = False) -> None:
    """Check this host, its environment and its SLURM cluster; say how to mend what fails.

    What a host may lack, such as a GPU on a login node or a cluster for a workstation, is no failure. Exit status 1:
    something failed; 0: nothing did, whatever warnings there are.

    Args:
        cluster: a cluster's profile, to be checked too; default: as for submit.
        json: print one JSON document instead.
    """
    from launch.checks import check_code, check_git, check_optional, check_python, check_versions, run_checks
    from launch.host_checks import (
        check_disks,
        check_gpus,
        check_hub,
        check_libraries,
        check_shm,
        read_driver,
        start_probes,
    )

    with _spinner():
        probes = start_probes()
        environment = run_checks([check_python, check_code, check_git, check_versions, check_optional])
        on_cluster, facts = _look_at_cluster(cluster)
        driver = read_driver()
        host = run_checks([partial(check_gpus, driver), check_shm, check_disks, check_hub])
        environment += run_checks([partial(check_libraries, probes, driver)])
    sections = {"environment": environment, "this host": host, "cluster": on_cluster}
    has_failed = any(check.status == "failed" for checks in sections.values() for check in checks)
    if json:
        _print_json(sections, facts, has_failed)
    else:
        _print(sections, facts)
    if has_failed:
        sys.exit(EXIT_FAILURE)


def _look_at_cluster(profile: Path | None) -> tuple[list[Check], ClusterFacts | None]:
    from launch.checks import Check, run_checks

    try:
        from launch.cluster_checks import ClusterChecks
        from slurm.cluster import find_profile
    except ImportError as error:  # of another package called slurm, or trainer
        return [Check("SLURM", "failed", f"cannot be looked at: {error}", "see code, above")], None
    cluster = ClusterChecks(find_profile(profile))
    checks = [
        cluster.check_commands,
        cluster.check_profile,
        cluster.check_partition,
        cluster.check_submit,
        cluster.check_accounting,
        cluster.check_requeue,
        cluster.check_preemption,
    ]
    return run_checks(checks), cluster.facts


def _print_json(sections: dict[str, list[Check]], facts: ClusterFacts | None, has_failed: bool) -> None:
    checks = [{"section": name, **asdict(check)} for name, checks in sections.items() for check in checks]
    partitions: list[dict[str, Any]] = []
    for partition in facts.partitions.values() if facts else ():
        record = asdict(partition)
        partitions.append(record | {name: sorted(record[name]) for name in ("gpu_types", "features")})
    print(json.dumps({"ok": not has_failed, "checks": checks, "partitions": partitions}, indent=1))


def _print(sections: dict[str, list[Check]], facts: ClusterFacts | None) -> None:
    from rich.text import Text

    console = new_console()
    width = max(len(check.name) for checks in sections.values() for check in checks)
    for name, checks in sections.items():
        console.print(Text(name, "bold"))
        table = new_table(has_header=False)
        table.add_column(width=4, no_wrap=True)
        table.add_column(width=width, overflow="fold")
        table.add_column(overflow="fold")
        for check in checks:
            mark, style = SHOWN_AS[check.status]
            found = Text(check.found, "dim" if check.status == "not here" else "")
            if check.fix:
                found.append(f"\nfix: {check.fix}", style)
            table.add_row(Text(mark, style), Text(check.name), found)
        console.print(table)
        console.print()
    if facts and facts.partitions:
        _print_partitions(facts)
    _print_summary([check for checks in sections.values() for check in checks])


def _print_partitions(facts: ClusterFacts) -> None:
    from slurm.status import duration

    table = new_table("partition", "state", "limit", "nodes", "GPUs a node", "CPUs", "GiB", "features")
    for column in table.columns[3:7]:
        column.justify = "right"
    for partition in facts.partitions.values():
        kinds = f" {','.join(sorted(partition.gpu_types))}" if partition.gpu_types else ""
        features = sorted(partition.features)
        row = [
            partition.name + "*" * partition.is_default,
            "up" if partition.is_up else "down",
            "none" if partition.max_minutes is None else duration(60 * partition.max_minutes),
            str(partition.num_nodes),
            f"{partition.gpus_per_node}{kinds}",
            str(partition.cpus_per_node),
            f"{partition.memory_mib / 1024:.0f}",
            ",".join(features[:MOST_FEATURES]) + (" ..." if len(features) > MOST_FEATURES else ""),
        ]
        table.add_row(*as_texts(row))
    console = new_console()
    console.print(table)
    console.print()


def _print_summary(checks: Sequence[Check]) -> None:
    counts = {status: sum(check.status == status for check in checks) for status in ("failed", "warning")}
    if not any(counts.values()):
        print("all is well")
        return
    warnings = f"{counts['warning']} warning{'s' * (counts['warning'] != 1)}"
    print(f"{counts['failed']} failed, {warnings}" if counts["failed"] else warnings)


@contextlib.contextmanager
def _spinner() -> Iterator[None]:
    """On a terminal shows that something is going on: importing torch takes seconds."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status("looking at this host ..."):
        yield
