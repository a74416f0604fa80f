"""Tables on a terminal, in a pipe or in a file. rich is imported when the first one is made."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

PIPE_WIDTH = 200  # columns where no terminal says how many fit


def new_console() -> Console:
    """Writes to stdout, as wide as the terminal; elsewhere so wide that a program finds a row on one line."""
    from rich.console import Console

    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else PIPE_WIDTH, highlight=False)


def new_table(*columns: str, has_header: bool = True) -> Table:
    """A table without frames; what is too long for its column goes on in the next line."""
    from rich import box
    from rich.table import Table

    style = box.SIMPLE_HEAD if has_header else None
    table = Table(box=style, show_header=has_header, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def as_texts(cells: Sequence[str]) -> list[Text]:
    """Cells to be shown as they are: ``n[1-2]`` is no markup."""
    from rich.text import Text

    return [Text(cell) for cell in cells]
