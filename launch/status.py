"""`packtrain status`: where submitted runs stand."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.tables import as_texts, new_console, new_table

if TYPE_CHECKING:
    from rich.console import Console

    from slurm.status import RunStatus, SweepStatus

ROOT = Path("runs")
NARROW = 120  # columns; below, the nodes get no column of their own
MOST_DETAILS = 5  # of runs of one state, below a table
STATE_STYLE = {
    "running": "green",
    "done": "bold green",
    "failed": "bold red",
    "lost": "bold red",
    "cancelled": "yellow",
    "cancelling": "yellow",
    "requeued": "cyan",
    "waiting": "cyan",
    "starting": "cyan",
    "stopping": "cyan",
}
ATTENTION = "yellow"


def status(*run_dirs: Path, json: bool = False) -> None:
    """Show where runs stand: state, step, loss, speed, time left, restarts, nodes and GPU-hours.

    One run is shown with all its starts, a sweep as the table of its results, the lowest validation loss first.

    Args:
        run_dirs: folders of runs or sweeps, or folders that hold such; default: what was submitted below runs/.
        json: print one JSON document instead.
    """
    from slurm.status import SweepStatus, read_statuses

    folders = _find(run_dirs)
    found = read_statuses(folders)
    if json:
        _print_json(found)
    elif not found:
        print(f"nothing submitted in {ROOT.absolute()} or below: packtrain submit queues a run")
        print("packtrain status FOLDER looks elsewhere; of a run that was not submitted, name its own folder")
    elif len(found) > 1 or len(folders) != len(run_dirs):
        _print_overview(found)
    elif isinstance(found[0], SweepStatus):
        _print_sweep(found[0])
    else:
        _print_run(found[0])


def _find(given: Sequence[Path]) -> list[Path]:
    from slurm.history import find_submitted, is_run, read_sweep
    from trainer.errors import UserError

    if not given:
        return find_submitted(ROOT)
    folders: list[Path] = []
    for path in given:
        if is_run(path) or read_sweep(path):
            folders.append(path)
        elif below := find_submitted(path):
            folders += below
        else:
            found = "no run's folder, and nothing below was submitted" if path.is_dir() else "no such folder"
            raise UserError("RUN_DIR", f"{path.absolute()}: {found}", "the folder of a run or a sweep, or one above it")
    return list(dict.fromkeys(folders))


# One document for programs


def _print_json(found: Sequence[RunStatus | SweepStatus]) -> None:
    from slurm.status import SweepStatus

    runs = [_run_record(one) for one in found if not isinstance(one, SweepStatus)]
    sweeps = [_sweep_record(one) for one in found if isinstance(one, SweepStatus)]
    print(json.dumps({"runs": runs, "sweeps": sweeps}, indent=1))


def _run_record(run: RunStatus) -> dict[str, Any]:
    progress = run.progress
    return {
        "run_dir": str(run.run_dir),
        "state": run.state,
        "detail": run.detail,
        "step": run.step,
        "total_steps": progress.total_steps,
        "saved_step": run.saved_step,
        "loss": progress.loss,
        "validation_loss": progress.validation_loss,
        "best_validation_loss": progress.best_validation_loss,
        "tokens_per_second": progress.tokens_per_second,
        "eta_seconds": run.eta_seconds,
        "restarts": run.history.restarts,
        "max_restarts": run.submission.get("max_restarts"),
        "nodes": run.nodes,
        "gpu_hours": round(run.gpu_hours, 4),
        "job": vars(run.job) if run.job else None,
        "then": [{"command": f.command, "log": f.log, "job": vars(f.job)} for f in run.then],
        "attempts": [vars(attempt) for attempt in run.history.attempts],
        "blamed": run.blamed,
        "excluded": run.excluded,
        "submission": dict(run.submission),
        "recorded": dict(run.record),
        "warnings": run.warnings,
    }


def _sweep_record(sweep: SweepStatus) -> dict[str, Any]:
    runs = zip(sweep.runs, sweep.values, strict=True)
    return {
        "sweep_dir": str(sweep.folder),
        "fields": sweep.fields,
        "states": sweep.count(),
        "gpu_hours": round(sweep.gpu_hours, 4),
        "runs": [{"values": values, **_run_record(run)} for run, values in runs],
    }


# Tables


def _print_overview(found: Sequence[RunStatus | SweepStatus]) -> None:
    from rich.markup import escape

    from slurm.status import SweepStatus

    console = new_console()
    table = new_table("run", "state")
    is_wide = console.width >= NARROW
    for name in ("step", "loss", "valid.", "tok/s", "left", "re-\nstarts", *(["nodes"] if is_wide else []), "GPU-h"):
        table.add_column(name, justify="left" if name == "nodes" else "right", no_wrap=name != "nodes")
    for one in found:
        if isinstance(one, SweepStatus):
            done = f"{one.count().get('done', 0)}/{len(one.runs)} done"
            cells = ["", "", "", "", "", "", *([""] if is_wide else []), _hours(one.gpu_hours)]
            table.add_row(_name(one.folder), done, *cells)
        else:
            table.add_row(_name(one.run_dir), _state(one), *_numbers(one, is_wide))
    console.print(table)
    for one in found:
        if isinstance(one, SweepStatus):
            console.print(f"[dim]{escape(_name(one.folder))}[/]: a sweep, {_counted(one)}")
    _print_notes(console, [one for one in found if not isinstance(one, SweepStatus)], show_nodes=not is_wide)
    _print_trouble(console, [run for one in found for run in (one.runs if isinstance(one, SweepStatus) else [one])])


def _print_sweep(sweep: SweepStatus) -> None:
    console = new_console()
    console.print(f"{sweep.folder}: {_counted(sweep)}; {_hours(sweep.gpu_hours)} GPU-hours", markup=False)
    table = new_table(*_short_names(sweep.fields), "state")
    for name in ("step", "loss", "valid.", "best", "tok/s", "left", "GPU-h"):
        table.add_column(name, justify="right", no_wrap=True)
    for run, values in zip(sweep.runs, sweep.values, strict=True):
        step, loss, validation, speed, left, _, hours = _numbers(run, False)
        best = _number(run.progress.best_validation_loss, ".4f")
        fields = [str(values.get(field, "")) for field in sweep.fields]
        table.add_row(*as_texts(fields), _state(run), step, loss, validation, best, speed, left, hours)
    console.print(table)
    _print_notes(console, sweep.runs, show_nodes=False)
    _print_trouble(console, sweep.runs)


def _counted(sweep: SweepStatus) -> str:
    return f"{len(sweep.runs)} run{'s' * (len(sweep.runs) != 1)}: " + ", ".join(
        f"{number} {state}" for state, number in sweep.count().items()
    )


def _short_names(fields: Sequence[str]) -> list[str]:
    """``lr`` of ``optim.lr``, where that tells them apart."""
    short = [field.rpartition(".")[2] for field in fields]
    return short if len(set(short)) == len(fields) else list(fields)


def _print_run(run: RunStatus) -> None:
    from rich.text import Text

    console = new_console()
    console.print(Text.assemble((str(run.run_dir), "bold"), "  ", _state(run), f"  {run.detail}" if run.detail else ""))
    facts = new_table("", "", has_header=False)
    for name, value in _facts(run).items():
        facts.add_row(Text(name, "dim"), Text(value))
    console.print(facts)
    if run.history.attempts:
        console.print()
        console.print(_attempts(run))
    for warning in run.warnings:
        console.print(Text(f"! {warning}", ATTENTION))
    _print_trouble(console, [run])


def _facts(run: RunStatus) -> dict[str, str]:
    """What is known, by name."""
    from slurm.status import clock, duration

    progress, job, submission = run.progress, run.job, run.submission
    facts = {"step": _steps(run)}
    if progress.loss is not None:
        facts["loss"] = f"{progress.loss:.4f}"
    if progress.validation_loss is not None:
        best = _number(progress.best_validation_loss, ".4f")
        facts["loss"] = f"{facts.get('loss', '-')}, validation {progress.validation_loss:.4f} (best {best})"
    if progress.tokens_per_second is not None:
        facts["speed"] = f"{progress.tokens_per_second:,.0f} tok/s"
    if run.eta_seconds is not None:
        facts["left"] = duration(run.eta_seconds)
    facts["checkpoint"] = f"step {run.saved_step}" if run.saved_step is not None else "none yet"
    if job:
        limit = f" of {duration(job.time_limit * 60)}" if job.time_limit else ""
        ran = f" for {duration(job.elapsed)}{limit}" if job.elapsed else ""
        facts["job"] = f"{job.job_id} {job.text}{ran}, submitted {clock(float(submission.get('submitted', 0)))}"
        where = run.nodes or f"{submission.get('nodes')}"
        gpus = submission.get("gpus_per_node")
        facts["nodes"] = f"{where}, {gpus} GPU{'s' * (gpus != 1)} each"
        facts["restarts"] = f"{run.history.restarts} of at most {submission.get('max_restarts')}"
        facts["GPU-hours"] = f"{run.gpu_hours:.2f}"
    for follower in run.then:
        facts[f"then {follower.command}"] = follower.text
    if run.blamed:
        facts["at fault"] = ", ".join(f"{node} ({times}x)" for node, times in run.blamed.items())
    return facts


def _attempts(run: RunStatus) -> Any:
    from slurm.status import clock

    table = new_table()
    for name in ("start", "began", "ended", "nodes", "steps", "end"):
        is_number = name in ("start", "steps")
        is_short = name in ("start", "began", "ended")
        table.add_column(name, justify="right" if is_number else "left", no_wrap=is_short, overflow="fold")
    attempts = run.history.attempts
    for number, attempt in enumerate(attempts, 1):
        is_last = number == len(attempts)
        if attempt.end is not None:
            said = [attempt.state, attempt.action, f"({attempt.why})" if attempt.why else ""]
            ended, why = clock(attempt.end), " ".join(filter(None, [*said[:1], "->" if said[1] else "", *said[1:]]))
        elif is_last and run.nodes:
            ended, why = "", "runs"
        else:
            ended, why = "?", "no word: its node or its job was lost"
        last = attempt.last_step if attempt.last_step is not None else (run.step if is_last and run.nodes else "?")
        row = [str(number), clock(attempt.start), ended, attempt.nodes, f"{attempt.first_step} to {last}", why]
        table.add_row(*as_texts(row))
    return table


def _print_notes(console: Console, runs: Sequence[RunStatus], show_nodes: bool) -> None:
    """What does not fit into the runs' rows; of many alike, the first few."""
    from rich.text import Text

    detailed: Counter[str] = Counter()
    for run in runs:
        notes: list[tuple[str, str]] = []
        if run.detail and run.state != "done":
            detailed[run.state] += 1
            notes += [(run.detail, "")] if detailed[run.state] <= MOST_DETAILS else []
        if show_nodes and run.nodes and run.state == "running":
            notes.append((f"on {run.nodes}", ""))
        for text, style in [*notes, *((warning, ATTENTION) for warning in run.warnings)]:
            console.print(Text.assemble((_name(run.run_dir), "dim"), ": ", (text, style)))
    for state, number in detailed.items():
        if number > MOST_DETAILS:
            console.print(Text(f"and {number - MOST_DETAILS} more {state}: packtrain status RUN_DIR says why", "dim"))


def _print_trouble(console: Console, runs: Sequence[RunStatus]) -> None:
    from rich.text import Text

    for trouble in dict.fromkeys(run.trouble for run in runs if run.trouble):
        console.print(Text(f"! SLURM cannot be asked: {trouble}", ATTENTION))


def _numbers(run: RunStatus, with_nodes: bool) -> list[str]:
    from rich.markup import escape

    progress = run.progress
    speed = (
        "-" if progress.tokens_per_second is None or run.state != "running" else _thousands(progress.tokens_per_second)
    )
    return [
        _steps(run),
        _number(progress.loss, ".4f"),
        _number(progress.validation_loss, ".4f"),
        speed,
        _short_duration(run.eta_seconds),
        str(run.history.restarts) if run.submission else "-",
        *([escape(run.nodes or "-")] if with_nodes else []),
        _hours(run.gpu_hours),
    ]


def _steps(run: RunStatus) -> str:
    total = run.progress.total_steps
    return f"{run.step}/{total}" if total else str(run.step) if run.step else "-"


def _state(run: RunStatus) -> Any:
    from rich.text import Text

    return Text(run.state, STATE_STYLE.get(run.state, ""))


def _name(folder: Path) -> str:
    """As it would be named on the command line, from here."""
    path = os.path.relpath(folder) if folder.is_absolute() else str(folder)
    return str(folder) if path.startswith("..") else path


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _hours(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def _short_duration(seconds: float | None) -> str:
    """At most six characters: 48s, 12m, 3h05m, 2d04h."""
    if seconds is None:
        return "-"
    if seconds < 99.5:
        return f"{seconds:.0f}s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours >= 24:
        return f"{hours // 24}d{hours % 24:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m"


def _thousands(value: float) -> str:
    """At most five characters: 87, 1,234, 17.9k, 1.2M."""
    if value < 9_999.5:
        return f"{value:,.0f}"
    return (
        f"{value / 1e3:.1f}k" if value < 99_950 else f"{value / 1e3:.0f}k" if value < 999_500 else f"{value / 1e6:.1f}M"
    )
