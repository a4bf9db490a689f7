"""Runs that differ in more than their seed are never averaged, and it is said in what."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_runs import make_run

from robust_ft import console
from robust_ft.errors import UserError
from robust_ft.report import groups, results, table, write_report
from robust_ft.report.runs import Run, load_runs
from robust_ft.run_record import Change, RunRecord

RATE = "stages.model.learning_rate"


def record(seed=0, changes=(), **settings):
    return RunRecord({"seed": seed, RATE: 0.1} | settings, {}, tuple(changes))


def run(seed=0, name="full", **settings):
    return Run(
        f"/runs/{name}{seed}{sorted(settings.items())}", name, seed, "toy", ("model",), (),
        record=record(seed, **settings),
    )  # fmt: skip


def names(found):
    return [run.name for run in found.runs]


def test_seeds_are_one_group_and_nothing_is_said():
    found = groups.by_settings([run(0), run(1), run(0, "promot")])
    assert names(found) == ["full", "full", "promot"]
    assert not found.differences and not found.unknown


def test_one_number_that_differs_is_in_the_name():
    found = groups.by_settings([run(0), run(1, **{RATE: 0.5}), run(1)])
    assert names(found) == ["full, learning rate 0.1", "full, learning rate 0.5",
                            "full, learning rate 0.1"]  # fmt: skip
    assert found.differences == (
        groups.Difference(
            RATE, {"full, learning rate 0.1": "0.1", "full, learning rate 0.5": "0.5"}
        ),
    )


def test_data_of_other_content_and_several_fields_get_letters():
    other = {RATE: 0.5, "data.rte.train.examples": "ab"}
    found = groups.by_settings(
        [run(0, **{"data.rte.train.examples": "cd"}), run(0, **other), run(1, **other)]
    )
    assert names(found) == ["full (A)", "full (B)", "full (B)"]
    rows = table.settings_rows(found)
    assert rows[0] == ["", "full (A)", "full (B)"]
    assert sorted(rows[1:]) == [["data.rte.train.examples", "cd", "ab"], [RATE, "0.1", "0.5"]]


def test_a_change_in_the_middle_is_a_difference():
    changed = run(1, changes=[Change(RATE, 0.9, 0.1, "model", 50)])
    found = groups.by_settings([run(0), changed])
    assert names(found) == ["full (A)", "full (B)"]
    (difference,) = found.differences
    assert difference.values["full (B)"].startswith(f"{RATE} 0.9 → 0.1")


def test_unknown_settings_are_grouped_by_name_and_said_to_be():
    old = [Run(f"/old/{seed}", "full", seed, "toy", ("model",), ()) for seed in (0, 1)]
    found = groups.by_settings(old)
    assert names(found) == ["full", "full"] and found.unknown == ("full",)
    assert table.notes(found)[0].startswith("The settings of full are unknown")
    found = groups.by_settings([run(2), *old])
    assert names(found) == ["full", *["full (settings unknown)"] * 2]


def test_a_seed_twice_is_a_mistake_only_with_the_same_settings():
    groups.by_settings([run(0), run(0, **{RATE: 0.5})])
    with pytest.raises(UserError, match="full with seed 0; give each run once"):
        groups.by_settings([run(0), run(0)])


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.3]), st.integers(0, 2)), max_size=8))
def test_two_runs_share_a_name_exactly_if_only_their_seed_differs(drawn):
    runs = [run(seed, **{RATE: rate, "batch": batch}) for seed, (rate, batch) in enumerate(drawn)]
    found = groups.by_settings(runs)
    for one, a in zip(found.runs, drawn, strict=True):
        for other, b in zip(found.runs, drawn, strict=True):
            assert (one.name == other.name) == (a == b)


def recorded(folder, method, seed, rate):
    make_run(folder, method, seed)
    about = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(about | record(seed, **{RATE: rate}).as_json()))
    return folder


def test_the_report_has_a_column_for_each_and_the_difference(tmp_path):
    folders = [recorded(tmp_path / f"seed_{i}", "full_rte", i, r) for i, r in enumerate((1, 1, 2))]
    before = console.get()
    console.configure(enabled=False)
    # The folder of all seeds stands for them.
    report = write_report([tmp_path], tmp_path / "report")
    console._shared = before
    made = results.make_table(groups.by_settings(load_runs(folders)).runs)
    assert [(line.method, line.seeds) for line in made.lines[1:]] == [
        ("full_rte, learning rate 1", 2), ("full_rte, learning rate 2", 1),
    ]  # fmt: skip
    text = report.markdown.read_text()
    assert f"## {table.DIFFERENT}" in text and f"| {RATE} | 1 | 2 |" in text
    assert table.DIFFERENT in report.html.read_text() and "unknown" not in text


def test_the_report_says_which_examples_are_in_training_and_test(tmp_path):
    folder = recorded(tmp_path / "run", "full_rte", 0, 1)
    overlaps = [
        {"task": "mini_rte", "split": "test", "num_examples": 512, "same_input": 3,
         "same_example": 2},
        {"task": "mini_cb", "split": "test", "num_examples": 9, "same_input": 0, "same_example": 0},
    ]  # fmt: skip
    counted = {"overlaps": overlaps, "num_train": 4096, "num_compared": 4096}
    (folder / "full" / "overlap.json").write_text(json.dumps(counted))
    before = console.get()
    console.configure(enabled=False)
    report = write_report([folder], tmp_path / "report")
    console._shared = before
    sentence = (
        "full_rte: 3 of 512 examples of mini_rte, split test, have an input of the 4,096 training "
        "examples, 2 of them with the same target."
    )
    for file in (report.markdown, report.html):
        assert sentence in file.read_text() and "mini_cb, split" not in file.read_text()
