"""How settings were chosen: what sweeps tried, their validation scores, and the choices."""

import math
from collections.abc import Sequence

from robust_ft import console
from robust_ft.report import results, table
from robust_ft.report.runs import Run
from robust_ft.sweep_file import Sweep, Tried

TITLE = "How settings were chosen"
CAPTION = (
    "Every value was run and scored on in-distribution validation data; only the chosen one was "
    "evaluated on test splits. ± is the sample standard deviation over seeds."
)
_HEADS = ["", "tried: validation score", "chosen", "by", "to be said"]
_NOT_SWEPT = ["nothing", "as in its config", "–", "–"]


def rows(runs: Sequence[Run]) -> list[list[str]]:
    """Returns a row for each method below a row of heads, nothing if no run is of a sweep."""
    if not any(run.sweep for run in runs):
        return []
    found = []
    for name, group in results.methods(runs).items():
        sweeps: list[Sweep] = []
        for run in group:
            if run.sweep is not None and run.sweep not in sweeps:
                sweeps.append(run.sweep)
        found += [[name, *row] for row in map(_row, sweeps)] or [[name, *_NOT_SWEPT]]
    return [_HEADS, *found]


def markdown(runs: Sequence[Run]) -> str:
    """Returns the table as Markdown, "" if no run is of a sweep."""
    found = rows(runs)
    return f"## {TITLE}\n\n{table.markdown_table(found)}\n\n{CAPTION}\n" if found else ""


def show(runs: Sequence[Run]) -> None:
    """Prints the table if a run is of a sweep."""
    if found := rows(runs):
        console.print_table(TITLE, found[0], found[1:], CAPTION)


def _row(sweep: Sweep) -> list[str]:
    chosen = sweep.chosen
    count = len(sweep.tried) * len(sweep.seeds)
    tried = "; ".join(f"{point.name}: {_score(point, sweep.seeds)}" for point in sweep.tried)
    if len(sweep.grid) == 1:
        (name,) = sweep.grid
        tried = tried.replace(f"; {name} ", "; ")  # once is enough
    return [
        tried,
        chosen.name if chosen else "–",
        f"{', '.join(sweep.on)} of {sweep.by}, {count} runs",
        " ".join(sweep.sentences()) or "–",
    ]


def _score(point: Tried, seeds: Sequence[int]) -> str:
    if math.isnan(point.score(seeds)):
        return "diverged"
    mean, sd = results.spread([point.scores[seed] for seed in seeds])
    return f"{mean:.1f}" + ("" if sd is None else f" ± {sd:.1f}")
