"""The table of a report as text: for a terminal and as Markdown."""

from robust_ft import console
from robust_ft.report import results

CAPTION = (
    "Scores from 0 to 100; ± is the sample standard deviation over seeds. Norm. Avg. is the plain "
    "mean over the held-out tasks; format share is the percentage of their answers that have the "
    "target's format."
)
DAGGER = "† measured on the validation split: this run has no test result there."


def head(column: results.Column) -> str:
    """Returns the head of a column, such as `mini_qa accuracy, 1-shot`."""
    if column.task == results.HELD_OUT:
        names = {results.NORM_AVG: "Norm. Avg.", results.FORMAT_SHARE: "format share %"}
        return f"held-out {names.get(column.metric, column.metric)}, {column.shots}-shot"
    shots = f", {column.shots}-shot" if column.shots else ""
    return f"{column.task} {column.metric.replace('_', ' ')}{shots}"


def cells(table: results.Table, line: results.Line) -> list[str]:
    """Returns a line's cells as text, `–` where nothing was measured."""
    return [line.cells[column].text() if column in line.cells else "–" for column in table.columns]


def caption(table: results.Table) -> str:
    """Returns the notes below a table."""
    found = [cell for line in table.lines for cell in line.cells.values()]
    return CAPTION + (f" {DAGGER}" if any(cell.split != "test" for cell in found) else "")


def markdown(table: results.Table) -> str:
    """Returns the table as Markdown, with its caption."""
    names = [f"{line.method}<br>{line.checkpoint}" for line in table.lines]
    rows = [["", *names], *_rows(table)]
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    rule = ["---"] + ["---:"] * len(names)
    lines = [f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]]]
    return "\n".join(lines) + f"\n\n{caption(table)}\n"


def show(table: results.Table) -> None:
    """Prints the table."""
    names = [f"{line.method}\n{line.checkpoint}" for line in table.lines]
    console.print_table("Results", ["", *names], _rows(table), caption(table))


def _rows(table: results.Table) -> list[list[str]]:
    """Returns the number of seeds and a row for each task: tasks are many and pages are narrow."""
    columns = [cells(table, line) for line in table.lines]
    rows = [["seeds", *(str(line.seeds) for line in table.lines)]]
    for index, column in enumerate(table.columns):
        rows.append([head(column), *(column_cells[index] for column_cells in columns)])
    return rows
