"""The look of the HTML report: its frame, style and building blocks. Nothing here knows what a run is.

The page is one file: no script, no address outside it (its own policy forbids any), light or dark as the reader's
system is, and made to be printed too.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

STYLE = """
:root { color-scheme: light dark; --page: #f5f6f8; --card: #ffffff; --line: #e1e4e9; --text: #1d232b; --soft: #626c79;
  --accent: #2f66d0; --good: #1a7f4b; --bad: #c0362c; --warn: #a15c00; --mono: ui-monospace, "SF Mono", Menlo, Consolas,
  "DejaVu Sans Mono", monospace; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1317; --card: #171c22; --line: #2a313a; --text: #e4e8ee;
  --soft: #97a1af; --accent: #7aa7ff; --good: #58c78d; --bad: #ff8a80; --warn: #f0b357; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { margin: 0; font-size: 28px; line-height: 1.2; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { margin: 40px 0 12px; font-size: 18px; }
h3 { margin: 0 0 4px; font-size: 13px; font-weight: 600; color: var(--soft); }
p { margin: 6px 0; } .soft { color: var(--soft); }
.head { display: flex; flex-wrap: wrap; gap: 8px 14px; align-items: center; }
.badge { padding: 2px 12px; border: 1.5px solid currentColor; border-radius: 99px; font-size: 13px; font-weight: 600; }
.good { color: var(--good); } .bad { color: var(--bad); } .warn { color: var(--warn); } .busy { color: var(--accent); }
.notice { margin: 16px 0 0; padding: 10px 14px; border-left: 4px solid currentColor; border-radius: 4px;
  background: var(--card); white-space: pre-wrap; overflow-wrap: anywhere; }
.notice span { color: var(--text); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; margin-top: 24px; }
.card, figure, .box { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 14px 16px; } .card b { display: block; font-size: 25px; line-height: 1.25; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; white-space: nowrap; } .card b small { font-size: 14px; font-weight: 500; }
.card p { margin: 2px 0 0; font-size: 13px; color: var(--soft); }
.curves { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; }
figure { margin: 0; padding: 12px 14px 6px; } figure.wide { grid-column: 1 / -1; } img { display: block; width: 100%; }
.box { overflow: auto; max-height: 460px; } .box + .box { margin-top: 12px; }
table { width: 100%; border-collapse: collapse; font-size: 14px; }
th, td { padding: 7px 14px; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
thead th { position: sticky; top: 0; background: var(--card); border-top: 0; font-size: 12px; color: var(--soft);
  box-shadow: 0 1px var(--line); }
tr:first-child > th[scope=row], tr:first-child > th[scope=row] + td { border-top: 0; }
th[scope=row] { width: 170px; font-weight: 500; color: var(--soft); }
.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; } .mono { font-family: var(--mono); font-size: 12.5px;
  overflow-wrap: anywhere; }
tr.mark td { font-weight: 600; color: var(--good); }
details { background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }
details + details { margin-top: 8px; } summary { padding: 9px 14px; cursor: pointer; font-weight: 500; }
details .text { width: 50%; } details[open] summary { border-bottom: 1px solid var(--line); }
pre { margin: 0; padding: 14px 16px; font: 12.5px/1.55 var(--mono); overflow: auto; tab-size: 2; }
footer { margin-top: 40px; font-size: 13px; color: var(--soft); }
@media (max-width: 720px) { .curves { grid-template-columns: 1fr; } main { padding: 20px 14px; } }
@media print { @page { margin: 14mm; } :root { --page: #fff; } body { font-size: 11px; } main { padding: 0;
  max-width: none; } h2 { break-after: avoid; margin-top: 24px; } .card, figure, tr { break-inside: avoid; }
  .box { max-height: none; overflow: visible; } pre { white-space: pre-wrap; } thead th { position: static; }
  .cards { grid-template-columns: repeat(3, 1fr); } .card b { font-size: 18px; }
  details::details-content { content-visibility: visible; block-size: auto; } }
"""


@dataclass(frozen=True)
class Markup:
    """HTML that is written as it stands; every plain string is escaped."""

    html: str


Cell = str | Markup


def escape(value: Cell) -> str:
    """`value` as HTML text."""
    return value.html if isinstance(value, Markup) else html.escape(value)


def document(title: str, body: Iterable[str]) -> str:
    """A whole page around the sections of `body`."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body><main>
{chr(10).join(part for part in body if part)}
</main></body>
</html>
"""


def section(title: str, *parts: str) -> str:
    """A heading and what stands under it; nothing when there is nothing."""
    content = "\n".join(part for part in parts if part)
    return f"<section><h2>{escape(title)}</h2>\n{content}</section>" if content else ""


def card(title: str, value: str, unit: str = "", note: str = "") -> str:
    """One figure of the summary."""
    small = f" <small>{escape(unit)}</small>" if unit else ""
    return f'<div class="card"><h3>{escape(title)}</h3><b>{escape(value)}{small}</b><p>{escape(note)}</p></div>'


def key_values(rows: Iterable[tuple[str, Cell]]) -> str:
    """A table of names and values; nothing when empty."""
    lines = [f'<tr><th scope="row">{escape(k)}</th><td class="text">{escape(v)}</td></tr>' for k, v in rows]
    return f'<div class="box"><table>{"".join(lines)}</table></div>' if lines else ""


def table(columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[Cell]], marked: int | None = None) -> str:
    """A table; nothing when it has no rows.

    Args:
        columns: heading and class of each column: ``num``, ``text`` or ``mono``.
        marked: index of a row to bring out.
    """
    if not rows:
        return ""
    head = "".join(f'<th class="{"num" if kind == "num" else ""}">{escape(name)}</th>' for name, kind in columns)
    lines = []
    for index, row in enumerate(rows):
        cells = "".join(f'<td class="{kind}">{escape(v)}</td>' for (_, kind), v in zip(columns, row, strict=True))
        lines.append(f'<tr class="{"mark" if index == marked else ""}">{cells}</tr>')
    return f'<div class="box"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def details(summary: str, content: str, is_open: bool = False) -> str:
    """A part that the reader unfolds."""
    inner = content.replace('<div class="box">', "<div>", 1)
    return f"<details{' open' if is_open else ''}><summary>{escape(summary)}</summary>{inner}</details>"


def picture(title: str, light: str, dark: str, alt: str, wide: bool = False) -> str:
    """A picture in two data URIs, one for each colour scheme."""
    return (
        f'<figure class="{"wide" if wide else ""}"><h3>{escape(title)}</h3><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(alt)}"></picture></figure>'
    )
