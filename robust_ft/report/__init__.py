"""Reports from finished runs: a table, a picture and a page that needs nothing else.

`runs` reads run folders, `groups` tells runs of one name apart that differ in more than their seed,
`members` splits a run into its models, `results`, `verdicts`, `samples`, `comparisons` and
`tradeoff` compute from their rows (pure functions), and `table`, `figure`, `tradeoff_figure` and
`page` draw.
`python -m robust_ft.report MODEL_DIR [MODEL_DIR ...] --output=DIR`.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

from robust_ft.files import check_local


@dataclasses.dataclass(frozen=True)
class Report:
    """The files of a report; `tradeoff` is None if no OOD data was evaluated."""

    html: pathlib.Path
    png: pathlib.Path
    markdown: pathlib.Path
    tradeoff: pathlib.Path | None = None

    @property
    def files(self) -> tuple[pathlib.Path, ...]:
        """All of them."""
        paths = (self.html, self.png, self.tradeoff, self.markdown)
        return tuple(path for path in paths if path is not None)


def write_report(
    model_dirs: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]
) -> Report:
    """Writes `report.html`, `report.png` and `report.md` into `output` and prints the table.

    `tradeoff.png` is written as well if there is data that is out of distribution.

    Args:
        model_dirs: Folders of finished runs, or of the seeds of `run_seeds`. Runs of one name that
            differ in nothing but their seed are averaged.
        output: Folder of the report, created if it is missing; may be a run folder itself.

    Raises:
        UserError: A folder is not a finished run, or a file in it cannot be read.
    """
    from robust_ft.report import (
        comparisons,
        figure,
        groups,
        members,
        page,
        results,
        runs,
        table,
        tradeoff,
        tradeoff_figure,
    )

    for path in (*model_dirs, output):
        check_local(path, "The report's folder")
    grouped = groups.by_settings(runs.load_runs(model_dirs))
    loaded = members.split_members(grouped.runs)
    all_results = results.make_table(loaded)
    id_and_ood = tradeoff.make_tradeoff(loaded)
    compared = comparisons.make_comparisons(loaded)
    folder = pathlib.Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(
        folder / "report.html",
        folder / "report.png",
        folder / "report.md",
        folder / "tradeoff.png" if id_and_ood.columns else None,
    )
    figure.save_picture(loaded, report.png)
    if report.tradeoff is not None:
        tradeoff_figure.save(id_and_ood, figure.colors(loaded), report.tradeoff)
    report.html.write_text(
        page.render(loaded, all_results, id_and_ood, compared, grouped), encoding="utf-8"
    )
    text = [
        table.markdown(all_results),
        table.settings_markdown(grouped),
        table.tradeoff_markdown(id_and_ood),
        table.comparisons_markdown(compared),
    ]
    report.markdown.write_text("\n".join(filter(None, text)), encoding="utf-8")
    table.show(all_results, compared, grouped)
    return report
