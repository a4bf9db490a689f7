"""The pictures of a report: one PNG, and the same panels as SVG for the page.

The SVG panels take their ink from CSS variables, so that they follow the page's light or dark
colours; matplotlib draws them with stand-in colours that are replaced in its output.
"""

import dataclasses
import io
import pathlib
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from robust_ft.files import replacing
from robust_ft.report import results, verdicts
from robust_ft.report.runs import Run
from robust_ft.summary import ANALYSIS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# Told apart by readers with any colour vision, and clear on white and on near-black.
PALETTE = ("#e0632e", "#2f86d6", "#2e9e6b", "#a565c9", "#c2920b", "#d1568f", "#6b7fd7")


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours of everything that is not a method."""

    ink: str = "#1d2430"
    muted: str = "#667085"
    grid: str = "#e6e9ee"
    pretrained: str = "#98a2b3"
    paper: str = "#ffffff"


LIGHT = Theme()
STAND_IN = Theme(
    ink="#010203", muted="#010204", grid="#010205", pretrained="#010206", paper="#010207"
)
_VARIABLES = {
    STAND_IN.ink: "var(--ink)",
    STAND_IN.muted: "var(--muted)",
    STAND_IN.grid: "var(--rule)",
    STAND_IN.pretrained: "var(--pretrained)",
    STAND_IN.paper: "var(--card)",
}
TITLES = {
    "target": "Target task",
    results.NORM_AVG: "Other tasks",
    results.FORMAT_SHARE: "Other tasks answered like the target, %",
}


def colors(runs: Sequence[Run]) -> dict[str, str]:
    """Returns the colour of each method."""
    names = list(results.methods(runs))
    return {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(names)}


def describe(runs: Sequence[Run], quantity: str | results.Column) -> str:
    """Returns the title of a quantity with its task, metric and shots; of a column its metric."""
    if isinstance(quantity, results.Column):
        return quantity.metric.replace("_", " ")
    run = runs[0]
    column = results.quantity_column(run, quantity)
    if column is None or quantity == results.FORMAT_SHARE:
        return TITLES[quantity]
    if quantity == "target":
        if len({run.target for run in runs}) > 1:
            return "Target task of each method"
        return f"Target task: {column.task}, {column.metric.replace('_', ' ')}"
    tasks = {r.task for r in run.rows if r.shots == column.shots and r.role != ANALYSIS}
    count = len(tasks - {run.target, results.HELD_OUT})
    return f"Other tasks: mean of {count} held-out tasks, {column.shots}-shot"


def save_picture(runs: Sequence[Run], path: pathlib.Path) -> None:
    """Writes the picture: scores before and after above, curves below."""
    from matplotlib.figure import Figure

    with style(LIGHT):
        figure = Figure(figsize=(13, 8.4), dpi=150, facecolor="white")
        _titles(figure, runs)
        halves: Any = figure.subfigures(2, 1, height_ratios=[1, 1.45])
        top, bottom = halves
        count = len(results.methods(runs)) + 1
        left, right = top.subplots(
            1, 2, gridspec_kw={"left": 0.12, "right": 0.97, "top": 0.55 + 0.02 * min(count, 4),
                               "bottom": 0.06, "wspace": 0.38}
        )  # fmt: skip
        draw_bars(left, runs, "target", LIGHT)
        draw_bars(right, runs, results.NORM_AVG, LIGHT)
        spec = bottom.add_gridspec(
            1, 3, left=0.045, right=0.985, top=0.76, bottom=0.11, wspace=0.16
        )
        for index, quantity in enumerate(TITLES):
            draw_curves(bottom, spec[index], runs, quantity, LIGHT)
        _legend(bottom, runs, LIGHT)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")


def svg_panels(runs: Sequence[Run]) -> dict[str, str]:
    """Returns SVG elements of the panels for which the runs have results.

    They are `bars_target`, `bars_norm_avg`, a panel a quantity, and `loss` (in training).
    """
    from matplotlib.figure import Figure

    panels: dict[str, str] = {}
    with style(STAND_IN):
        for quantity in ("target", results.NORM_AVG):
            if not results.before_and_after(runs, quantity)[1]:
                continue
            height = 0.75 + 0.5 * len(_bars(runs, quantity, STAND_IN))
            figure = Figure(figsize=(4.9, height))
            axes = figure.subplots(gridspec_kw={"left": 0.26, "right": 0.98, "top": 0.97,
                                                "bottom": 0.04})  # fmt: skip
            draw_bars(axes, runs, quantity, STAND_IN, title=False)
            panels[f"bars_{quantity}"] = svg(figure, f"b{quantity}")
        for quantity in (*TITLES, "loss"):
            if not results.curves(runs, quantity):
                continue
            figure = Figure(figsize=(4.7, 3.1))
            spec = figure.add_gridspec(1, 1, left=0.09, right=0.97, top=0.9, bottom=0.155)
            draw_curves(figure, spec[0], runs, quantity, STAND_IN, title=False)
            panels[quantity] = svg(figure, quantity)
    return panels


class _Bar(NamedTuple):
    name: str
    cell: results.Cell
    color: str
    kept: bool = False  # whether it is the same model with methods that the bar above is without


def _bars(runs: Sequence[Run], quantity: str, theme: Theme) -> list[_Bar]:
    """Returns the bars of a quantity: the pretrained model, then each method's end."""
    palette = colors(runs)
    first, ends = results.before_and_after(runs, quantity)
    bars = [_Bar(results.PRETRAINED, first, theme.pretrained)] if first else []
    with_all = results.ends_kept(runs) if quantity == results.NORM_AVG else {}
    for name, cell in ends.items():
        names = results.joined(cell.without)
        bars.append(_Bar(f"{name} without {names}" if names else name, cell, palette[name]))
        if name in with_all:
            bars.append(_Bar(f"with {names}", with_all[name], palette[name], kept=True))
    return bars


def draw_bars(
    axes: "Axes", runs: Sequence[Run], quantity: str, theme: Theme, title: bool = True
) -> None:
    """Draws a bar for the pretrained model, and for each method's end with and without it."""
    bars = _bars(runs, quantity, theme)
    first = next((bar.cell for bar in bars if bar.name == results.PRETRAINED), None)
    start = first.mean if first else None
    room = 1.3 if title else 1.58  # for the numbers; the page's panels are narrower
    limit = room * max([bar.cell.mean for bar in bars] + [1e-9])
    for place, (_, cell, color, kept) in enumerate(bars):
        if kept:
            axes.barh(place, cell.mean, height=0.62, facecolor=theme.paper, edgecolor=color,
                      hatch="////", linewidth=1.2)  # fmt: skip
        else:
            axes.barh(place, cell.mean, height=0.62, color=color)
        if cell.sd:
            axes.plot([cell.mean - cell.sd, cell.mean + cell.sd], [place, place],
                      color=theme.ink, linewidth=1.2)  # fmt: skip
        change = "" if start is None or cell is first else f"  ({cell.mean - start:+.1f})"
        end = cell.mean + (cell.sd or 0)
        axes.text(end + 0.015 * limit, place, f"{cell.mean:.1f}{change}".replace("-", "−"),
                  va="center", fontsize=11, fontweight="bold", color=theme.ink,
                  bbox={"facecolor": theme.paper, "linewidth": 0, "pad": 1.5})  # fmt: skip
    if start and len(bars) > 1:
        axes.plot([start, start], [-0.31, len(bars) - 0.6], linestyle=(0, (3, 3)), linewidth=1.1,
                  color=theme.muted, zorder=0)  # fmt: skip
    axes.set(xlim=(0, limit), ylim=(max(1, len(bars)) - 0.5, -0.5), xticks=[])
    names = [textwrap.fill(bar.name.replace("_", " "), 18) for bar in bars]
    lines = max([name.count("\n") + 1 for name in names] + [1])
    axes.set_yticks(range(len(bars)), names, fontsize=11 if lines < 3 else 9, color=theme.ink)
    if not bars:
        axes.text(0, 0, "not measured", color=theme.muted)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.spines["left"].set_visible(True)
    if title:
        axes.set_title(describe(runs, quantity), loc="left", fontweight="bold", pad=8)


def draw_curves(
    figure: "Figure | SubFigure",
    spec: Any,
    runs: Sequence[Run],
    quantity: str | results.Column,
    theme: Theme,
    title: bool | str = True,
) -> None:
    """Draws a quantity against steps; stages before a method's last get a panel to its left."""
    curves = results.curves(runs, quantity)
    early, last = [c for c in curves if not c.last], [c for c in curves if c.last]
    groups = [group for group in (early, last) if group] or [[]]
    ratios = [1.0, 1.5] if len(groups) == 2 else [1.0]
    grid = spec.subgridspec(1, len(groups), width_ratios=ratios, wspace=0.14)
    top = max([m + s for c in curves for m, s in zip(c.mean, c.sd, strict=True)] + [1e-9])
    limit = 104.0 if top > 60 or quantity == results.FORMAT_SHARE else 1.12 * top
    baseline = _baseline(runs, quantity)
    for index, group in enumerate(groups):
        axes = figure.add_subplot(grid[index])
        for curve in group:
            _draw_curve(axes, curve, colors(runs)[curve.method], limit)
        if baseline is not None:
            axes.axhline(baseline, linestyle=(0, (3, 3)), linewidth=1.1, color=theme.pretrained)
        axes.set(ylim=(-0.02 * limit, limit), xlabel="step" if index == len(groups) - 1 else "")
        axes.set_xlim(left=0)
        axes.grid(axis="y", color=theme.grid, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.locator_params(axis="x", nbins=4 if index or len(groups) == 1 else 2, integer=True)
        if index:
            axes.tick_params(labelleft=False, left=False)
            axes.spines["left"].set_visible(False)
        names = " · ".join(dict.fromkeys(f"{c.stage}" for c in group))
        if names:
            axes.text(0.0, 1.015, f"stage: {names}", transform=axes.transAxes, fontsize=9,
                      color=theme.muted)  # fmt: skip
        if title and index == 0:
            text = title if isinstance(title, str) else describe(runs, quantity)
            axes.text(0, 1.1, text, transform=axes.transAxes,
                      fontsize=11.5, fontweight="bold", color=theme.ink)  # fmt: skip


def _draw_curve(axes: "Axes", curve: results.Curve, color: str, limit: float) -> None:
    axes.plot(curve.steps, curve.mean, color=color, linewidth=2.2, solid_capstyle="round",
              clip_on=False, zorder=3)  # fmt: skip
    if curve.seeds > 1:
        low = [max(0.0, m - s) for m, s in zip(curve.mean, curve.sd, strict=True)]
        high = [min(limit, m + s) for m, s in zip(curve.mean, curve.sd, strict=True)]
        axes.fill_between(curve.steps, low, high, color=color, alpha=0.18, linewidth=0)
    if curve.selected in curve.steps:
        value = curve.mean[curve.steps.index(curve.selected)]
        axes.plot([curve.selected], [value], "o", color=color, markersize=7, clip_on=False,
                  zorder=4)  # fmt: skip


def _baseline(runs: Sequence[Run], quantity: str | results.Column) -> float | None:
    """Returns the pretrained model's value on the validation split, or else on the test split.

    Analyses have none: before the first step they are of the model with its PEFT methods.
    """
    is_score = quantity != "loss" and isinstance(quantity, str)
    column = results.quantity_column(runs[0], quantity) if is_score else None
    rows = [
        row
        for run in runs
        for row in results.pretrained_rows(run)
        if results.Column.of(row) == column
    ]
    rows = [row for row in rows if row.split == "validation"] or rows
    return results.spread([results.percent(row) for row in rows])[0] if rows else None


def _titles(figure: "Figure", runs: Sequence[Run]) -> None:
    headline = verdicts.headline(verdicts.verdicts(runs)) or "Results"
    size = 16 if len(headline) <= 105 else 12.5
    figure.text(0.02, 0.955, _wrapped(headline), fontsize=size,
                fontweight="bold", color=LIGHT.ink, va="center")  # fmt: skip
    targets = ", ".join(dict.fromkeys(run.target for run in runs if run.target))
    finetuned = f"Finetuned on {targets}. " if targets else ""
    seeds = max(len(group) for group in results.methods(runs).values())
    spread = f"Mean of {seeds} seeds ± sd." if seeds > 1 else "One seed."
    figure.text(0.02, 0.91, f"{finetuned}{spread} Bars: test split, selected "
                "checkpoints, in brackets the change from pretrained. Curves: validation split, "
                "a dot at the selected step.", fontsize=9.5, color=LIGHT.muted,
                va="center")  # fmt: skip


def _wrapped(text: str) -> str:
    width = 105 if len(text) <= 105 else 130  # in smaller letters
    return textwrap.fill(text, width, max_lines=2, placeholder=" …")


def _legend(figure: "SubFigure", runs: Sequence[Run], theme: Theme) -> None:
    from matplotlib.lines import Line2D

    how = {v.method: f" (other tasks {v.how})" for v in verdicts.verdicts(runs) if v.how}
    lines = [
        Line2D([], [], color=color, linewidth=2.6, label=name + how.get(name, ""))
        for name, color in colors(runs).items()
    ]
    dashed = Line2D([], [], color=theme.pretrained, linestyle=(0, (3, 3)), label="pretrained")
    figure.legend(handles=[*lines, dashed], loc="upper left",
                  ncols=min(len(lines) + 1, 3 if how else 8),
                  frameon=False, bbox_to_anchor=(0.035, 0.985), fontsize=10.5,
                  labelcolor=theme.ink)  # fmt: skip


@contextmanager
def style(theme: Theme) -> Iterator[None]:
    import matplotlib

    settings: Any = {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "axes.edgecolor": theme.muted,
        "axes.labelcolor": theme.muted,
        "axes.titlecolor": theme.ink,
        "axes.titlesize": 11.5,
        "axes.linewidth": 0.8,
        "axes.axisbelow": True,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "text.color": theme.ink,
        "svg.fonttype": "none",
        "svg.hashsalt": "robust_ft",
    }
    with matplotlib.rc_context(settings):
        yield


def svg(figure: "Figure", prefix: str) -> str:
    """Returns an SVG element whose ids are unique in the page and whose ink is the page's."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'id="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text)
    text = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{prefix}-\1"', text)
    text = re.sub(r' xmlns(:xlink)?="[^"]+"', "", text)  # html knows svg; and no links
    text = re.sub(r'<svg width="[^"]+" height="[^"]+"', "<svg", text)
    text = re.sub(r'<svg height="[^"]+" width="[^"]+"', "<svg", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    return text
