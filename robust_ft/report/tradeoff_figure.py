"""The trade-off between ID and OOD as a picture: models as points, coloured by lambda."""

import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from robust_ft.files import replacing
from robust_ft.report import table
from robust_ft.report.figure import LIGHT, STAND_IN, Theme, style, svg
from robust_ft.report.tradeoff import Point, Tradeoff

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = "viridis"  # from 0, full finetuning, to 1, the lightweight model
MARKERS = "osD^vP*X"


def save(tradeoff: Tradeoff, palette: Mapping[str, str], path: pathlib.Path) -> None:
    """Writes the picture as PNG."""
    with style(LIGHT):
        figure = _draw(tradeoff, palette, LIGHT)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")


def svg_panel(tradeoff: Tradeoff, palette: Mapping[str, str]) -> str:
    """Returns the picture as an SVG element."""
    with style(STAND_IN):
        return svg(_draw(tradeoff, palette, STAND_IN), "tradeoff")


def _draw(tradeoff: Tradeoff, palette: Mapping[str, str], theme: Theme) -> "Figure":
    """Draws a panel for each selection of lambda, with all methods that have none in each."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    grids = {name: points for name, points in tradeoff.points.items() if len(points) > 1}
    single = {name: points[0] for name, points in tradeoff.points.items() if len(points) == 1}
    count = max(1, len(grids))
    columns = min(2, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(5.2 * columns + 0.8, 4.3 * rows), dpi=150, facecolor="none")
    if theme is LIGHT:
        figure.set_facecolor("white")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    shown = list(axes.flat)
    for panel, name in zip(shown, grids or [""], strict=False):
        for marker, (method, point) in zip(MARKERS * 3, single.items(), strict=False):
            _single(panel, method, point, marker, palette[method])
        if name:
            _grid(panel, name, grids[name], theme)
        first, other = tradeoff.heads
        panel.set_xlabel(first + table.head(tradeoff.columns[0]))
        panel.set_ylabel(other + ", ".join(map(table.head, tradeoff.columns[1:])))
        panel.grid(color=theme.grid, linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8.5, labelcolor=theme.ink, loc="best")
    for panel in shown[count:]:
        panel.set_visible(False)
    figure.subplots_adjust(left=0.1, right=0.86 if grids else 0.97, hspace=0.28, wspace=0.14)
    if grids:
        place = figure.add_axes((0.9, 0.2, 0.014, 0.6))
        bar = figure.colorbar(ScalarMappable(Normalize(0, 1), COLORS), cax=place)
        what = "λ: 0 is full finetuning, 1 the lightweight model; between weights 0 is pretrained"
        bar.set_label(what, color=theme.ink)
        bar.outline.set_visible(False)
    return figure


def _single(axes: "Axes", method: str, point: Point, marker: str, color: str) -> None:
    axes.plot(*zip(*point.seeds, strict=True), marker, color=color, markersize=3, alpha=0.45)
    axes.plot(point.id, point.ood, marker, color=color, markersize=8, label=method, zorder=4)


def _grid(axes: "Axes", name: str, points: tuple[Point, ...], theme: Theme) -> None:
    axes.set_title(name, loc="left", fontweight="bold", color=theme.ink)
    axes.plot([p.id for p in points], [p.ood for p in points], color=theme.muted, linewidth=1)
    for size, alpha, seeds in ((14, 0.5, True), (64, 1.0, False)):
        places = [(p, xy) for p in points for xy in (p.seeds if seeds else ((p.id, p.ood),))]
        axes.scatter(
            [xy[0] for _, xy in places],
            [xy[1] for _, xy in places],
            c=[p.weight or 0.0 for p, _ in places],
            cmap=COLORS, vmin=0, vmax=1, s=size, alpha=alpha, linewidths=0, zorder=5,
        )  # fmt: skip
    chosen = [p for p in points if p.chosen]
    axes.scatter([p.id for p in chosen], [p.ood for p in chosen], s=150, facecolors="none",
                 edgecolors=theme.ink, linewidths=1.3, zorder=6,
                 label="λ that a seed chose by ID validation")  # fmt: skip
