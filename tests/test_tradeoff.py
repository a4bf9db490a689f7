"""ID against OOD: runs with selections told apart, tests of all pairs, points of the grid."""

import itertools

import numpy as np
import pytest
from report_runs import (
    GRID,
    ID_EXAMPLES,
    OOD_EXAMPLES,
    make_cocktail_run,
    make_run,
    right_share,
)
from scipy import stats

from robust_ft import console
from robust_ft.report import comparisons, members, results, table, tradeoff, write_report
from robust_ft.report.runs import load_runs

METHODS = ["light", "full", "ensemble", "cocktail"]
ID = results.Column("webnlg", 0, "exact_match")
OOD = results.Column("webnlg_ood", 0, "exact_match")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("runs")
    return [make_cocktail_run(base / f"table2_{seed}", seed) for seed in range(3)]


@pytest.fixture(scope="module")
def runs(folders):
    return members.split_members(load_runs(folders))


@pytest.fixture(scope="module")
def found(runs):
    return tradeoff.make_tradeoff(runs)


@pytest.fixture(scope="module")
def compared(runs):
    return comparisons.make_comparisons(runs)


def scores(weight, seed):
    shares = right_share(weight, seed)
    sizes = ID_EXAMPLES, OOD_EXAMPLES
    return [100 * round(s * n) / n for s, n in zip(shares, sizes, strict=True)]


def test_stages_and_choices_are_runs_of_their_own_and_students_are_none(runs):
    assert [(run.name, run.seed) for run in runs[:4]] == [(name, 0) for name in METHODS]
    assert len(runs) == 12
    table_lines = results.make_table(runs).lines
    assert [line.method for line in table_lines] == ["pretrained", *METHODS]
    assert table_lines[-1].checkpoint == "λ 0.5"
    assert table_lines[0].cells[OOD].mean == 20


def test_recipes_with_choices_are_named_where_there_are_several(folders, tmp_path):
    other = make_cocktail_run(tmp_path / "other", 0)
    about = (other / "run.json").read_text().replace('"table2"', '"other"')
    (other / "run.json").write_text(about)
    plain = make_run(tmp_path / "full_rte_0", "full_rte", 0)
    names = [run.name for run in members.split_members(load_runs([folders[0], other, plain]))]
    assert names == [f"{r}: {m}" for r in ("table2", "other") for m in METHODS] + ["full_rte"]


def test_lines_are_means_over_seeds_at_the_chosen_weight(found):
    assert found.columns == (ID, OOD)
    assert [line.method for line in found.lines] == METHODS
    for line, weight in zip(found.lines, (1, 0, 0.5, 0.5), strict=True):
        for column, values in zip((ID, OOD), zip(*(scores(weight, s) for s in range(3)),
                                                 strict=True), strict=True):  # fmt: skip
            assert line.cells[column].mean == pytest.approx(np.mean(values))
            assert line.cells[column].sd == pytest.approx(np.std(values, ddof=1))
    assert found.lines[2].weights == (0.5, 0.5, 0.5) and not found.lines[0].weights


def test_all_pairs_are_compared_over_seeds(compared):
    pairs = [(c.first, c.second, c.column) for c in compared.all]
    expected = [*((name, "pretrained") for name in METHODS), *itertools.combinations(METHODS, 2)]
    assert pairs == [(a, b, c) for a, b in expected for c in (ID, OOD)]
    for c in compared.all:
        if c.second == "pretrained":
            continue
        weights = {"light": 1, "full": 0}
        sides = [
            [scores(weights.get(name, 0.5), s)[c.column == OOD] for s in range(3)]
            for name in (c.first, c.second)
        ]
        assert c.difference == pytest.approx(np.mean(sides[0]) - np.mean(sides[1]))
        if len({*sides[0], *sides[1]}) > 2:
            assert c.p_value == pytest.approx(stats.ttest_ind(*sides, equal_var=False).pvalue)


def test_bootstrap_draws_the_same_examples_for_both(compared, folders):
    def right(name, seed):
        said = load_runs([folders[seed]])[0].samples
        (file,) = [f for f in said if f.stage == name and f.name == "webnlg-test"]
        return np.array([line["prediction"] in line["references"] for line in file.read()])

    (c,) = [c for c in compared.all if (c.first, c.second, c.column) == ("light", "full", ID)]
    drawn = np.random.default_rng(1).integers(ID_EXAMPLES, size=(4000, ID_EXAMPLES))
    differences = np.mean(
        [100.0 * (right("light", s)[drawn].mean(1) - right("full", s)[drawn].mean(1))
         for s in range(3)], axis=0,
    )  # fmt: skip
    low, high = np.percentile(differences, [2.5, 97.5])
    assert c.bootstrap.difference == pytest.approx(differences.mean(), abs=0.2)
    # Their draws are others: a point of the 3 to 15 that these intervals are wide.
    assert (c.bootstrap.low, c.bootstrap.high) == pytest.approx((low, high), abs=1.0)
    (same,) = [
        c for c in compared.all if (c.first, c.second, c.column) == ("ensemble", "cocktail", ID)
    ]
    assert (same.bootstrap.low, same.bootstrap.high) == (0, 0)


def test_without_outputs_or_seeds_there_are_no_tests(folders, tmp_path):
    lone = make_cocktail_run(tmp_path / "lone", 0)
    for file in lone.glob("full/inference_eval/*"):
        file.unlink()
    made = comparisons.make_comparisons(members.split_members(load_runs([lone])))
    assert all(c.p_value is None for c in made.all)
    tested = {(c.first, c.second) for c in made.all if c.bootstrap}
    assert tested == {p for p in itertools.combinations(METHODS, 2) if "full" not in p}


def test_points_are_the_grid(found):
    assert [len(found.points[name]) for name in METHODS] == [1, 1, 3, 3]
    for point, weight in zip(found.points["ensemble"], GRID, strict=True):
        assert (point.weight, point.chosen) == (weight, weight == 0.5)
        assert list(point.seeds) == [tuple(scores(weight, s)) for s in range(3)]
        assert (point.id, point.ood) == pytest.approx(np.mean(point.seeds, axis=0))


def test_no_ood_data_no_tradeoff(tmp_path):
    runs = load_runs([make_run(tmp_path / "run", "full_rte", 0)])
    assert tradeoff.make_tradeoff(runs).columns == ()
    assert table.tradeoff_markdown(tradeoff.make_tradeoff(runs)) == ""


def test_the_report_has_the_table_the_tests_and_the_picture(folders, tmp_path):
    before = console.get()
    console.configure(enabled=False)
    report = write_report(folders, tmp_path)
    console._shared = before
    assert report.files == tuple(
        tmp_path / name for name in ("report.html", "report.png", "tradeoff.png", "report.md")
    )
    assert report.tradeoff.read_bytes().startswith(b"\x89PNG")
    text = report.markdown.read_text()
    assert "|  | seeds | λ | ID: webnlg exact match | OOD: webnlg_ood exact match |" in text
    assert "| ensemble | 3 | 0.5 | " in text and "| light − full | " in text
    html = report.html.read_text()
    assert "In and out of distribution" in html and "tradeoff-" in html
    assert html.count("<details") == 1  # one config: the methods are one run's
    for word in ("src=", "@import", "url(http"):
        assert word not in html
