"""The pictures of analyses, one for each, in the style of the report's."""

import math
import pathlib
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from robust_ft.analysis_results import ALIGNMENT, DRIFT, NEIGHBORS
from robust_ft.files import replacing
from robust_ft.report import analyses, figure, results
from robust_ft.report.figure import LIGHT, STAND_IN, Theme, style, svg
from robust_ft.report.results import FORMAT_SHARE, NORM_AVG, Column
from robust_ft.report.runs import Run
from robust_ft.summary import ANALYSIS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_VECTORS = 24  # of a soft prompt, in the picture; the others are in neighbors.json
_AGAINST = {FORMAT_SHARE: "Format share, %", NORM_AVG: "Norm. Avg. of the other tasks"}
ROLES = {"target": "the target", "ood": "OOD data", "held_out": "held-out tasks"}
_LAYER = re.compile(r"(?P<layer>(?P<stack>encoder|decoder)/layers_(?P<number>\d+))/(?P<part>.+)")


def save(name: str, runs: Sequence[Run], path: pathlib.Path) -> None:
    """Writes the picture of an analysis as PNG."""
    with style(LIGHT):
        drawn = _DRAW[name](runs, LIGHT)
        with replacing(path) as temporary:
            drawn.savefig(temporary, format="png")


def svg_panel(name: str, runs: Sequence[Run]) -> str:
    """Returns the picture of an analysis as an SVG element."""
    with style(STAND_IN):
        return svg(_DRAW[name](runs, STAND_IN), name)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, facecolor="white")


def _format(runs: Sequence[Run], theme: Theme) -> "Figure":
    """Scores and the format share against steps; below, both against the target's score."""
    drawn, target = _figure(13, 8.6), figure.describe(runs, "target")
    above = drawn.add_gridspec(1, 3, left=0.05, right=0.985, top=0.83, bottom=0.57, wspace=0.18)
    for index, quantity in enumerate(("target", NORM_AVG, FORMAT_SHARE)):
        figure.draw_curves(drawn, above[index], runs, quantity, theme)
    below = drawn.add_gridspec(1, 2, left=0.06, right=0.985, top=0.43, bottom=0.07, wspace=0.14)
    for index, quantity in enumerate((FORMAT_SHARE, NORM_AVG)):
        axes = drawn.add_subplot(below[index])
        _scatter_checkpoints(axes, runs, quantity, theme)
        title = f"{_AGAINST[quantity].removesuffix(', %')} against the target"
        _finish(axes, title, target, theme)
        axes.set(ylabel=_AGAINST[quantity], xlim=(-4, 104), ylim=(-4, 104))
    note = (
        "Validation split. Each point below is a checkpoint of the last stage, larger with its "
        "step; a ring is the selected one, the star the pretrained model."
    )
    _legend(drawn, runs, note, theme)
    return drawn


def _scatter_checkpoints(axes: "Axes", runs: Sequence[Run], quantity: str, theme: Theme) -> None:
    """Draws each checkpoint of the last stages as a point, joined in the order of their steps."""
    palette = figure.colors(runs)
    for run in runs:
        points = [p for p in analyses.format_points(run) if p.stage == run.stages[-1]]
        pairs = [(p.step, p.target, getattr(p, quantity)) for p in points]
        known = [(s, x, y) for s, x, y in pairs if x is not None and y is not None]
        if not known:
            continue
        steps, xs, ys = zip(*known, strict=True)
        first = next(p for p in analyses.format_points(run) if p.stage == run.stages[0])
        if first.step == 0 and first.target is not None and getattr(first, quantity) is not None:
            axes.plot(first.target, getattr(first, quantity), "*", color=theme.pretrained,
                      markersize=13, zorder=2)  # fmt: skip
        color = palette[run.name]
        axes.plot(xs, ys, color=color, linewidth=0.9, alpha=0.5, zorder=2)
        sizes = [18 + 50 * step / max(*steps, 1) for step in steps]
        axes.scatter(xs, ys, s=sizes, color=color, alpha=0.75, linewidths=0, zorder=3)
        selected = run.selected.get(run.stages[-1])
        for x, y in [(x, y) for step, x, y in known if step == selected]:
            axes.scatter(x, y, s=120, facecolors="none", edgecolors=theme.ink, linewidths=1.2,
                         zorder=4)  # fmt: skip


def _drift(runs: Sequence[Run], theme: Theme) -> "Figure":
    """Drift over steps; below, against what was forgotten of the held-out tasks."""
    columns = [Column("drift", 0, role, analysis=True) for role in ROLES]
    columns = [column for column in columns if results.curves(runs, column)]
    below = {
        role: points
        for role in ("target", "held_out")
        if (points := analyses.forgotten(runs, role))
    }
    drawn = _figure(13, 8.6 if below else 4.8)
    top, bottom = (0.83, 0.57) if below else (0.7, 0.13)
    above = drawn.add_gridspec(1, max(1, len(columns)), left=0.05, right=0.985, top=top,
                               bottom=bottom, wspace=0.18)  # fmt: skip
    for index, column in enumerate(columns):
        title = f"Drift on {ROLES[column.metric]}, nats a token"
        figure.draw_curves(drawn, above[index], runs, column, theme, title)
    spec = drawn.add_gridspec(1, 2, left=0.06, right=0.985, top=0.43, bottom=0.07, wspace=0.14)
    for index, (role, points) in enumerate(below.items()):
        axes = drawn.add_subplot(spec[index])
        _scatter_forgotten(axes, points, role, figure.colors(runs), theme)
        rho = analyses.rank_correlation([p.drift for p in points], [p.lost for p in points])
        said = "" if math.isnan(rho) or len(points) < 3 else f" (Spearman {rho:.2f})"
        title = f"Forgotten against drift on {ROLES[role]}{said}"
        _finish(axes, title.replace("-0", "−0"), "drift, nats a token", theme)
        axes.set_ylabel("points of held-out Norm. Avg. lost")
    note = (
        "KL(pretrained || model) on the validation split. Each point below is a checkpoint; large "
        "ones are selected."
    )
    _legend(drawn, runs, note, theme)
    return drawn


def _scatter_forgotten(
    axes: "Axes",
    points: Sequence[analyses.Forgotten],
    role: str,
    palette: Mapping[str, str],
    theme: Theme,
) -> None:
    """Draws checkpoints; hollow where held-out tasks were evaluated without what had drifted."""
    off = [p.without if role == "target" else () for p in points]
    for point, without in zip(points, off, strict=True):
        color = palette[point.method]
        axes.scatter(point.drift, point.lost, s=85 if point.selected else 26, edgecolors=color,
                     facecolors="none" if without else color, linewidths=1.4, zorder=3)  # fmt: skip
    if any(off):
        names = results.joined(tuple(dict.fromkeys(name for each in off for name in each)))
        axes.text(0.02, 0.93, f"hollow: held-out tasks without {names}", fontsize=9,
                  transform=axes.transAxes, color=theme.muted)  # fmt: skip
    axes.axhline(0, color=theme.pretrained, linestyle=(0, (3, 3)), linewidth=1.1)
    axes.set_xlim(left=0)


def _alignment(runs: Sequence[Run], theme: Theme) -> "Figure":
    """A row for each method, stage and variant: curves, then parts by layers first and last."""
    cells = [
        (name, stage, variant, values)
        for name, group in results.methods(runs).items()
        for stage in dict.fromkeys(stage for run in group for stage in run.stages)
        for variant, values in _cosines(group, stage).items()
    ]
    layers = [len({_place(m)[0] for v in values.values() for m in v if "/" in m})
              for _, _, _, values in cells]  # fmt: skip
    heights = [max(3.0, 1.5 + 0.28 * count) for count in layers]
    drawn = _figure(15, sum(heights) + 0.8)
    rows = drawn.add_gridspec(
        len(cells), 4, width_ratios=[1.2, 0.26, 1, 1], height_ratios=heights, left=0.05, right=0.99,
        top=1 - 0.9 / (sum(heights) + 0.8), bottom=0.6 / (sum(heights) + 0.8), hspace=0.45,
        wspace=0.22,
    )  # fmt: skip
    for row, (name, stage, variant, values) in enumerate(cells):
        axes = drawn.add_subplot(rows[row, 0])
        _draw_cosines(axes, values, theme)
        how = variant.removeprefix(analyses.TASKS[ALIGNMENT]).replace("_", " ").strip()
        _finish(axes, f"{name}, {stage}: {how or 'last layer'}", "step", theme)
        for index, step in enumerate(dict.fromkeys((min(values), max(values)))):
            _draw_layers(drawn.add_subplot(rows[row, 2 + index]), values[step], step, theme)
    drawn.text(0.05, 1 - 0.3 / (sum(heights) + 0.8), "Cosine of the gradient and the format "
               "gradient: 1, all that is learned is the format", fontsize=13, fontweight="bold",
               color=theme.ink, va="center")  # fmt: skip
    return drawn


def _cosines(group: Sequence[Run], stage: str) -> dict[str, dict[int, dict[str, float]]]:
    """Returns {variant: {step: {part: mean over seeds}}} of a stage, on validation data if any."""
    rows = [
        row
        for run in group
        for row in run.rows
        if (row.role, row.stage) == (ANALYSIS, stage)
        and row.task.startswith(analyses.TASKS[ALIGNMENT])
        and (row.metric == "cosine" or "/" in row.metric)
    ]
    validated = [row for row in rows if row.split != "test"]
    found: dict[str, dict[int, dict[str, list[float]]]] = {}
    for row in validated or rows:
        of_step = found.setdefault(row.task, {}).setdefault(row.step, {})
        of_step.setdefault(row.metric, []).append(row.value)
    return {
        variant: {
            step: {part: statistics.fmean(values) for part, values in parts.items()}
            for step, parts in sorted(steps.items())
        }
        for variant, steps in found.items()
    }


def _place(metric: str) -> tuple[str, str]:
    """Returns the layer and the part of a metric: `decoder/layers_1` and `mlp`, or `self key`."""
    match = _LAYER.fullmatch(metric)
    assert match is not None
    part = match["part"].replace("encoder_decoder_attention", "cross")
    part = part.replace("self_attention", "self").replace("attention", "self")
    return match["layer"], part.replace("/", " ")


def _draw_cosines(axes: "Axes", values: Mapping[int, Mapping[str, float]], theme: Theme) -> None:
    """Draws the parts of the decoder's last layer, and all parts together, against steps."""
    parts = list(dict.fromkeys(part for of_step in values.values() for part in of_step))
    placed = [(_place(part), part) for part in parts if part.startswith("decoder/")]
    last = max((int(layer.rpartition("_")[2]) for (layer, _), _ in placed), default=0)
    shown = {"cosine": "all parts"} | {
        part: name
        for (layer, name), part in placed
        if layer == f"decoder/layers_{last}" and not name.endswith("out")
    }
    palette = iter(figure.PALETTE * 2)
    for part, name in shown.items():
        points = [(step, of_step[part]) for step, of_step in values.items() if part in of_step]
        whole = part == "cosine"
        axes.plot(*zip(*points, strict=True), "o-" if not name.startswith("cross") else "o--",
                  color=theme.ink if whole else next(palette), linewidth=2.6 if whole else 1.4,
                  markersize=3, label=name)  # fmt: skip
    axes.axhline(0, color=theme.pretrained, linewidth=0.9)
    cosines = [of_step[part] for of_step in values.values() for part in shown if part in of_step]
    low = min([0.0, *(cosine for cosine in cosines if not math.isnan(cosine))])
    axes.set_ylim(max(-1.05, 1.15 * low - 0.03), 1.05)
    axes.legend(frameon=False, fontsize=8.5, labelcolor=theme.ink, loc="upper left",
                bbox_to_anchor=(1, 1.03))  # fmt: skip


def _draw_layers(axes: "Axes", values: Mapping[str, float], step: int, theme: Theme) -> None:
    """Draws the cosine of each part of each layer as a square."""
    placed = {_place(metric): value for metric, value in values.items() if "/" in metric}
    layers = list(dict.fromkeys(layer for layer, _ in placed))
    layers.sort(key=lambda layer: (layer.startswith("decoder"), int(layer.rpartition("_")[2])))
    parts = sorted({part for _, part in placed})
    grid = np.array([[placed.get((layer, part), np.nan) for part in parts] for layer in layers])
    axes.imshow(grid, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    if grid.size <= 120:
        for (row, column), value in np.ndenumerate(grid):
            if not np.isnan(value):
                ink = "white" if abs(value) > 0.6 else theme.ink
                axes.text(column, row, f"{value:.2f}".replace("-", "−"), ha="center", va="center",
                          fontsize=7.5, color=ink)  # fmt: skip
    axes.set_xticks(range(len(parts)), [part.replace(" ", "\n") for part in parts], fontsize=8)
    axes.set_yticks(range(len(layers)), [layer.replace("/layers_", " ") for layer in layers],
                    fontsize=8)  # fmt: skip
    axes.set_title(f"step {step}", loc="left", fontsize=10)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _neighbors(runs: Sequence[Run], theme: Theme) -> "Figure":
    """A table of neighbours for the first run of each method; below each, its values."""
    tables = []
    for name, group in results.methods(runs).items():
        stage, step, vectors = analyses.prompt_vectors(group[0])
        if vectors:
            tables.append((f"{name}: {stage}, step {step}", vectors))
    rows = max([len(vectors[:MOST_VECTORS]) for _, vectors in tables] + [3])
    count = max([len(vectors[0].neighbors) for _, vectors in tables] + [1])
    drawn = _figure(max(6.0, (1.6 + 1.35 * count) * max(1, len(tables))), 1.4 + 0.3 * rows)
    axes = drawn.subplots(1, max(1, len(tables)), squeeze=False)[0]
    for panel, (title, vectors) in zip(axes, tables, strict=False):
        _draw_neighbors(panel, vectors, theme)
        more = len(vectors) - MOST_VECTORS
        title += f" (and {more} more vectors)" if more > 0 else ""
        panel.set_title(title, loc="left", fontweight="bold")
    drawn.text(0.02, 0.02, "Nearest tokens by cosine, the nearest first; bold: also another "
               "vector's nearest.", fontsize=9, color=theme.muted)  # fmt: skip
    drawn.subplots_adjust(left=0.12, right=0.985, top=1 - 0.5 / (1.4 + 0.3 * rows),
                          bottom=0.75 / (1.4 + 0.3 * rows), wspace=0.3)  # fmt: skip
    return drawn


def _draw_neighbors(axes: "Axes", vectors: Sequence[analyses.Vector], theme: Theme) -> None:
    nearest = [vector.neighbors[0][0] for vector in vectors]
    shown = vectors[:MOST_VECTORS]
    grid = np.array([[cosine for _, cosine in vector.neighbors] for vector in shown])
    axes.imshow(grid, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, vector in enumerate(shown):
        for column, (text, cosine) in enumerate(vector.neighbors):
            shared = column == 0 and nearest.count(text) > 1
            text = (text if len(text) <= 14 else f"{text[:13]}…").replace("$", r"\$")
            axes.text(column, row, f"{text} {cosine:.2f}", ha="center", va="center", fontsize=8,
                      fontweight="bold" if shared else "normal",
                      color="white" if cosine > 0.6 else theme.ink)  # fmt: skip
    axes.set_xticks([])
    axes.set_yticks(range(len(shown)), [vector.name for vector in shown], fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _finish(axes: "Axes", title: str, label: str, theme: Theme) -> None:
    axes.set_title(title, loc="left", fontweight="bold", color=theme.ink)
    axes.set_xlabel(label)
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(drawn: "Figure", runs: Sequence[Run], note: str, theme: Theme) -> None:
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=color, linewidth=2.6, label=name)
        for name, color in figure.colors(runs).items()
    ]
    dashed = Line2D([], [], color=theme.pretrained, linestyle=(0, (3, 3)), label="pretrained")
    drawn.legend(handles=[*lines, dashed], loc="upper left", ncols=6, frameon=False,
                 bbox_to_anchor=(0.035, 0.995), fontsize=10.5, labelcolor=theme.ink)  # fmt: skip
    top = 1 - 0.55 / drawn.get_figheight()
    drawn.text(0.05, top, note, fontsize=9.5, color=theme.muted, va="center")


_DRAW: Mapping[str, Callable[[Sequence[Run], Theme], "Figure"]] = {
    ALIGNMENT: _alignment,
    DRIFT: _drift,
    NEIGHBORS: _neighbors,
    analyses.FORMAT: _format,
}
