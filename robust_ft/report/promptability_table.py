"""Promptability in words and tables: rows of text for a page, for Markdown and for a terminal."""

from typing import TYPE_CHECKING

from robust_ft import console
from robust_ft.report.comparisons import DRAWS
from robust_ft.report.results import joined
from robust_ft.report.table import difference_text, markdown_table

if TYPE_CHECKING:
    from robust_ft.report.few_shot import Setting
    from robust_ft.report.promptability import Cell, Promptability

TITLE = "Promptability"
DEFINITION = (
    "ARG, the average relative gain, is the mean over templates of (accuracy − random baseline) / "
    "random baseline, in percent: 0 is guessing. In brackets it is averaged within each dataset "
    "first. The random baseline of a template is the mean of 100 / number of choices over its "
    "examples."
)
TUNED = (
    "At more shots the prompt alone is tuned on so many examples of the task; the last epoch is "
    "the result."
)
# By `FewShot.best_on`.
BEST = {
    "split": "The best epoch is that with the highest accuracy on the evaluated examples "
    "themselves: an upper bound, not a result.",
    "examples": "The best epoch is that with the lowest loss on the examples it was tuned on.",
}
TESTS = (
    "ARG (over templates) of the first minus that of the second. p is of Welch's two-sided t-test "
    "over the runs' seeds, not corrected for the number of comparisons; in brackets are the 2.5th "
    f"and 97.5th percentile of a paired bootstrap over evaluated examples ({DRAWS:,} draws, one "
    "for all templates of a dataset, correctness averaged over seeds)."
)


def headline(found: "Promptability") -> str:
    """Returns one sentence on the arm with the highest ARG; "" if there is none.

    At the most shots that were evaluated, after the last epoch.
    """
    setting = max((s for s in found.settings if s.which != "best"), key=lambda s: s.shots)
    gains = {
        arm: gain.mean for arm in found.arms if (gain := found.cells[arm, setting].gain) is not None
    }
    if len(gains) < 2:
        return ""
    best = max(gains, key=lambda arm: gains[arm])
    return f"{best} is the easiest to prompt: ARG {gains[best]:.1f} at {setting.shots} shots"


def describe(found: "Promptability") -> str:
    """Returns what was evaluated, in a sentence."""
    runs, draws = found.seeds
    parts = [f"{len(found.templates)} templates of {len(found.datasets)} datasets"]
    parts.append(f"mean of {runs} seeds" if runs > 1 else "one seed")
    if draws:
        parts.append(f"{draws} draws of examples each" if draws > 1 else "one draw of examples")
    return ", ".join(parts) + "."


def notes(found: "Promptability") -> list[str]:
    """Returns what the numbers are, how 0 shots were evaluated, and what is left out."""
    sentences = [DEFINITION]
    runs, draws = found.seeds
    if draws:
        sentences += [TUNED, *(BEST[how] for how in found.best_on if how in BEST)]
    off: dict[tuple[str, ...], list[str]] = {}
    for arm, modules in found.without.items():
        off.setdefault(modules, []).append(arm)
    with_all = off.pop((), [])
    for modules, arms in off.items():
        sentences.append(f"0-shot without {joined(modules)}: {', '.join(arms)}.")
    if off and with_all:
        sentences.append(f"With all that was trained: {', '.join(with_all)}.")
    if runs > 1:
        each = ", each of which is the mean over its draws of examples" if draws > 1 else ""
        sentences.append(f"± is the sample standard deviation over the runs' seeds{each}.")
    elif draws > 1:
        sentences.append("± is the sample standard deviation over draws of examples.")
    return [" ".join(sentences), *found.notes]


def gain_rows(found: "Promptability") -> list[list[str]]:
    """Returns a row for each arm and a column for each setting, below a row of heads."""
    rows = [["ARG", *(setting.text for setting in found.settings)]]
    for arm in found.arms:
        rows.append([arm, *(_gain(found.cells[arm, setting]) for setting in found.settings)])
    return rows


def _gain(cell: "Cell") -> str:
    if cell.gain is None or cell.gain_by_dataset is None:
        return "–"
    return f"{cell.gain.text} ({cell.gain_by_dataset.mean:.1f})".replace("-", "−")


def accuracy_rows(found: "Promptability", setting: "Setting") -> list[list[str]]:
    """Returns a row for each template and a column for each arm, below a row of heads."""
    rows = [[f"accuracy, {setting.text}", "dataset", "random baseline", *found.arms]]
    for template in found.templates:
        chance = template.random_accuracy
        values = [found.cells[arm, setting].accuracies.get(template) for arm in found.arms]
        rows.append(
            [
                template.task,
                template.dataset,
                "–" if chance is None else f"{chance:.1f}",
                *("–" if value is None else f"{value:.1f}" for value in values),
            ]
        )
    return rows


def difference_rows(found: "Promptability") -> list[list[str]]:
    """Returns a row for each pair of arms and a column for each setting, below a row of heads."""
    by_setting = [found.differences(setting) for setting in found.settings]
    pairs = dict.fromkeys(pair for differences in by_setting for pair in differences)
    rows = [["", *(setting.text for setting in found.settings)]]
    for pair in pairs:
        cells = [difference_text(*d[pair]) if pair in d else "–" for d in by_setting]
        rows.append([f"{pair[0]} − {pair[1]}", *cells])
    return rows


def markdown(found: "Promptability | None") -> str:
    """Returns the section as Markdown, "" without few-shot evaluations."""
    if found is None:
        return ""
    parts = [f"## {TITLE}", describe(found), markdown_table(gain_rows(found)), *notes(found)]
    if len(rows := difference_rows(found)) > 1:
        parts += [markdown_table(rows), TESTS]
    parts += [markdown_table(accuracy_rows(found, setting)) for setting in found.settings]
    return "\n\n".join(parts) + "\n"


def show(found: "Promptability | None") -> None:
    """Prints the ARG of each arm, and what is to be said of it."""
    if found is None:
        return
    heads, *rows = gain_rows(found)
    caption, *left_out = notes(found)
    console.print_table(f"{TITLE}: {describe(found)}", heads, rows, caption)
    for note in left_out:
        console.print_line(note, style="yellow")
