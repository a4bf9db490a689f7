"""The table of a report as text: for a terminal and as Markdown."""

import html
import re
from typing import TYPE_CHECKING

from robust_ft import console
from robust_ft.report import results
from robust_ft.report.comparisons import DRAWS, Comparison, Comparisons, by_pair
from robust_ft.report.groups import Groups
from robust_ft.report.samples import EXTRA, MISSING, Sample, Samples, pieces
from robust_ft.report.tradeoff import Tradeoff

if TYPE_CHECKING:
    from robust_ft.metrics.significance import Bootstrap

CAPTION = (
    "Scores from 0 to 100; ± is the sample standard deviation over seeds. Norm. Avg. is the plain "
    "mean over the held-out tasks; format share is the percentage of their answers that have the "
    "target's format."
)
WITHOUT = (
    "Held-out tasks “without” PEFT methods are evaluated as if these had not been trained; in "
    "brackets is the score with them."
)
DAGGER = "† measured on the validation split: this run has no test result there."

ANALYSES = "Values of analyses, named with a colon, are no scores: see “Run the papers' analyses”."

DIFFERENT = "Settings in which runs of one name differ; they are not averaged"
TESTS = (
    "Differences are the first minus the second, on test splits, held-out tasks evaluated as in "
    "the table of results. p is of Welch's two-sided t-test over seeds, not corrected for the "
    "number of comparisons; in brackets are the 2.5th and 97.5th percentile of a paired bootstrap "
    f"over examples ({DRAWS:,} draws, the mean over seeds)."
)
SAMPLES = (
    "The first two examples of each evaluation, not picked; of several seeds the first run given. "
    "✓ is exactly a wanted text; ✗ is not, where another model is. Words that the nearest wanted "
    "text does not have are marked, those that it has beside them are struck out."
)


def head(column: results.Column) -> str:
    """Returns the head of a column, such as `mini_qa accuracy, 1-shot`."""
    if column.task == results.HELD_OUT:
        names = {results.NORM_AVG: "Norm. Avg.", results.FORMAT_SHARE: "format share %"}
        return f"held-out {names.get(column.metric, column.metric)}, {column.shots}-shot"
    if column.analysis:
        return f"{column.task.replace('_', ' ')}: {column.metric}"
    shots = f", {column.shots}-shot" if column.shots else ""
    return f"{column.task} {column.metric.replace('_', ' ')}{shots}"


def cells(table: results.Table, line: results.Line) -> list[str]:
    """Returns a line's cells as text, `–` where nothing was measured."""
    return [line.text(column) for column in table.columns]


def without(line: results.Line) -> str:
    """Returns how a model's held-out tasks were evaluated, "" if with all that was trained."""
    if not line.without:
        return ""
    return f"without {results.joined(line.without)}" + " (with)" * line.has_both


def caption(table: results.Table) -> str:
    """Returns the notes below a table."""
    splits = {cell.split for line in table.lines for cell in line.cells.values()}
    notes = [CAPTION]
    if splits - {"test"}:
        notes.append(DAGGER)
    if any(line.without for line in table.lines):
        notes.append(WITHOUT)
    if any(column.analysis for column in table.columns):
        notes.append(ANALYSES)
    return " ".join(notes)


def markdown(table: results.Table) -> str:
    """Returns the table as Markdown, with its caption."""
    names = [f"{line.method}<br>{line.checkpoint}" for line in table.lines]
    return f"{markdown_table([['', *names], *_rows(table)])}\n\n{caption(table)}\n"


def settings_rows(groups: Groups) -> list[list[str]]:
    """Returns a row for each setting in which runs of one name differ, below a row of heads."""
    names = list(dict.fromkeys(name for d in groups.differences for name in d.values))
    rows = [[d.field, *(d.values.get(name, "") for name in names)] for d in groups.differences]
    return [["", *names], *rows]


def notes(groups: Groups) -> list[str]:
    """Returns what is to be said of runs: examples in training and test, settings unknown."""
    found = [f"{run.name}: {sentence}" for run in groups.runs for sentence in run.overlaps]
    sentences = list(dict.fromkeys(found))
    if groups.unknown:
        sentences.append(
            f"The settings of {', '.join(groups.unknown)} are unknown (no version before 0.2 "
            "recorded them): these runs are grouped by their name."
        )
    return sentences


def settings_markdown(groups: Groups) -> str:
    """Returns the notes and the settings that differ as Markdown, "" if there are none."""
    parts = [f"{note}\n" for note in notes(groups)]
    if groups.differences:
        parts.append(f"## {DIFFERENT}\n\n{markdown_table(settings_rows(groups))}\n")
    return "\n".join(parts)


def tradeoff_rows(tradeoff: Tradeoff) -> list[list[str]]:
    """Returns a row for each method, below a row of heads: lambda, ID, OOD."""
    first, other = tradeoff.heads
    kinds = [first, *[other] * len(tradeoff.columns[1:])]
    heads = [kind + head(column) for kind, column in zip(kinds, tradeoff.columns, strict=True)]
    rows = [["", "seeds", "λ", *heads]]
    for line in tradeoff.lines:
        cells = [line.cells.get(column) for column in tradeoff.columns]
        seeds = max(cell.seeds for cell in line.cells.values())
        texts = [cell.text() if cell else "–" for cell in cells]
        rows.append([line.method, str(seeds), results.lambdas(line.weights) or "–", *texts])
    return rows


def comparison_rows(found: Comparisons) -> list[list[str]]:
    """Returns a row for each pair: target, OOD and Norm. Avg., below a row of heads."""
    rows = [
        [
            _pair(pair),
            *(_difference(cells[column]) if column in cells else "–" for column in found.columns),
        ]
        for pair, cells in by_pair(found.all).items()
    ]
    return [["", *map(head, found.columns)], *rows]


def task_comparison_rows(found: Comparisons) -> list[list[str]]:
    """Returns a row for each held-out task and a column for each pair, below a row of heads."""
    pairs = by_pair(found.all)
    rows = [
        [
            head(column),
            *(_difference(cells[column]) if column in cells else "–" for cells in pairs.values()),
        ]
        for column in found.tasks
    ]
    return [["", *map(_pair, pairs)], *rows]


def _pair(pair: tuple[str, str]) -> str:
    return f"{pair[0]} − {pair[1]}"


def _difference(c: Comparison) -> str:
    return difference_text(c.difference, c.p_value, c.bootstrap)


def difference_text(difference: float, p_value: float | None, bootstrap: "Bootstrap | None") -> str:
    """Returns `+1.2, p = 0.030, [+0.1, +2.3]`, of the tests those that there are."""
    parts = [f"{difference:+.1f}"]
    if p_value is not None:
        parts.append("p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}")
    if bootstrap is not None:
        parts.append(f"[{bootstrap.low:+.1f}, {bootstrap.high:+.1f}]")
    return ", ".join(parts).replace("-", "−")


def comparisons_markdown(found: Comparisons) -> str:
    """Returns the differences as Markdown, "" if nothing was compared."""
    if not found.all:
        return ""
    parts = ["## Differences", markdown_table(comparison_rows(found))]
    if found.tasks:
        parts.append(markdown_table(task_comparison_rows(found)))
    return "\n\n".join([*parts, TESTS]) + "\n"


def tradeoff_markdown(tradeoff: Tradeoff) -> str:
    """Returns the table as Markdown, "" if no OOD data was evaluated."""
    if not tradeoff.columns:
        return ""
    return f"## {tradeoff.title}\n\n{markdown_table(tradeoff_rows(tradeoff))}\n"


def samples_markdown(samples: Samples) -> str:
    """Returns outputs side by side as Markdown, a column a model, "" if there are none."""
    if not samples.rows:
        return ""
    rows = [["", "input", "wanted", *map(_escaped, samples.models)]]
    for sample in samples.rows:
        outputs = [_marked(sample, output) for output in sample.outputs]
        rows.append([*map(_escaped, (sample.task, sample.input, sample.target)), *outputs])
    return f"## Sample outputs\n\n{markdown_table(rows, '---')}\n\n{SAMPLES}\n"


def _marked(sample: Sample, output: str | None) -> str:
    if output is None:
        return "–"
    signs = {EXTRA: "**", MISSING: "~~"}
    words = [
        signs.get(piece.kind, "") + _escaped(piece.text) + signs.get(piece.kind, "")
        for piece in pieces(output, sample.references)
    ]
    mark = "✓" if sample.is_right(output) else "✗" if sample.has_right else ""
    return f"{' '.join(words) or '*nothing*'} {mark}".strip()


def _escaped(text: str) -> str:
    """Returns a text as Markdown shows it; `markdown_table` sees to the bars."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_~\[\]#])", r"\\\1", text)


def markdown_table(rows: list[list[str]], align: str = "---:") -> str:
    """Returns rows, heads first, as a table in Markdown; all but the first column as aligned."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    rule = ["---"] + [align] * (len(rows[0]) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])


def show(table: results.Table, found: Comparisons, groups: Groups) -> None:
    """Prints the table, the differences, and what is to be said of the runs."""
    names = [f"{line.method}\n{line.checkpoint}" for line in table.lines]
    if names:
        console.print_table("Results", ["", *names], _rows(table), caption(table))
    if any(comparison.second != results.PRETRAINED for comparison in found.all):
        heads, *rows = comparison_rows(found)
        console.print_table("Differences", heads, rows, TESTS)
    if groups.differences:
        heads, *rows = settings_rows(groups)
        console.print_table(DIFFERENT, heads, rows)
    for note in notes(groups):
        console.print_line(note, style="yellow")


def _rows(table: results.Table) -> list[list[str]]:
    """Returns a row with the number of seeds and one for each task; methods are columns."""
    columns = [cells(table, line) for line in table.lines]
    rows = [["seeds", *(str(line.seeds) for line in table.lines)]]
    if any(line.without for line in table.lines):
        rows.append(["held-out tasks evaluated", *(without(line) or "–" for line in table.lines)])
    for index, column in enumerate(table.columns):
        rows.append([head(column), *(column_cells[index] for column_cells in columns)])
    return rows
