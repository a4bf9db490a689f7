"""Whether differences on the target and on held-out tasks are more than chance."""

import json

import numpy as np
import pytest
from report_runs import make_run
from scipy import stats

from robust_ft.report import comparisons, results, table
from robust_ft.report.runs import load_runs

TARGET = results.Column("mini_rte", 0, "accuracy")
NORM_AVG = results.Column("held_out", 1, "norm_avg")
TASKS = ("mini_qa", "mini_zorb")
SIZE = 40


def is_right(model, task, number, seed):
    """Whether a model answers an example of a task."""
    share = {"pretrained": 0.9, "full_rte": 0.4, "promot_rte": 0.85}[model]
    rng = np.random.default_rng([number, seed * (model != "pretrained"), len(task), len(model)])
    return bool(rng.random() < share)


def make(folder, method, seed):
    """Writes a run whose predictions on two held-out tasks are those of `is_right`."""
    make_run(folder, method, seed)
    last = "model" if method == "promot_rte" else "full"
    first = "prompt" if method == "promot_rte" else "full"
    rows = json.loads((folder / "summary.json").read_text())
    for entry in rows:
        at_end = entry["stage"] == last and entry["step"] == 150
        at_start = entry["stage"] == first and entry["step"] == 0
        if entry["split"] != "test" or not (at_end or at_start) or entry["shots"] != 1:
            continue
        model = method if at_end else "pretrained"
        scores = {
            task: 100 * np.mean([is_right(model, task, n, seed) for n in range(SIZE)])
            for task in TASKS
        }
        if entry["task"] in TASKS:
            entry["value"] = scores[entry["task"]]
            said = [
                {"input": str(n), "target": "yes",
                 "prediction": "yes" if is_right(model, entry["task"], n, seed) else "no"}
                for n in range(SIZE)
            ]  # fmt: skip
            name = f"{entry['task']}_1shot-test-{entry['step']:06}.jsonl"
            path = folder / entry["stage"] / "inference_eval" / name
            path.write_text("".join(json.dumps(line) + "\n" for line in said))
        elif entry["metric"] == "norm_avg":
            entry["value"] = float(np.mean(list(scores.values())))
    kept = [r for r in rows if r["task"] in (*TASKS, "held_out", "mini_rte")]
    (folder / "summary.json").write_text(json.dumps(kept))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    base = tmp_path_factory.mktemp("runs")
    return load_runs(
        make(base / f"{method}_{seed}", method, seed)
        for method in ("full_rte", "promot_rte") for seed in range(3)
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(runs):
    return comparisons.make_comparisons(runs)


def values(runs, method, column):
    return [comparisons.Side.end(run).value(column) for run in runs if run.name == method]


def test_what_is_compared(found):
    assert found.columns == (TARGET, NORM_AVG)
    assert found.tasks == tuple(results.Column(task, 1, "exact_match") for task in TASKS)
    pairs = [("full_rte", "pretrained"), ("promot_rte", "pretrained"), ("full_rte", "promot_rte")]
    assert list(comparisons.by_pair(found.all)) == pairs
    for cells in comparisons.by_pair(found.all).values():
        assert list(cells) == [*found.columns, *found.tasks]


def test_welch_over_seeds_on_target_and_held_out_tasks(found, runs):
    for column in (TARGET, NORM_AVG, *found.tasks):
        one, two = (values(runs, method, column) for method in ("full_rte", "promot_rte"))
        c = comparisons.by_pair(found.all)["full_rte", "promot_rte"][column]
        assert c.difference == pytest.approx(np.mean(one) - np.mean(two))
        assert c.p_value == pytest.approx(stats.ttest_ind(one, two, equal_var=False).pvalue)
        # The pretrained model is one: the test is that of one sample.
        c = comparisons.by_pair(found.all)["full_rte", "pretrained"][column]
        begun = comparisons.Side.pretrained(runs[0]).value(column)
        assert c.p_value == pytest.approx(stats.ttest_1samp(one, begun).pvalue)


def test_bootstrap_over_examples_of_every_held_out_task(found):
    for first, second in (("full_rte", "promot_rte"), ("full_rte", "pretrained")):
        rng = np.random.default_rng(1)
        differences = 0
        for task in TASKS:
            drawn = rng.integers(SIZE, size=(4000, SIZE))
            right = [
                np.array([[is_right(m, task, n, s) for n in range(SIZE)] for s in range(3)])
                for m in (first, second)
            ]
            each = 100.0 * (right[0].astype(float) - right[1])[:, drawn].mean(axis=2)
            differences = differences + each.mean(axis=0) / len(TASKS)
        low, high = np.percentile(differences, [2.5, 97.5])
        bootstrap = comparisons.by_pair(found.all)[first, second][NORM_AVG].bootstrap
        # Their draws are others.
        assert (bootstrap.low, bootstrap.high) == pytest.approx((low, high), abs=1.5)


def test_tables(found):
    text = table.comparisons_markdown(found)
    assert "| full_rte − promot_rte | " in text and "| full_rte − pretrained | " in text
    assert "|  | mini_rte accuracy | held-out Norm. Avg., 1-shot |" in text
    assert "| mini_qa exact match, 1-shot | " in text and table.TESTS in text


def test_one_seed_without_predictions_has_the_difference_alone(tmp_path):
    made = comparisons.make_comparisons(load_runs([make_run(tmp_path / "run", "full_rte", 0)]))
    cells = comparisons.by_pair(made.all)["full_rte", "pretrained"]
    assert cells[NORM_AVG].p_value is None and cells[NORM_AVG].bootstrap is None
    assert cells[NORM_AVG].difference < -50


def test_other_test_examples_are_not_paired(tmp_path, runs):
    folder = make(tmp_path / "run", "promot_rte", 0)
    (file,) = folder.glob("model/inference_eval/mini_zorb_1shot-test-*.jsonl")
    file.write_text(file.read_text().replace('"input": "3"', '"input": "103"'))
    made = comparisons.make_comparisons([runs[0], *load_runs([folder])])
    cells = comparisons.by_pair(made.all)["full_rte", "promot_rte"]
    assert cells[NORM_AVG].bootstrap is None
    tested = {column.task for column, c in cells.items() if c.bootstrap}
    assert tested == {"mini_qa"}
