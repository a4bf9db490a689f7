"""Reports from finished runs: a table, a picture and a page that needs nothing else.

`runs` reads run folders, `results` computes from their rows (pure functions), and `table`,
`figure` and `page` draw. `python -m robust_ft.report MODEL_DIR [MODEL_DIR ...] --output=DIR`.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Report:
    """Where the files of a report are."""

    html: pathlib.Path
    png: pathlib.Path
    markdown: pathlib.Path


def write_report(
    model_dirs: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]
) -> Report:
    """Writes `report.html`, `report.png` and `report.md` into `output` and prints the table.

    Args:
        model_dirs: folders of finished runs; runs of one name and different seeds are averaged.
        output: created if it is missing; may be a run folder itself.

    Raises:
        UserError: a folder is not a finished run, or a file in it cannot be read.
    """
    from robust_ft.report import page, results, runs, table

    loaded = runs.load_runs(model_dirs)
    made = results.make_table(loaded)
    folder = pathlib.Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(folder / "report.html", folder / "report.png", folder / "report.md")
    from robust_ft.report import figure

    figure.save_picture(loaded, report.png)
    report.html.write_text(page.render(loaded, made), encoding="utf-8")
    report.markdown.write_text(table.markdown(made), encoding="utf-8")
    table.show(made)
    return report
