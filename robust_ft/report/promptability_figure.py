"""Accuracy on each dataset as a picture: a panel a dataset, a dot a template, a bar their mean."""

import pathlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from robust_ft.files import replacing
from robust_ft.report.figure import LIGHT, PALETTE, STAND_IN, Theme, style, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from robust_ft.report.few_shot import Setting
    from robust_ft.report.promptability import Promptability

MARKERS = "oD^sv"
_COLUMNS = 6  # of panels
_KEYS = 4  # in a line of the legend


class _Look(NamedTuple):
    color: str
    marker: str


def save(found: "Promptability", path: pathlib.Path) -> None:
    """Writes the picture as PNG."""
    with style(LIGHT):
        figure = _draw(found, LIGHT)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")


def svg_panel(found: "Promptability") -> str:
    """Returns the picture as an SVG element."""
    with style(STAND_IN):
        return svg(_draw(found, STAND_IN), "promptability")


def _looks(arms: Iterable[str]) -> dict[str, _Look]:
    """Returns each arm's look: a colour for a recipe, a marker for what is added to it.

    A run is called after its gin files, such as "p3_mtl_tp+deep_prompt".
    """
    recipes: dict[str, int] = {}
    additions: dict[str, int] = {}
    looks = {}
    for arm in arms:
        recipe, _, added = arm.partition("+")
        color = recipes.setdefault(recipe, len(recipes))
        marker = additions.setdefault(added, len(additions))
        looks[arm] = _Look(PALETTE[color % len(PALETTE)], MARKERS[marker % len(MARKERS)])
    return looks


def _draw(found: "Promptability", theme: Theme) -> "Figure":
    """Draws the settings below each other, each with its datasets side by side."""
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(found.datasets))
    lines = -(-len(found.datasets) // columns)  # of each setting
    rows = lines * len(found.settings)
    looks = _looks(found.arms)
    head = 0.5 + 0.21 * -(-(len(looks) + 1) // _KEYS)
    height = 1.9 * rows + head
    figure = Figure(figsize=(max(9.4, 2.1 * columns + 0.8), height), dpi=150, facecolor="none")
    if theme is LIGHT:
        figure.set_facecolor("white")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for index, setting in enumerate(found.settings):
        block = axes[index * lines : (index + 1) * lines].flat
        for number, panel in enumerate(block):
            if number < len(found.datasets):
                _panel(panel, found, setting, found.datasets[number], looks, theme)
            else:
                panel.set_visible(False)
        axes[index * lines, 0].set_ylabel(f"{setting.text}\naccuracy", color=theme.ink)
    figure.subplots_adjust(
        left=0.75 / figure.get_figwidth(), right=0.985, bottom=0.15 / height,
        top=1 - head / height, wspace=0.08, hspace=0.22,
    )  # fmt: skip
    _legend(figure, looks, theme)
    return figure


def _panel(
    axes: "Axes",
    found: "Promptability",
    setting: "Setting",
    dataset: str,
    looks: dict[str, _Look],
    theme: Theme,
) -> None:
    templates = [template for template in found.templates if template.dataset == dataset]
    chances = {t.random_accuracy for t in templates if t.random_accuracy is not None}
    for chance in chances:
        axes.axhline(chance, linestyle=(0, (3, 3)), linewidth=1.1, color=theme.pretrained, zorder=1)
    for place, (arm, look) in enumerate(looks.items()):
        accuracies = found.cells[arm, setting].accuracies
        values = [accuracies[template] for template in templates if template in accuracies]
        if not values:
            continue
        axes.plot([place] * len(values), values, look.marker, color=look.color, markersize=3.5,
                  alpha=0.55, markeredgewidth=0, zorder=3)  # fmt: skip
        if len(values) == len(templates):
            mean = sum(values) / len(values)
            axes.plot([place - 0.38, place + 0.38], [mean, mean], color=look.color, linewidth=2.2,
                      solid_capstyle="butt", zorder=4)  # fmt: skip
    axes.set(xlim=(-0.7, len(looks) - 0.3), ylim=(-2, 102), xticks=[])
    axes.set_title(dataset, loc="left", fontsize=9, color=theme.ink, pad=3)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: "Figure", looks: dict[str, _Look], theme: Theme) -> None:
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=look.color, marker=look.marker, markersize=5, linewidth=2, label=arm)
        for arm, look in looks.items()
    ]
    dashed = Line2D([], [], color=theme.pretrained, linestyle=(0, (3, 3)), label="guessing")
    figure.legend(handles=[*lines, dashed], loc="upper left", ncols=_KEYS, frameon=False,
                  bbox_to_anchor=(0.05, 1.0), fontsize=8.5, labelcolor=theme.ink)  # fmt: skip
