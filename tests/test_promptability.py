"""ARG and its significance from few-shot files, against NumPy, SciPy and numbers worked by hand."""

import itertools
import json
import shutil

import numpy as np
import pytest
from few_shot_runs import DATASETS, SIZE, TEMPLATES, line, make_few_shot_run, write
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import make_run
from scipy import stats
from test_report import Page

from robust_ft import console
from robust_ft.errors import UserError
from robust_ft.metrics.arg import average_relative_gain
from robust_ft.report import (
    few_shot,
    promptability,
    promptability_table,
    write_report,
)
from robust_ft.report.few_shot import Setting, Template
from robust_ft.report.promptability import make_promptability
from robust_ft.report.runs import Run, load_run, load_runs
from robust_ft.run_record import RunRecord

ZERO, LAST, BEST = Setting(0, "zero"), Setting(16, "last"), Setting(16, "best")
SKILLS = {"p3_mtl_t": 0.15, "p3_mtl_t+deep_prompt": 0.3}
SEEDS = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("runs")
    return [
        make_few_shot_run(base / f"{arm}_{seed}", arm, seed, skill)
        for arm, skill in SKILLS.items() for seed in range(SEEDS)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def found(folders):
    return make_promptability(load_runs(folders))


def measured(folders, arm, setting):
    """Returns correctness [templates, runs, draws, examples], and chance [templates]."""
    lines = {}
    for folder in folders:
        if folder.name.rpartition("_")[0] == arm:
            for path in sorted((folder / "few_shot").glob("*.jsonl")):
                for text in path.read_text().splitlines():
                    each = json.loads(text)
                    if (each["shots"], each["which"]) == setting:
                        found = lines.setdefault((each["task"], each["random_accuracy"]), {})
                        found.setdefault(folder.name, []).append(each["correct"])
    correct = np.array([list(found.values()) for found in lines.values()], float)
    return correct, np.array([chance for _, chance in lines])


def run_of(folder, name="arm", seed=0, record=None):
    return Run(folder, name, seed, "", ("mtl",), (), record=record)


def arm_of(folder, lines, name="arm", seed=0, record=None):
    """Returns a run with these evaluations."""
    for number, each in enumerate(lines):
        write(folder, f"{each['task']}_{number}", [each])
    return run_of(folder, name, seed, record)


def test_worked_by_hand(tmp_path):
    right = {"rte_a": 30, "rte_b": 20, "cb": 25}  # of 40: 75, 50 and 62.5 percent
    lines = [
        line(task, task[:3].strip("_"), 0, "zero", None, np.arange(40) < number, chance)
        for (task, number), chance in zip(right.items(), (50.0, 50.0, 25.0), strict=True)
    ]
    made = make_promptability([arm_of(tmp_path, lines)])
    cell = made.cells["arm", ZERO]
    assert {t.task: value for t, value in cell.accuracies.items()} == {
        "rte_a": 75.0, "rte_b": 50.0, "cb": 62.5
    }  # fmt: skip
    # Gains of 50, 0 and 150 percent.
    assert cell.gain.mean == pytest.approx(200 / 3)
    assert cell.gain_by_dataset.mean == pytest.approx((25 + 150) / 2)
    assert cell.gain.sd is None
    assert promptability_table.gain_rows(made)[1] == ["arm", "66.7 (87.5)"]
    assert made.datasets == ("cb", "rte") and made.settings == (ZERO,)


def test_arg_is_the_mean_over_templates_draws_and_seeds(found, folders):
    assert found.arms == tuple(SKILLS) and found.settings == (ZERO, LAST, BEST)
    assert len(found.templates) == len(DATASETS) * TEMPLATES and not found.notes
    for arm, setting in itertools.product(SKILLS, found.settings):
        correct, chance = measured(folders, arm, setting)
        assert correct.shape == (6, SEEDS, 2 if setting.shots else 1, SIZE)
        accuracy = 100 * correct.mean(axis=(2, 3))  # [templates, runs]
        gains = (100 * (accuracy - chance[:, None]) / chance[:, None]).mean(axis=0)
        gain = found.cells[arm, setting].gain
        assert gain.runs == pytest.approx(gains)
        assert gain.mean == pytest.approx(gains.mean())
        assert gain.sd == pytest.approx(gains.std(ddof=1))
        assert list(found.cells[arm, setting].accuracies.values()) == pytest.approx(
            accuracy.mean(axis=1)
        )


def test_one_run_spreads_over_its_draws(folders):
    made = make_promptability(load_runs(folders[:1]))
    correct, chance = measured(folders[:1], "p3_mtl_t", LAST)
    gains = (100 * (100 * correct.mean(axis=3)[:, 0] / chance[:, None] - 1)).mean(axis=0)
    gain = made.cells["p3_mtl_t", LAST].gain
    assert (gain.mean, gain.sd) == pytest.approx((gains.mean(), gains.std(ddof=1)))
    assert made.cells["p3_mtl_t", ZERO].gain.sd is None


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.floats(1, 100), st.floats(0, 100)),
        min_size=1, max_size=12,
    )
)  # fmt: skip
@settings(deadline=None)
def test_weights_give_the_metric(drawn):
    templates = [
        Template(str(i), name, "test", 4, chance) for i, (name, chance, _) in enumerate(drawn)
    ]
    accuracies = np.array([accuracy for *_, accuracy in drawn])
    baselines = {t.task: t.random_accuracy for t in templates}
    gains = {
        t.task: average_relative_gain({t.task: [accuracy]}, baselines)
        for t, accuracy in zip(templates, accuracies, strict=True)
    }
    by_dataset = {}
    for template in templates:
        by_dataset.setdefault(template.dataset, []).append(gains[template.task])
    for averaged, expected in (
        (False, np.mean(list(gains.values()))),
        (True, np.mean([np.mean(values) for values in by_dataset.values()])),
    ):
        weights = promptability.gain_weights(templates, averaged)
        gain = weights @ (accuracies - list(baselines.values()))
        assert gain == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_the_papers_number_from_its_per_dataset_accuracies():
    # As in tests/metrics/test_arg.py: published accuracies, and the ARG of the paper's table.
    published = {
        "anli": (45, 36.7733, 100 / 3), "hellaswag": (4, 27.8904, 25), "copa": (12, 81.0844, 50),
        "story_cloze": (5, 91.8546, 50), "cb": (15, 77.8571, 100 / 3), "rte": (10, 79.1697, 50),
        "wic": (10, 53.9028, 50), "wsc": (10, 55.5769, 50), "winogrande": (5, 53.7648, 50),
    }  # fmt: skip
    rows = [
        (Template(f"{name}_{i}", name, "validation", 1, chance), accuracy)
        for name, (number, accuracy, chance) in published.items() for i in range(number)
    ]  # fmt: skip
    assert len(rows) == 116
    templates, accuracies = zip(*rows, strict=True)
    gains = np.array(accuracies) - [template.random_accuracy for template in templates]
    assert promptability.gain_weights(templates, True) @ gains == pytest.approx(42.9, abs=0.05)


def test_bootstrap_and_welch_against_others(found, folders):
    one, two = SKILLS
    rng = np.random.default_rng(1)
    for setting in found.settings:
        (pair, tested), *others = found.differences(setting).items()
        assert pair == (one, two) and not others
        correct, other = (measured(folders, arm, setting)[0] for arm in SKILLS)
        chance = measured(folders, one, setting)[1]
        # [templates, examples]; three templates of each dataset share their examples.
        mean = correct.mean(axis=(1, 2)) - other.mean(axis=(1, 2))
        gains = 100 * 100 * mean / chance[:, None] / len(chance)
        by_dataset = gains.reshape(len(DATASETS), TEMPLATES, SIZE).sum(axis=1)
        drawn = sum(each[rng.integers(SIZE, size=(4000, SIZE))].mean(axis=1) for each in by_dataset)
        assert tested.difference == pytest.approx(gains.mean(axis=1).sum())
        low, high = np.percentile(drawn, [2.5, 97.5])
        spread = drawn.std()
        assert tested.bootstrap.low == pytest.approx(low, abs=0.25 * spread)
        assert tested.bootstrap.high == pytest.approx(high, abs=0.25 * spread)
        runs = [found.cells[arm, setting].gain.runs for arm in SKILLS]
        assert tested.p_value == pytest.approx(stats.ttest_ind(*runs, equal_var=False).pvalue)
    assert found.differences(LAST)[one, two].is_significant
    again = make_promptability(load_runs(folders))
    assert again.differences(LAST) == found.differences(LAST)  # the draws are seeded


def test_draws_are_arg_of_examples_that_are_drawn(found, folders):
    """The draws of the bootstrap, each with its examples written out as often as it has them."""
    correct, chance = measured(folders, "p3_mtl_t", LAST)
    counts = [
        promptability._counts(template, {})[:20] * SIZE for template in found.templates[::TEMPLATES]
    ]
    drawn = []
    for draw in range(20):
        gains = []
        for number, (right, guess) in enumerate(zip(correct, chance, strict=True)):
            often = np.rint(counts[number // TEMPLATES][draw]).astype(int)
            assert often.sum() == SIZE
            accuracy = 100 * np.repeat(right, often, axis=-1).mean()
            gains.append(100 * (accuracy - guess) / guess)
        drawn.append(np.mean(gains))
    assert found.cells["p3_mtl_t", LAST].gain.draws[:20] == pytest.approx(drawn)


@given(st.integers(0, 1000), st.integers(1, 3), st.integers(1, 3))
@settings(deadline=None, max_examples=25)
def test_a_difference_is_minus_the_other_way_round(seed, runs, draws):
    rng = np.random.default_rng(seed)
    templates = [Template(str(i), "ab"[i % 2], "test", 5, 50.0 - 10 * i) for i in range(3)]
    answers = {
        (arm, LAST): {t: rng.random((runs, draws, 5)) < 0.5 for t in templates} for arm in "xy"
    }
    cells = promptability._cells(answers, templates)
    for field in ("gain", "gain_by_dataset"):
        one, two = (getattr(cells[arm, LAST], field) for arm in "xy")
        there, back = promptability.difference(one, two), promptability.difference(two, one)
        assert there.difference == pytest.approx(-back.difference)
        assert there.bootstrap.low == pytest.approx(-back.bootstrap.high, abs=1e-9)
        assert there.p_value == (None if runs == 1 else pytest.approx(back.p_value))
        accuracies = [100 * answers["x", LAST][t].mean() for t in templates]
        by_hand = [
            100 * (a - t.random_accuracy) / t.random_accuracy
            for a, t in zip(accuracies, templates, strict=True)
        ]
        if field == "gain_by_dataset":
            by_hand = [(by_hand[0] + by_hand[2]) / 2, by_hand[1]]
        assert one.mean == pytest.approx(np.mean(by_hand), abs=1e-9)


def test_an_arm_is_no_different_from_itself(found):
    gain = found.cells["p3_mtl_t", LAST].gain
    same = promptability.difference(gain, gain)
    assert (same.difference, same.bootstrap.low, same.bootstrap.high) == (0, 0, 0)
    assert same.p_value == 1 and not same.is_significant


def test_no_arg_over_other_templates(tmp_path, folders):
    runs = load_runs(folders)
    folder = make_few_shot_run(tmp_path / "run", "p3_mtl_tp", 0, 0.4)
    (folder / "few_shot" / "mini_p3_nli_1.jsonl").unlink()
    found = make_promptability([*runs, load_run(folder)])
    assert found.cells["p3_mtl_tp", LAST].gain is None
    assert len(found.cells["p3_mtl_tp", LAST].accuracies) == 5
    assert found.cells["p3_mtl_t", LAST].gain is not None
    assert found.notes[1] == (
        "p3_mtl_tp has no ARG at 16-shot, last epoch: not all of its runs were evaluated on "
        "'mini_p3_nli_1' (validation, 40 examples, random baseline 33.3) with all draws of "
        "examples; 1 of 6 templates are missing."
    )
    assert len(found.differences(LAST)) == 1
    assert promptability_table.gain_rows(found)[-1] == ["p3_mtl_tp", "–", "–", "–"]


def test_a_seed_or_a_draw_that_is_missing(tmp_path):
    one, two = (make_few_shot_run(tmp_path / f"{seed}", "arm", seed, 0.2) for seed in (0, 1))
    file = two / "few_shot" / "mini_p3_copa_0.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))  # the best epoch of the second draw
    found = make_promptability(load_runs([one, two]))
    assert found.cells["arm", LAST].gain is not None and found.cells["arm", BEST].gain is None
    assert "arm has no ARG at 16-shot, best epoch" in found.notes[0] and len(found.notes) == 1
    for path in (two / "few_shot").glob("*.jsonl"):
        path.unlink()
    found = make_promptability(load_runs([one, two]))
    assert all(cell.gain is None for cell in found.cells.values()) and len(found.notes) == 3


def test_other_examples_are_other_templates(tmp_path):
    def arm(name, content, size=40, chance=50.0):
        settings = {"data.rte.validation.examples": content}
        lines = [line("rte", "rte", 0, "zero", None, [1] * size, chance)]
        return arm_of(tmp_path / name, lines, name, record=RunRecord(settings))

    assert not make_promptability([arm("a", "x"), arm("b", "x")]).notes
    for other in (arm("c", "y"), arm("d", "x", size=39), arm("e", "x", chance=25.0)):
        found = make_promptability([arm("a", "x"), other])
        assert len(found.notes) == 2 and not found.differences(ZERO)


@pytest.mark.parametrize("chance", [None, 0.0, float("nan")])
def test_no_arg_without_a_baseline(tmp_path, chance):
    lines = [
        line("rte", "rte", 0, "zero", None, [1, 0], 50.0),
        line("mine", "mine", 0, "zero", None, [1, 0], chance),
    ]
    found = make_promptability([arm_of(tmp_path, lines)])
    assert found.notes == (
        "There is no ARG: the accuracy of guessing is unknown for 'mine' (1 of 2 templates).",
    )
    assert found.cells["arm", ZERO].gain is None
    assert promptability_table.accuracy_rows(found, ZERO)[1][1:] == ["mine", "–", "50.0"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"which": "zer"}, "which='zer', shots=0 and seed=None; 0 shots are 'zero'"),
        ({"seed": 1}, "0 shots are 'zero' without a seed"),
        ({"shots": 16}, "tunings are 'last' or 'best' with one"),
        ({"correct": [1, 2]}, "needs 'correct' to hold 0 or 1"),
        ({"correct": []}, "needs 'correct' to hold 0 or 1"),
        ({"accuracy": 49.0}, "has accuracy=49, but 1 of 2 in 'correct'"),
        ({"accuracy": "x"}, "cannot be understood"),
        ({"datset": "rte", "dataset": ...}, "has no 'dataset'. Did you mean 'datset'"),
    ],
)
def test_bad_lines_are_one_sentence(tmp_path, change, message):
    entry = line("rte", "rte", 0, "zero", None, [1, 0], 50.0) | change
    write(tmp_path, "rte", [{name: v for name, v in entry.items() if v is not ...}])
    with pytest.raises(UserError, match=r"Evaluation 1 in .*rte\.jsonl ") as raised:
        few_shot.read(tmp_path)
    assert message in str(raised.value)


def test_an_evaluation_that_is_there_twice(tmp_path):
    entry = line("rte", "rte", 16, "last", 3, [1, 0], 50.0)
    write(tmp_path, "rte", [entry, entry])
    with pytest.raises(UserError, match="16-shot, last epoch of 'rte' with seed 3 is also in"):
        few_shot.read(tmp_path)


def test_a_line_that_a_killed_job_cut_off_is_left_out(tmp_path):
    entry = line("rte", "rte", 0, "zero", None, [1, 0], 50.0)
    write(tmp_path, "rte", [entry])
    file = tmp_path / "few_shot" / "rte.jsonl"
    file.write_text(file.read_text() + '{"task": "rte", "da')
    assert len(few_shot.read(tmp_path)) == 1


def test_report(tmp_path, folders):
    with_none = make_few_shot_run(tmp_path / "none", "p3_none", 0, 0.0, stages=())
    before = console.get()
    console.configure(enabled=False)
    report = write_report([*folders, with_none], tmp_path / "report")
    console._shared = before
    assert report.png is None and [path.name for path in report.files] == [
        "report.html", "promptability.png", "report.md"
    ]  # fmt: skip
    text = report.markdown.read_text()
    assert "## Promptability\n\n6 templates of 2 datasets, mean of 3 seeds, 2 draws" in text
    for part in (promptability_table.DEFINITION, promptability_table.TUNED,
                 promptability_table.TESTS, "| p3_mtl_t+deep_prompt − p3_none |"):  # fmt: skip
        assert part in text
    html = report.html.read_text()
    assert "<h1>p3_mtl_t+deep_prompt is the easiest to prompt: ARG " in html
    assert html.count("<svg") == 1 and "Before and after" not in html
    assert html.count("The templates one by one") == 3
    parsed = Page(html)
    assert parsed.loads == [] and parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))
    assert report.promptability.stat().st_size > 10_000


def test_runs_without_few_shot_files_have_no_section(tmp_path, folders):
    made = make_run(tmp_path / "run", "full_rte", 0)
    assert make_promptability([load_run(made)]) is None
    assert promptability_table.markdown(None) == ""
    before = console.get()
    console.configure(enabled=False)
    report = write_report([made], tmp_path / "a")
    assert report.promptability is None and "Promptability" not in report.html.read_text()
    # Beside a run with few-shot files its own sections are what they were.
    both = write_report([made, folders[0]], tmp_path / "b")
    console._shared = before
    assert report.png.read_bytes() == both.png.read_bytes()
    assert both.markdown.read_text().startswith(report.markdown.read_text().partition("\n\n")[0])
    assert "Promptability" in both.html.read_text()


def test_a_run_that_has_not_come_to_its_few_shot_evaluations(tmp_path):
    folder = make_few_shot_run(tmp_path / "run", "p3_mtl_t", 0, 0.2)
    shutil.rmtree(folder / "few_shot")
    with pytest.raises(UserError, match=r"run has nothing to report: 'target' in its run\.json is"):
        load_run(folder)


def test_a_run_without_a_target_that_was_evaluated_in_training_too(tmp_path):
    folder = make_few_shot_run(tmp_path / "run", "p3_mtl_t", 0, 0.2)
    rows = json.loads((folder / "summary.json").read_text())
    rows.append(rows[0] | {"stage": "mtl", "role": "held_out", "split": "test", "shots": 0})
    (folder / "summary.json").write_text(json.dumps(rows))
    before = console.get()
    console.configure(enabled=False)
    report = write_report([folder], tmp_path / "report")
    console._shared = before
    assert report.png is not None and "<h1>Promptability</h1>" in report.html.read_text()
    assert "## Promptability" in report.markdown.read_text()


def test_how_0_shots_were_evaluated_and_the_best_epoch_was_chosen(tmp_path):
    def arm(name, off):
        fields = {"few_shot.zero_shot_without": off, "few_shot.best_on": "split"}
        record = RunRecord(fields)
        lines = [
            line("rte", "rte", 0, "zero", None, [1, 0], 50.0),
            line("rte", "rte", 16, "best", 0, [1, 0], 50.0),
        ]
        return arm_of(tmp_path / name, lines, name, record=record)

    found = make_promptability([arm("p3_none", ["prompt"]), arm("p3_mtl_tp", [])])
    (note,) = promptability_table.notes(found)
    assert "0-shot without prompt: p3_none. With all that was trained: p3_mtl_tp." in note
    assert promptability_table.BEST["split"] in note
    assert promptability_table.BEST["examples"] not in note
