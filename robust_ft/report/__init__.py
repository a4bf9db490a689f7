"""Reports from finished runs: a table, a picture and a page that needs nothing else.

`runs` reads run folders and `few_shot` their few-shot evaluations, `groups` tells runs of one name
apart that differ in more than their seed, `members` splits a run into its models, `results`,
`verdicts`, `samples`, `comparisons`, `tradeoff` and `promptability` compute from their rows (pure
functions), and `table`, `choices` (what sweeps tried), `figure`, `page` and the modules called
after those draw.
`python -m robust_ft.report MODEL_DIR [MODEL_DIR ...] --output=DIR`.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

from robust_ft import buckets
from robust_ft.files import as_path


@dataclasses.dataclass(frozen=True)
class Report:
    """The files of a report.

    Attributes:
        html: The page.
        markdown: Its tables.
        png: Scores before and after, and curves; None if there are few-shot evaluations alone.
        tradeoff: ID against OOD; None if no OOD data was evaluated.
        promptability: Accuracy on each dataset; None if there are no few-shot evaluations.
    """

    html: pathlib.Path
    markdown: pathlib.Path
    png: pathlib.Path | None = None
    tradeoff: pathlib.Path | None = None
    promptability: pathlib.Path | None = None

    @property
    def files(self) -> tuple[pathlib.Path, ...]:
        """All of them."""
        paths = (self.html, self.png, self.tradeoff, self.promptability, self.markdown)
        return tuple(path for path in paths if path is not None)


def write_report(
    model_dirs: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]
) -> Report:
    """Writes `report.html`, `report.png` and `report.md` into `output` and prints the table.

    `tradeoff.png` is written as well if there is data that is out of distribution, and
    `promptability.png` if there are few-shot evaluations. Where there is nothing else, there is no
    `report.png`.

    Args:
        model_dirs: Folders of finished runs, of the seeds of `run_seeds`, or of sweeps, which stand
            for their choice. Runs of one name that differ in nothing but their seed are averaged.
        output: Folder of the report, created if it is missing; may be a run folder itself.

    Raises:
        UserError: A folder is not a finished run, or a file in it cannot be read.
    """
    from robust_ft.report import (
        choices,
        comparisons,
        figure,
        groups,
        members,
        page,
        promptability,
        promptability_figure,
        promptability_table,
        results,
        runs,
        samples,
        table,
        tradeoff,
        tradeoff_figure,
    )

    for path in (*model_dirs, output):
        buckets.check(path, "The report's folder")
    grouped = groups.by_settings(runs.load_runs(model_dirs))
    loaded = members.split_members(grouped.runs)
    evaluated = [run for run in loaded if run.rows]
    all_results = results.make_table(evaluated)
    id_and_ood = tradeoff.make_tradeoff(evaluated)
    compared = comparisons.make_comparisons(evaluated)
    prompted = promptability.make_promptability(grouped.runs)
    folder = as_path(output)
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(
        folder / "report.html",
        folder / "report.md",
        folder / "report.png" if evaluated else None,
        folder / "tradeoff.png" if id_and_ood.columns else None,
        folder / "promptability.png" if prompted else None,
    )
    if report.png is not None:
        figure.save_picture(evaluated, report.png)
    if report.tradeoff is not None:
        tradeoff_figure.save(id_and_ood, figure.colors(loaded), report.tradeoff)
    if report.promptability is not None and prompted is not None:
        promptability_figure.save(prompted, report.promptability)
    report.html.write_text(
        page.render(loaded, all_results, id_and_ood, compared, grouped, prompted), encoding="utf-8"
    )
    text = [
        table.markdown(all_results) if evaluated else "",
        table.settings_markdown(grouped),
        choices.markdown(grouped.runs),
        table.tradeoff_markdown(id_and_ood),
        table.comparisons_markdown(compared),
        promptability_table.markdown(prompted),
        table.samples_markdown(samples.samples(evaluated)),
    ]
    report.markdown.write_text("\n".join(filter(None, text)), encoding="utf-8")
    table.show(all_results, compared, grouped)
    choices.show(grouped.runs)
    promptability_table.show(prompted)
    return report
