"""The results of speed.py as a table, as json and as a plot.

Two columns of rates stand beside packtrain's. The first is what was measured. The second takes the price of attention
under a mask out of a peer's step: where no flash attention is installed, transformers computes all pairs of tokens of
all documents that lie in one row. Per layer the time of that is measured on the same documents (hardware.py), forward
and backward, and the forward once more under recompute; varlen attention's time is left in.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from contenders import HARDWARE, PACKTRAIN, SETTINGS, label_of
from shared import MASKED, count_adapter, shape_of

from trainer.metrics.meters import flops_per_token, peak_bf16_flops

CEILING_FLOPS = 788e12  # bfloat16 matmuls on an H200, where the results hold no measured ones
COLORS = {PACKTRAIN: "#2f66d0", "peer": "#98a2b3", "without": "#d3d9e2", "ceiling": "#d9731a", "text": "#5b6573"}
WIDTH, LEFT, BAR, GAP = 920, 360, 18, 8  # of the plot, in pixels

Cell = dict[str, Any]
HEAD = (
    "contender",
    "tok/s",
    "of the ceiling",
    "MFU",
    "peak GiB",
    "packtrain : it",
    "tok/s, its attention at varlen's cost",
    "packtrain : that",
    "settings",
)


def write_table(results: Path) -> str:
    """Writes ``.json``, ``.md`` and ``.svg`` beside `results`; gives the table in Markdown."""
    groups = [derive(cells) for cells in _grouped(results).values()]
    text = "\n\n".join(map(_markdown, groups))
    results.with_suffix(".md").write_text(text + "\n")
    results.with_suffix(".json").write_text(json.dumps(groups, indent=1) + "\n")
    results.with_suffix(".svg").write_text(_plot(groups))
    return text


def _grouped(results: Path) -> dict[tuple[str, ...], dict[str, Cell]]:
    """The newest cell of each contender, by shape, device and setting, with what the machine could do then."""
    cells = [json.loads(line) for line in results.read_text().splitlines() if line.strip()]
    machines: dict[tuple[str, ...], Cell] = {}
    groups: dict[tuple[str, ...], dict[str, Cell]] = {}
    for cell in cells:
        machine = (cell["shape"], cell["device"], cell["rows"], cell["pack_length"])
        if cell["contender"] == HARDWARE:
            if "matmul_flops" in cell:
                machines[machine] = cell
        else:
            group = groups.setdefault((*machine, cell["setting"]), {})
            group |= {cell["contender"]: cell, HARDWARE: machines.get(machine, {})}
    for (*machine, _), group in groups.items():
        group[HARDWARE] = group[HARDWARE] or machines.get(tuple(machine), {})
    return groups


def derive(cells: dict[str, Cell]) -> Cell:
    """The figures of one setting: of the machine, and of each contender in the order of their names' first cells."""
    machine = cells.pop(HARDWARE)
    first = next(iter(cells.values()))
    ceiling = machine.get("matmul_flops", CEILING_FLOPS if first["device"] == "cuda" else None)
    peak = peak_bf16_flops(machine.get("device_name", "NVIDIA H200")) if first["device"] == "cuda" else None
    ours = cells.get(PACKTRAIN, {}).get("tokens_per_second")
    rows = [_row(cell, ceiling, peak, ours, machine) for cell in cells.values()]
    rows.sort(key=lambda row: (row["contender"] != PACKTRAIN, -(row.get("tokens_per_second") or 0)))
    group = {name: first[name] for name in ("shape", "device", "setting", "rows", "pack_length")}
    group |= {"device_name": machine.get("device_name"), "ceiling_flops": ceiling, "contenders": rows}
    return {**group, "ceiling": "measured in the same run" if "matmul_flops" in machine else "an H200's"}


def _row(cell: Cell, ceiling: float | None, peak: float | None, ours: float | None, machine: Cell) -> Cell:
    rate = cell.get("tokens_per_second")
    kept = ("contender", "tokens_per_second", "step_seconds", "peak_gib", "first_step_s", "settings", "versions")
    row = {name: cell[name] for name in (*kept, "missing", "error") if name in cell}
    if rate is None:
        return row
    flops = _flops(cell)
    row |= {"ceiling_rate": ceiling and ceiling / flops, "of_ceiling": ceiling and rate * flops / ceiling}
    row |= {"mfu": peak and rate * flops / peak}
    if cell["contender"] != PACKTRAIN:
        extra = _extra_attention(cell, machine)
        row["attention_s"] = extra
        row["without_mask"] = None
        if extra is not None and extra < cell["step_seconds"]:  # the same rate of the same steps, each so much shorter
            row["without_mask"] = rate * cell["step_seconds"] / (cell["step_seconds"] - extra)
        row["ratio"] = ours and ours / rate
        row["ratio_without_mask"] = ours and row["without_mask"] and ours / row["without_mask"]
    budget = SETTINGS[cell["setting"]].budget_gib
    if budget and (cell.get("peak_gib") or 0) > budget:
        row["error"] = f"takes more than {budget:.0f} GiB"
    return row


def _flops(cell: Cell) -> float:
    """Model FLOPs of a token of the documents, alike for all contenders; see trainer/metrics/meters.py."""
    shape, trains_base = shape_of(cell["shape"]), SETTINGS[cell["setting"]].method == "full"
    of_adapter = 0 if trains_base else count_adapter(shape)
    flops = flops_per_token(SimpleNamespace(**shape), trains_base, cell["mean_attended"], of_adapter)
    return flops.total(1, cell["trained_share"])


def _extra_attention(cell: Cell, machine: Cell) -> float | None:
    """Seconds of a step that attention under a mask takes more than varlen's; None where that was not measured."""
    if cell["attention"] != MASKED:
        return 0.0
    per_forward = cell["step_tokens"] / cell["num_forwards"] / cell["pack_length"]
    rows, packs = cell["layout"][0], max(1, round(per_forward))
    wanted = [rows, packs * cell["pack_length"] // rows]
    timed = {json.dumps(of["rows"]): of for of in machine.get("attention", [])}
    masked, varlen = timed.get(json.dumps(wanted)), timed.get("null")
    if masked is None or varlen is None:
        return None
    more = {name: masked[name] - varlen[name] for name in ("forward_s", "forward_backward_s")}
    of_layer = more["forward_backward_s"] + (more["forward_s"] if cell["recompute"] else 0.0)
    return shape_of(cell["shape"])["num_hidden_layers"] * max(0.0, of_layer)


# ------------------------------------------------------------------------------------------------------------- Markdown


def _markdown(group: Cell) -> str:
    setting = SETTINGS[group["setting"]]
    machine = group["device_name"] or group["device"]
    title = f"**{group['shape']}, {group['setting']}** on {machine}: {setting.measures}."
    rate = next((row["ceiling_rate"] for row in group["contenders"] if row.get("ceiling_rate")), None)
    batch = f"{group['rows']} packs of {group['pack_length']:,} tokens a step"
    if rate:
        flops = f"{group['ceiling_flops'] / 1e12:.4g} TFLOP/s in matmuls ({group['ceiling']})"
        batch += f"; the ceiling is {rate:,.0f} tok/s at {flops}"
    versions = dict.fromkeys(", ".join(map(" ".join, row["versions"].items())) for row in group["contenders"])
    batch += f". {'; peers: '.join(versions)}"
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(_shown(row)) + " |" for row in group["contenders"]]
    return "\n".join([f"{title} {batch}.", "", *lines])


def _shown(row: Cell) -> list[str]:
    name = label_of(row["contender"])
    if "tokens_per_second" not in row:
        why = f"not installed: {', '.join(row['missing'])}" if "missing" in row else row["error"]
        return [name, *["-"] * 7, why]
    is_ours = row["contender"] == PACKTRAIN
    said = "; ".join(filter(None, [row.get("settings"), row.get("error")]))
    figures = [
        (row["tokens_per_second"], ",.0f"),
        (row["of_ceiling"], ".1%"),
        (row["mfu"], ".1%"),
        (row["peak_gib"], ".1f"),
        (row.get("ratio"), ".2f"),
        (row.get("without_mask"), ",.0f"),
        (row.get("ratio_without_mask"), ".2f"),
    ]
    return [f"**{name}**" if is_ours else name, *("-" if x is None else format(x, form) for x, form in figures), said]


# ----------------------------------------------------------------------------------------------------------------- plot


def _plot(groups: list[Cell]) -> str:
    """Bars of tokens a second, one picture of all settings; a peer's pale part is what the mask costs it."""
    parts: list[str] = []
    top = 0
    for group in groups:
        rows = [row for row in group["contenders"] if "tokens_per_second" in row]
        if not rows:
            continue
        parts.append(_text(0, top + 20, f"{group['shape']}, {group['setting']}: tokens a second", weight="bold"))
        top += 30
        bottom = top + len(rows) * (BAR + GAP)
        ceiling = rows[0]["ceiling_rate"]
        most = max([ceiling or 0.0, *(row["tokens_per_second"] for row in rows)])
        scale = (WIDTH - LEFT - 90) / most
        for row in rows:
            parts += _bar(row, top, scale)
            top += BAR + GAP
        if ceiling:
            at = LEFT + ceiling * scale
            parts.append(
                f'<path d="M{at:.1f} {bottom - len(rows) * (BAR + GAP)}V{bottom}" stroke="{COLORS["ceiling"]}"/>'
            )
            parts.append(_text(at, bottom + 10, f"ceiling {ceiling:,.0f}", anchor="end"))
        top += 26
    style = f'font-family="sans-serif" font-size="13" fill="{COLORS["text"]}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {max(top, 1)}" {style}>'
    return "\n".join([head, *parts, "</svg>\n"])


def _bar(row: Cell, top: float, scale: float) -> list[str]:
    rate, without = row["tokens_per_second"], row.get("without_mask") or 0.0
    color = COLORS[PACKTRAIN if row["contender"] == PACKTRAIN else "peer"]
    bars = [(without, COLORS["without"]), (rate, color)]
    end = LEFT + max(rate, without) * scale
    return [
        _text(LEFT - 8, top + BAR - 4, label_of(row["contender"]), anchor="end"),
        *(
            f'<rect x="{LEFT}" y="{top}" width="{value * scale:.1f}" height="{BAR}" fill="{fill}"/>'
            for value, fill in bars
            if value
        ),
        _text(end + 6, top + BAR - 4, f"{rate:,.0f}"),
    ]


def _text(x: float, y: float, text: str, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'
