"""The page `packtrain preprocess --html` writes: one file, no scripts, nothing fetched, all text escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.preprocess import ShownRow

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #1b1f24; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: .15rem .8rem; text-align: right; border-bottom: 1px solid #d8dee4; }
td:first-child, th:first-child { text-align: left; }
.bar { background: #2da44e; height: .8rem; }
.room { width: 24rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f8fa; padding: .8rem; border-radius: 6px; }
.off { color: #6e7781; }
.on { background: #aceebb; }
.on:nth-child(even) { background: #6fdd8b; }
h2 { font-size: 1.05rem; margin-top: 2rem; }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def render_page(
    recipe: str,
    figures: Sequence[tuple[str, Sequence[str]]],
    histogram: Sequence[tuple[str, int]],
    rows: Sequence[ShownRow],
) -> str:
    """HTML of table, length histogram and coloured rows."""
    parts = [
        f"<h1>What {escape(recipe)} trains on</h1>",
        _table(figures),
        "<h2>Training rows by length in tokens</h2>",
        _bars(histogram),
        '<h2>Rows</h2><p><span class="on">trained</span> <span class="off">not trained</span></p>',
        *map(_row, rows),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{escape(recipe)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _table(figures: Sequence[tuple[str, Sequence[str]]]) -> str:
    heading, *lines = figures
    top = "".join(f"<th>{escape(cell)}</th>" for cell in (heading[0], *heading[1]))
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in (name, *cells)) + "</tr>" for name, cells in lines
    )
    return f"<table><tr>{top}</tr>{body}</table>"


def _bars(histogram: Sequence[tuple[str, int]]) -> str:
    most = max(count for _, count in histogram)
    lines = (
        f"<tr><td>{escape(span)}</td>"
        f'<td class="room"><div class="bar" style="width:{100 * count / most:.1f}%"></div></td>'
        f"<td>{count:,}</td></tr>"
        for span, count in histogram
    )
    return f"<table>{''.join(lines)}</table>"


def _row(row: ShownRow) -> str:
    tokens = "".join(
        f'<span class="{"on" if trained else "off"}">{escape(text)}</span>' for text, trained in row.pieces
    )
    return f"<h2>{escape(row.title)}</h2><pre>{tokens}</pre>"
