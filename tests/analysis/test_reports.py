"""What reports and pictures make of analyses of finished runs, on made run folders."""

import json

import numpy as np
import pytest
from report_runs import make_run, row, write_samples
from scipy import stats

from robust_ft.analysis_results import AnalysisResults, with_analyses
from robust_ft.errors import UserError
from robust_ft.evaluator import Result
from robust_ft.report import analyses, page, results
from robust_ft.report.runs import load_run
from robust_ft.summary import Row

DRIFT = results.Column("drift", 0, "target", analysis=True)
PART = "decoder/layers_1/mlp"


def add_rows(folder, *rows):
    file = folder / "summary.json"
    file.write_text(json.dumps([*json.loads(file.read_text()), *rows]))


def analysis(stage, step, task, metric, value, split="validation", num_examples=96):
    return row(stage, step, task, metric, value, split, 0, num_examples) | {"role": "analysis"}


@pytest.fixture
def folder(tmp_path):
    return make_run(tmp_path / "run", "full_rte", 0)


def test_results_are_taken_in_by_reports(folder):
    add_rows(folder, *(analysis("full", step, "drift", "target", 9.0) for step in (10, 25)))
    found = AnalysisResults(folder, "drift", {"limit": None})
    for step, split in ((0, "test"), (10, "validation"), (150, "test")):
        found.add(Result("drift", split, "analysis", {"target": step / 100}, 96), "full", step)
    assert ("full", 10, "drift", "validation") in found
    assert ("full", 25, "drift", "validation") not in found
    assert AnalysisResults(folder, "drift", {"limit": None}).rows == found.rows
    run = load_run(folder)
    curve = results.points_of(run, "full", DRIFT)
    assert curve == {10: 0.1, 25: 9.0}  # the run's own where it was not computed again
    table = results.make_table([run])
    assert [line.text(DRIFT) for line in table.lines] == ["0.000", "1.500"]


def test_a_curve_is_of_one_number_of_examples(folder):
    rows = [Row.from_json(analysis("full", 25, "drift", "target", 9.0, num_examples=64))]
    found = AnalysisResults(folder, "drift", {})
    found.add(Result("drift", "validation", "analysis", {"target": 1.0}, 96), "full", 10)
    assert with_analyses(folder, rows) == found.rows


def test_results_of_another_run_are_left_out_and_of_other_settings_refused(folder):
    found = AnalysisResults(folder, "drift", {"limit": 8})
    found.add(Result("drift", "test", "analysis", {"target": 1.0}, 8), "full", 150)
    with pytest.raises(UserError, match=r"drift\.json' has results .* limit is 8, now 9; set"):
        AnalysisResults(folder, "drift", {"limit": 9})
    about = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(about | {"seed": 7}))
    assert AnalysisResults(folder, "drift", {"limit": 9}).rows == []
    assert not any(row.role == "analysis" for row in load_run(folder).rows)
    (folder / "drift.json").write_text('{"run": "x"')
    with pytest.raises(UserError, match="is not JSON"):
        load_run(folder)


def test_parts_of_the_model_are_not_in_the_table(folder):
    names = ("cosine", PART)
    add_rows(folder, *(analysis("full", 150, "gradient_alignment", n, 0.5) for n in names))
    run = load_run(folder)
    shown = [column.metric for column in results.make_table([run]).columns if column.analysis]
    assert shown == ["cosine"]
    assert [column.metric for column in analyses.columns_of([run], "alignment")] == ["cosine"]


def test_what_was_forgotten_against_drift(folder):
    entries = json.loads((folder / "summary.json").read_text())
    scores = {e["step"]: e["value"] for e in entries
              if (e["metric"], e["split"]) == ("norm_avg", "validation")}  # fmt: skip
    add_rows(folder, *(analysis("full", s, "drift", "target", s / 10) for s in scores))
    points = analyses.forgotten([load_run(folder)], "target")
    assert [(p.drift, p.lost) for p in points] == [
        (step / 10, pytest.approx(scores[0] - scores[step])) for step in sorted(scores) if step
    ]
    assert [p.selected for p in points] == [False] * 4 + [True]


@pytest.mark.parametrize("seed", range(3))
def test_rank_correlation(seed):
    first, second = np.random.default_rng(seed).integers(0, 5, size=(2, 12))
    expected = stats.spearmanr(first, second).statistic
    assert analyses.rank_correlation(first, second) == pytest.approx(expected)
    assert np.isnan(analyses.rank_correlation([1, 1], [1, 2]))


def test_the_share_of_another_format(folder):
    entries = json.loads((folder / "summary.json").read_text())
    for entry in entries:
        entry["role"] = "target" if entry["task"] == "mini_rte" else "held_out"
    (folder / "summary.json").write_text(json.dumps(entries))
    write_samples(folder / "full", "mini_qa_1shot", 10, "True")
    write_samples(folder / "full", "mini_zorb_1shot", 10, "no")
    run = analyses.with_format(load_run(folder), "True|False")
    points = {point.step: point for point in analyses.format_points(run)}
    assert points[10].format_share == 50 and points[25].format_share is None
    assert points[0].format_share == 0 and points[150].format_share == 100
    with pytest.raises(UserError, match="is not a regular expression"):
        analyses.with_format(run, "(")


@pytest.mark.parametrize("name", ["drift", "format", "neighbors", "alignment"])
def test_pictures(folder, tmp_path, name):
    found = AnalysisResults(folder, "neighbors", {})
    line = {"input": "vector 0", "neighbors": [["'$a_b$'", 0.9], ["<3>", -0.2]]}
    result = Result("prompt_neighbors", "none", "analysis", {"shared": 0.0}, 1, [line])
    found.add(result, "full", 150)
    for step in (0, 150):
        add_rows(
            folder,
            analysis("full", step, "drift", "target", step / 10),
            analysis("full", step, "gradient_alignment", "cosine", -0.5),
            analysis("full", step, "gradient_alignment", PART, float("nan")),
        )
    files = analyses.write_analysis(name, [folder], tmp_path / "out")
    assert [file.suffix for file in files[:2]] == [".png", ".md"]
    assert files[0].read_bytes().startswith(b"\x89PNG")
    assert "| full_rte | full | 150 |" in files[1].read_text()
    if name == "drift":
        section = page._drift([load_run(folder)])
        assert section.count("<svg") == 1 and "http" not in section and "#0102" not in section


def test_nothing_to_show(folder, tmp_path):
    assert page._drift([load_run(folder)]) == ""
    with pytest.raises(UserError, match=r"robust_ft\.analysis drift MODEL_DIR computes it"):
        analyses.write_analysis("drift", [folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()
