"""A grid of values: each has a run, one is chosen on validation, and that one alone is tested."""

import dataclasses
import math
import types

import pytest
import toy
import toy_few_shot
from report_runs import make_run

from robust_ft import console, runner, sweeps
from robust_ft.ensembles.mixture_weight import Candidate, SelectedWeight
from robust_ft.ensembles.selection import EnsembleSelection
from robust_ft.errors import Diverged, UserError
from robust_ft.files import read_json
from robust_ft.optim import AdamW, Schedule
from robust_ft.recipe import Recipe
from robust_ft.report import Report, choices, write_report
from robust_ft.report.runs import load_runs
from robust_ft.summary import read_rows
from robust_ft.sweep_file import Sweep, Tried
from robust_ft.sweeps import run_sweep
from robust_ft.trainer import Stopped

GRID = {"rate": [0.1, 0.3, 1.0]}


def recipe(rate=0.1, steps=6, **changes):
    optimizer = AdamW(Schedule(rate))
    return Recipe("toy", "", (toy.stage(optimizer=optimizer, steps=steps, **changes),))


class Runs:
    """Stands for all runs: what they score, and what was done with them.

    Args:
        score: From a rate, steps and a seed to a score, or an error to raise.
    """

    def __init__(self, monkeypatch, score):
        self.score, self.claimed, self.validated, self.completed = score, [], [], []
        monkeypatch.setattr(sweeps.claiming, "claim", self.claimed.append)
        monkeypatch.setattr(sweeps, "validate", self.validate)
        monkeypatch.setattr(sweeps, "run_claimed", lambda one, _: self.completed.append(one))
        monkeypatch.setattr(sweeps, "gc", types.SimpleNamespace(collect=lambda: None))  # is slow
        monkeypatch.setattr(sweeps.report, "write_report", lambda *_: Report("", ""))

    def validate(self, one, by, callbacks):
        self.validated.append(one.model_dir)
        stage = one.stage(by)
        found = self.score(stage.optimizer.learning_rate.peak, stage.steps, one.seed)
        if isinstance(found, Exception):
            raise found
        return found


def folders(runs):
    return [one.rpartition("/sweep/")[2] for one in runs]


def test_the_best_is_chosen_on_validation_and_it_alone_is_completed(tmp_path, monkeypatch):
    runs = Runs(monkeypatch, lambda rate, *_: {0.1: 20.0, 0.3: 50.0, 1.0: 40.0}[rate])
    sweep = run_sweep(recipe, GRID, f"{tmp_path}/sweep/")
    every = [f"rate_{rate}/seed_0" for rate in GRID["rate"]]
    assert folders(runs.validated) == every
    assert folders(one.model_dir for one in runs.completed) == ["rate_0.3/seed_0"]
    assert sweep.chosen.values == {"rate": 0.3} and not sweep.sentences()
    written = read_json(tmp_path / "sweep" / "sweep.json")
    assert written["grid"] == GRID and written["chosen"]["folder"] == "rate_0.3"
    assert [each["score"] for each in written["tried"]] == [20.0, 50.0, 40.0]
    assert (written["by"], written["on"]) == ("model", ["toy validation"])
    assert Sweep.read(tmp_path / "sweep") == sweep


def test_stopped_it_goes_on_where_it_was_and_extended_it_runs_what_is_new(tmp_path, monkeypatch):
    answers = iter([20.0, Stopped("Stopped."), 50.0, 40.0])
    runs = Runs(monkeypatch, lambda *_: next(answers))
    folder = f"{tmp_path}/sweep"
    with pytest.raises(Stopped):
        run_sweep(recipe, GRID, folder)
    assert Sweep.read(folder).left == 2 and Sweep.read(folder).chosen is None
    with pytest.raises(UserError, match="has chosen nothing: 2 of its runs"):
        load_runs([folder])
    run_sweep(recipe, GRID, folder)
    assert folders(runs.validated) == [
        "rate_0.1/seed_0", "rate_0.3/seed_0", "rate_0.3/seed_0", "rate_1.0/seed_0"
    ]  # fmt: skip
    # The runs that have a score are compared with the settings of now, too.
    assert len(runs.claimed) == 2 + 3
    # More values and more seeds.
    runs.score = lambda rate, _, seed: 60.0 if rate == 3.0 else 10.0
    wider = {"rate": [*GRID["rate"], 3.0]}
    sweep = run_sweep(recipe, wider, folder, seeds=2)
    assert folders(runs.validated)[4:] == [
        "rate_0.1/seed_1", "rate_0.3/seed_1", "rate_1.0/seed_1", "rate_3.0/seed_0",
        "rate_3.0/seed_1",
    ]  # fmt: skip
    assert [point.score(sweep.seeds) for point in sweep.tried] == [15.0, 30.0, 25.0, 60.0]
    assert sweep.edges == {"rate": "largest"}
    assert sweep.sentences() == ["The best rate is the largest that was tried; extend the grid."]
    # Nothing is lost: fewer of either are refused.
    before = (tmp_path / "sweep" / "sweep.json").read_text()
    for grid, seeds, lost in (GRID, 2, "rate 3"), (wider, 1, "seed 1"):
        with pytest.raises(UserError, match=f"that has {lost} besides; give these too"):
            run_sweep(recipe, grid, folder, seeds)
    with pytest.raises(UserError, match="of the recipe 'toy', not 'other'"):
        run_sweep(lambda rate: dataclasses.replace(recipe(rate), name="other"), wider, folder, 2)
    assert (tmp_path / "sweep" / "sweep.json").read_text() == before


def test_of_equal_ones_the_smallest_and_what_diverged_last(tmp_path, monkeypatch):
    runs = Runs(monkeypatch, lambda rate, *_: Diverged("Step 3: NaN.") if rate == 1.0 else 7.0)
    sweep = run_sweep(recipe, {"rate": [0.3, 1.0, 0.1]}, f"{tmp_path}/sweep")
    assert sweep.chosen.values == {"rate": 0.1}
    assert sweep.sentences() == [
        "The best rate is the smallest that was tried; extend the grid.",
        "2 of 3 are equally good on validation; the smallest is chosen.",
        "rate 1, seed 0, diverged and counts as the worst: Step 3: NaN.",
    ]
    assert read_json(tmp_path / "sweep" / "sweep.json")["tried"][1]["score"] is None
    # It is not run again.
    again = run_sweep(recipe, {"rate": [0.3, 1.0, 0.1]}, f"{tmp_path}/sweep")
    assert len(runs.validated) == 3 and again.chosen == sweep.chosen
    assert again.sentences() == sweep.sentences()
    # One seed that diverged rules a value out.
    runs.score = lambda rate, _, seed: math.nan if (rate, seed) == (0.3, 1) else 100 * rate
    sweep = run_sweep(recipe, {"rate": [0.1, 0.3]}, f"{tmp_path}/seeds", seeds=2)
    assert sweep.chosen.values == {"rate": 0.1}
    assert sweep.sentences()[1].endswith("Its validation score is NaN.")
    runs.score = lambda *_: Diverged("Step 3: NaN.")
    with pytest.raises(UserError, match="diverged with every value that was tried; the first: Ste"):
        run_sweep(recipe, GRID, f"{tmp_path}/none")
    assert Sweep.read(tmp_path / "none").chosen is None
    with pytest.raises(UserError, match="chosen nothing: a run diverged with every value"):
        load_runs([tmp_path / "none"])


def test_several_settings_are_a_product(tmp_path, monkeypatch):
    runs = Runs(monkeypatch, lambda rate, steps, _: rate * steps)
    sweep = run_sweep(recipe, {"rate": [0.1, 1.0], "steps": [4, 6, 8]}, f"{tmp_path}/sweep")
    assert len(runs.validated) == 6 and sweep.chosen.name == "rate 1, steps 8"
    assert folders(runs.validated)[1] == "rate_0.1+steps_6/seed_0"
    assert sweep.edges == {"rate": "largest", "steps": "largest"}


def test_folders_are_those_of_their_values():
    assert sweeps.folder_name({"LEARNING_RATE": 3e-4, "N": 5}) == "LEARNING_RATE_0.0003+N_5"
    assert sweeps.folder_name({"prompt/Schedule.peak": 0.3}) == "prompt.Schedule.peak_0.3"
    names = {sweeps.folder_name({"A": value}) for value in ("@a/AdamW()", "@a_AdamW()", "x", [1])}
    assert len(names) == 4 and not any(set(name) & set("/@(), ") for name in names)


REFUSED = {
    "no grid": ({}, {}, "needs a grid"),
    "one value": ({"rate": [0.1]}, {}, r"one value of rate, 0\.1, so there is nothing to choose"),
    "a value twice": ({"rate": [0.1, 0.1]}, {}, r"has rate 0\.1 twice"),
    "an object": ({"rate": [0.1, toy.DATA]}, {}, "rate TaskData.*, which is no plain value"),
    "no seed": (GRID, {"seeds": 0}, "must be at least 1"),
    "by": (GRID, {"by": "modle"}, "cannot choose by 'modle', only by model. Did you mean 'model'"),
    "changes nothing": (
        {"rate": [0.1, 0.3], "log_period": [1, 2]}, {},
        r"rate 0\.1, log_period 1 and rate 0\.1, log_period 2 make the same run.* leave log_period",
    ),
    "other validation data": (
        {"data": ["toy", "toy_other"]}, {}, "on toy validation and with data toy_other on toy_oth",
    ),
    "no selection": ({"rate": [0.1, 1], "select_best": [False, True]}, {}, "Stage.select_best"),
    "no validation": ({"evaluations": [(), (1,)]}, {}, "none with the role 'target'"),
}  # fmt: skip


@pytest.mark.parametrize(("grid", "settings", "sentence"), REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_is_written(tmp_path, grid, settings, sentence):
    def build(data="toy", **values):
        if data != "toy":
            other = dataclasses.replace(toy.DATA, task=data)
            values["evaluations"] = [dataclasses.replace(toy.TARGET_EVALUATION, data=other)]
            values["evaluations"][0] = dataclasses.replace(
                values["evaluations"][0], data=dataclasses.replace(other, split="validation")
            )
        if values.get("evaluations") == (1,):
            values["evaluations"] = toy.evaluations("validation")
        return recipe(**values)

    with pytest.raises(UserError, match=sentence) as caught:
        run_sweep(build, grid, f"{tmp_path}/sweep", **settings)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_more_that_is_refused(tmp_path):
    def few_shot(seeds):
        return Recipe("arm", "", (), few_shot=toy_few_shot.few_shot(tmp_path, seeds=seeds))

    with pytest.raises(UserError, match="arm trains no stage, it only evaluates few-shot tuning"):
        run_sweep(few_shot, {"seeds": [1, 2]}, f"{tmp_path}/sweep")
    make_run(tmp_path / "run", "full_rte", 0)
    with pytest.raises(UserError, match="is the folder of a single run; choose another"):
        run_sweep(recipe, GRID, f"{tmp_path}/run")
    (tmp_path / "sweep.json").write_text('{"tried": 3}')
    with pytest.raises(UserError, match="is no sweep of robust_ft"):
        Sweep.read(tmp_path)


def test_what_it_chooses_on_is_said_if_that_is_reported_as_the_test_result(tmp_path):
    def build(rate):
        return recipe(rate, final_evaluations=toy.evaluations("validation"))

    first = build(0.1)
    planned = sweeps.plan(
        lambda values, seed, folder: build(**values), GRID,
        dataclasses.replace(first, model_dir=f"{tmp_path}/sweep"), 1, None,
    )  # fmt: skip
    assert planned.sweep.notes == (
        "It chooses on what is reported as the test result, toy validation.",
    )


def made_sweep(folder, scores):
    """Writes a sweep of "full_rte" over rates, with seeds 0 and 1; returns it."""
    tried = []
    for rate, by_seed in scores.items():
        for seed in range(2):
            make_run(folder / f"R_{rate}" / f"seed_{seed}", "full_rte", seed)
        tried.append(Tried({"R": rate}, f"R_{rate}", dict(enumerate(by_seed))))
    sweep = Sweep("full_rte", "full", ("mini_rte validation",), (0, 1), tuple(tried))
    sweep.write(folder)
    return sweep


def test_a_report_takes_the_choice_and_says_how_it_was_made(tmp_path, capsys):
    console.configure()
    made_sweep(tmp_path / "swept", {0.1: (70.0, 72.0), 0.3: (60.0, 60.0)})
    other = make_run(tmp_path / "other", "promot_rte", 0)
    runs = load_runs([tmp_path / "swept", other])
    assert [run.directory.parent.name for run in runs[:2]] == ["R_0.1", "R_0.1"]
    rows = choices.rows(runs)
    assert rows[1:] == [
        [
            "full_rte", "R 0.1: 71.0 ± 1.4; 0.3: 60.0 ± 0.0", "R 0.1",
            "mini_rte validation of full, 4 runs",
            "The best R is the smallest that was tried; extend the grid.",
        ],
        ["promot_rte", "nothing", "as in its config", "–", "–"],
    ]  # fmt: skip
    written = write_report([tmp_path / "swept", other], tmp_path / "report")
    for text in (written.markdown.read_text(), written.html.read_text()):
        assert choices.TITLE in text and "R 0.1: 71.0 ± 1.4; 0.3: 60.0" in text
    assert choices.TITLE in capsys.readouterr().out
    assert choices.rows(load_runs([other])) == [] and choices.markdown(load_runs([other])) == ""


def test_of_an_ensemble_the_selected_lambda_chooses_without_test_splits(tmp_path, monkeypatch):
    selection = EnsembleSelection(
        light="stage:light", full="stage:model", evaluations=toy.evaluations("validation"),
        final_evaluations=toy.evaluations("test"),
    )  # fmt: skip
    one = Recipe("toy", str(tmp_path), (toy.stage("light"), toy.stage()), selections=(selection,))
    assert sweeps.chosen_by(one, None) == "ensemble"
    assert sweeps.stages_of(one, "ensemble") == ("light", "model")
    assert [e.task for e in sweeps.selecting_evaluations(one, "ensemble")] == ["toy"]
    seen = []

    def selected(self, *_):
        seen.append(self.final_evaluations)
        return SelectedWeight.of([Candidate(0.5, 42.0, "ensemble/lambda_0.5", 2)])

    monkeypatch.setattr(EnsembleSelection, "run", selected)
    monkeypatch.setattr(runner, "_run_stages", lambda *_: None)
    assert runner.validate(one, "ensemble") == 42.0
    # It is not selected yet: the run that is completed evaluates every lambda on test splits.
    assert seen == [()] and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_chosen_run_is_the_run_of_its_own_command(tmp_path, monkeypatch):
    def promot(rate, folder=""):
        optimizer = AdamW(Schedule(rate))
        both = {"eval_period": 1, "microbatches": 1}
        model = {**both, "steps": 2, "optimizer": optimizer}
        return toy.promot(folder, {**both, "steps": 1}, model)

    # At each step of the prompt and the model, with the first rate, then with the second.
    scores = [0.0, 3.0, 0.0, 4.0, 5.0, 0.0, 3.0, 0.0, 9.0, 1.0]
    evaluate = toy.ScriptedEvaluate(monkeypatch, [*scores, *scores[5:]])
    sweep = run_sweep(promot, {"rate": [0.1, 0.3]}, f"{tmp_path}/sweep")
    assert sweep.chosen.values == {"rate": 0.3} and sweep.chosen.scores == {0: 9.0}
    swept, alone = tmp_path / "sweep" / "rate_0.3" / "seed_0", tmp_path / "alone"
    runner.run(promot(0.3, alone))
    for stage in ("prompt", "model"):
        toy.assert_same(toy.final(swept, stage), toy.final(alone, stage))
        outcomes = [read_json(folder / stage / "outcome.json") for folder in (swept, alone)]
        assert outcomes[0] == outcomes[1] and outcomes[0]["is_tested"]
    assert set(read_rows(swept / "summary.json")) == set(read_rows(alone / "summary.json"))
    # No test split of the other was looked at, and its own command would do what is left.
    left = tmp_path / "sweep" / "rate_0.1" / "seed_0"
    assert {row.split for row in read_rows(left / "summary.json")} == {"validation"}
    calls = len(evaluate.calls)
    runner.run(promot(0.1, left))
    assert {call.evaluation.split for call in evaluate.calls[calls:]} == {"test"}
    assert {row.split for row in read_rows(left / "summary.json")} == {"validation", "test"}
