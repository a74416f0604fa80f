"""What of an unfinished merge is whole, noted as it comes to be, so that a killed one goes on from there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.checkpoint.layout import UNFINISHED, write_atomically

NOTES = "shards" + UNFINISHED  # inside the unfinished folder


class Progress:
    """Notes of whole files, good for a merge of the very same inputs.

    Args:
        inputs: all that the bytes depend on but the base's own, as json holds it.

    Attributes:
        notes: file name -> what was noted of it, in the order they were written.
    """

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        self.inputs = json.loads(json.dumps(inputs))
        self.notes: dict[str, dict[str, Any]] = {}

    def can_go_on(self, folder: Path) -> bool:
        """Whether `folder` holds a whole file of such a merge; takes its notes in."""
        self.notes = self._read(folder)
        return bool(self.notes)

    def clear(self, folder: Path) -> None:
        """Removes all else that an earlier start left there: the manifest lists every file it finds."""
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != NOTES and path.name not in self.notes:
                path.unlink()

    def note(self, folder: Path, file: str, entry: dict[str, Any]) -> None:
        """Notes that `file`, whose bytes have reached the disk, is whole."""
        self.notes[file] = entry
        write_atomically(folder / NOTES, json.dumps({"inputs": self.inputs, "files": self.notes}) + "\n")

    def entries(self) -> dict[str, dict[str, Any]]:
        """The manifest's entries of the files noted."""
        return {file: {"bytes": note["bytes"], "blake3": note["blake3"]} for file, note in self.notes.items()}

    def forget(self, folder: Path) -> None:
        """Removes the notes: the folder is complete, or the base not the one they were taken with."""
        self.notes = {}
        (folder / NOTES).unlink(missing_ok=True)

    def _read(self, folder: Path) -> dict[str, dict[str, Any]]:
        try:
            record = json.loads((folder / NOTES).read_text(encoding="utf-8"))
            is_same = record["inputs"] == self.inputs
            whole = all((folder / file).stat().st_size == note["bytes"] for file, note in record["files"].items())
            return dict(record["files"]) if is_same and whole else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
