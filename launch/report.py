"""`packtrain report`: one offline HTML page about a run."""

from __future__ import annotations

from pathlib import Path


def report(run_dir: Path) -> None:
    """Write RUN_DIR/report.html: curves, recipe, hashes, throughput, memory, samples and restarts, in one file.

    Args:
        run_dir: folder of a run, finished or not.
    """
    from trainer.checkpoint.layout import RunDir
    from trainer.errors import UserError
    from trainer.metrics.report import write_report

    run = RunDir(run_dir)
    if not any(path.exists() for path in (run.recipe, run.metrics, run.state)):
        raise UserError(
            "RUN_DIR",
            f"{run_dir} has no recipe.yaml, metrics.jsonl or state.json",
            "a folder that `packtrain train` has written",
        )
    print(write_report(run))
