"""Stand-ins for SLURM's commands: executables on PATH that print what real ones printed, and note how they were called.

The outputs are of SLURM 22.05 unless a test says otherwise.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

from slurm.queue import COLUMNS

NO_CONTROLLER = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
NO_SUCH_JOB = "slurm_load_jobs error: Invalid job id specified"
NO_ACCOUNTING = "Slurm accounting storage is disabled"
TOOLS = ("bash", "cat", "git", "sleep", "printf")


class Commands:
    """A folder that alone is PATH: what is not made here is not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for tool in TOOLS:
            if found := shutil.which(tool):
                (folder / tool).symlink_to(found)

    def add(self, name: str, output: str = "", status: int = 0, stderr: str = "", shell: str = "") -> None:
        """A command that runs `shell`, prints, and exits; one that is there is replaced."""
        out = self.folder / f".{name}.out"
        out.write_text(output)
        lines = [
            "#!/bin/bash",
            f'printf "%s\\n" "$*" >> {shlex.quote(str(self.folder / f".{name}.calls"))}',
            shell,
            f"cat {shlex.quote(str(out))}",
            f"echo {shlex.quote(stderr)} >&2" if stderr else "",
            f"exit {status}",
        ]
        path = self.folder / name
        path.write_text("\n".join(lines) + "\n")
        path.chmod(0o755)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink()

    def calls(self, name: str) -> list[str]:
        """The arguments of each call so far."""
        path = self.folder / f".{name}.calls"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def environ(self) -> dict[str, str]:
        """For a process of its own."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "COLUMNS"))}
        return kept | {"PATH": str(self.folder)}


def squeue_line(fields: Mapping[str, str]) -> str:
    """A job as ``squeue --Format`` prints it: each field cut or filled up to its width."""
    given = {"State": "RUNNING", "Reason": "None", "TimeUsed": "0:00", "TimeLimit": "4:00:00", "RestartCnt": "0"}
    return "".join(f"{({**given, **fields}).get(name, '')[:width]:<{width}}" for name, width in COLUMNS.items()) + "\n"
