"""Draw what depends on a size or a number: log-log, a line for each system, the limit by memcpy dashed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .measure import MEMCPY, Measured, quantity
from .peers.blocks import BLOCKS
from .peers.channels import CHANNELS
from .peers.pools import POOLS
from .report import Results

# Okabe and Ito's colours, which can be told apart with any colour vision; markers differ, too. Ours is the thick one.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8C6D1F")
MARKERS = "osD^vPX*"
LEAST_POINTS = 2


def draw(results: Results, folder: Path) -> dict[str, dict[str, str]]:
    """Write an SVG for each group of a row with an x axis, and return their names: {row: {group: file name}}."""
    try:
        import matplotlib  # noqa: F401 (it is asked for once, here)
    except ImportError:
        results.session.say("skipped: plots: matplotlib is not installed")
        return {}
    drawn: dict[str, dict[str, str]] = {}
    for row, found in results.rows.items():
        groups: dict[str, list[Measured]] = {}
        for measured in found:
            if measured.x is not None and measured.samples:
                groups.setdefault(measured.group, []).append(measured)
        for group, series in groups.items():
            if len(series) >= LEAST_POINTS:
                name = f"{row}{'' if len(groups) == 1 else '-' + _slug(group)}.svg"
                _plot(group, series, folder / name)
                drawn.setdefault(row, {})[group] = name
    return drawn


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _plot(title: str, series: Sequence[Measured], path: Path) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # A white ground, since the page's may be dark; text as text; the same data give the same file.
    settings = {"svg.fonttype": "none", "svg.hashsalt": "mpmemory", "font.family": "sans-serif", "font.size": 10}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(8.4, 4.6), facecolor="white", layout="constrained")
        axes = figure.add_subplot(facecolor="white")
        ours = series[0].ours
        sides = list(dict.fromkeys(side for measured in series for side in measured.samples))
        ends: dict[str, float] = {}
        for side in sides:
            points = [(each.x, each.median(side)) for each in series if each.samples.get(side)]
            ends[side] = points[-1][1]
            axes.plot(*zip(*points, strict=True), label=side, **_style(side, ours, sides))
        _axes(axes, title, series)
        handles, labels = axes.get_legend_handles_labels()
        ordered = sorted(zip(labels, handles, strict=True), key=lambda pair: -ends[pair[0]])  # as the lines end
        axes.legend(
            [handle for _, handle in ordered],
            [label for label, _ in ordered],
            loc="center left",
            bbox_to_anchor=(1.01, 0.5),
            frameon=False,
        )
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def _style(side: str, ours: str, sides: Sequence[str]) -> dict[str, Any]:
    if side == MEMCPY:
        return {"color": "black", "linestyle": "--", "linewidth": 1.2}
    if side == ours:
        return {"color": COLOURS[0], "marker": MARKERS[0], "linewidth": 3, "zorder": 5}
    registry = next((list(each) for each in (POOLS, CHANNELS, BLOCKS) if side in each), sides)
    number = 1 + (registry.index(side) - 1) % (len(COLOURS) - 1)  # the same colour in all plots, whoever is missing
    return {"color": COLOURS[number], "marker": MARKERS[number], "linewidth": 1.4, "markersize": 5}


def _axes(axes: Any, title: str, series: Sequence[Measured]) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title(title[:1].upper() + title[1:], loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(series[0].axis)
    axes.set_ylabel("time, median" if series[0].unit == "s" else "median")
    xs = [each.x or 0 for each in series]
    in_bytes = series[0].axis.endswith("bytes")
    axes.set_xticks(xs, [_bytes(x) if in_bytes else f"{x:,.0f}" for x in xs])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value, series[0].unit)))
    axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _bytes(size: float) -> str:
    for unit in ("", "K", "M"):
        if size < 1 << 10:
            return f"{size:g}{unit}"
        size /= 1 << 10
    return f"{size:g}G"


def _short(value: float, unit: str) -> str:
    """Format a tick: "10 ms", not "10.0 ms"."""
    number, _, rest = quantity(value, unit).partition(" ")
    return f"{float(number.replace(',', '')):g} {rest}".strip()
