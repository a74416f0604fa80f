"""Curves over steps as pictures for the report. The one file that needs matplotlib, which takes a second to import."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 1200  # of a curve; more cannot be seen
LIGHT = {"text": "#626c79", "grid": "#e6e8ec", "main": "#2f66d0", "second": "#d9731a"}
DARK = {"text": "#97a1af", "grid": "#2a313a", "main": "#7aa7ff", "second": "#ffb25c"}

Points = list[tuple[int, float]]


def draw_curve(
    points: Points,
    restarts: Sequence[int],
    validation: Points | None = None,
    smooth: bool = False,
    wide: bool = False,
) -> tuple[str, str]:
    """Draws values over steps as SVG.

    Args:
        points: (step, value) in order of steps.
        restarts: steps after which the run was resumed, marked by a dotted line.
        validation: a second curve, with a marker at each point.
        smooth: draws the values pale under their moving average.
        wide: twice the width, with a legend, and an axis that need not begin at 0.

    Returns:
        Two data URIs: for a light page and for a dark one.
    """
    light = dark = _draw(points, restarts, validation or [], smooth, wide)
    for name, color in LIGHT.items():  # to draw it again would take as long again
        dark = dark.replace(color, DARK[name])
    return _data_uri(light), _data_uri(dark)


def _draw(points: Points, restarts: Sequence[int], validation: Points, smooth: bool, wide: bool) -> str:
    """SVG in the colours of `LIGHT`."""
    figure = Figure(figsize=(10.4, 3.1) if wide else (5.1, 2.2), layout="constrained")
    axes = figure.add_subplot()
    _plot_training(axes, points, smooth and len(points) > 8, LIGHT["main"])
    if validation:
        axes.plot(*_columns(validation), color=LIGHT["second"], lw=1.6, marker="o", ms=4, label="validation")
    for step in restarts:
        axes.axvline(step + 0.5, color=LIGHT["text"], lw=1, ls=":", label="restart" if step == restarts[0] else None)
    if wide:
        axes.legend(frameon=False, labelcolor=LIGHT["text"], fontsize=9, loc="upper right")
    _style(axes, wide)
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return file.getvalue()


def _plot_training(axes: Axes, points: Points, is_noisy: bool, color: str) -> None:
    if not points:
        return
    steps, values = _columns(_thin_out(points))
    if is_noisy:
        axes.plot(steps, values, color=color, lw=1, alpha=0.35, label="training, each step")
        axes.plot(*_columns(_thin_out(_smooth(points))), color=color, lw=1.8, label="training, smoothed")
    else:
        marker = "o" if len(points) == 1 else None
        axes.plot(steps, values, color=color, lw=1.6, marker=marker, ms=5, label="training")


def _style(axes: Axes, wide: bool) -> None:
    axes.grid(color=LIGHT["grid"], lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=LIGHT["text"], length=0, labelsize=9)
    axes.set_xlabel("step", color=LIGHT["text"], fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8 if wide else 5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))
    axes.set_xlim(0, max(2, axes.dataLim.x1 * 1.02))
    if not wide:
        axes.set_ylim(bottom=0)


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _columns(points: Points) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _thin_out(points: Points) -> Points:
    """At most `MAX_POINTS`: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= MAX_POINTS:
        return points
    stretch = math.ceil(len(points) / (MAX_POINTS // 2))
    kept: Points = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def _smooth(points: Points) -> Points:
    """Exponential moving average over some fortieth of the curve, corrected for its start (arXiv:1412.6980)."""
    decay = 1 - 2 / (max(5, len(points) / 40) + 1)
    mean, smoothed = 0.0, []
    for count, (step, value) in enumerate(points, 1):
        mean = decay * mean + (1 - decay) * value
        smoothed.append((step, mean / (1 - decay**count)))
    return smoothed
