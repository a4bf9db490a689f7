"""Few-shot prompt tuning: what may be asked for, what is tuned, and what is written."""

import dataclasses

import pytest
import toy

from robust_ft import train
from robust_ft.checks import check
from robust_ft.errors import UserError
from robust_ft.few_shot import FewShot
from robust_ft.optim import AdamW, Schedule
from robust_ft.recipe import Recipe
from robust_ft.run_record import RunRecord

EVALUATION = dataclasses.replace(
    toy.TARGET_EVALUATION,
    data=dataclasses.replace(toy.DATA, task="toy_pair", split="validation"),
    target_format=None,
)


def few_shot(**changes):
    settings = {
        "model": toy.MODEL,
        "restore": "scratch",
        "evaluations": [EVALUATION],
        "data": toy.DATA,
        "datasets": ["toy"],
        "optimizer": AdamW(Schedule(0.1)),
        "examples": 4,
        "epochs": 3,
    }
    return FewShot(**{**settings, **changes})


def recipe(directory, stages=(), **changes):
    return Recipe("toy_few_shot", str(directory), stages, few_shot=few_shot(**changes))


def on(task, **changes):
    data = dataclasses.replace(EVALUATION.data, task=task)
    return dataclasses.replace(EVALUATION, data=data, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluations": []}, "FewShot.evaluations is empty"),
        ({"evaluations": [EVALUATION, EVALUATION]}, "names task 'toy_pair' twice"),
        ({"evaluations": [on("toys_pair")]}, "'toys_pair' .* belongs to none of .*: toy;"),
        ({"evaluations": [on("toy", shots=1)]}, r"Evaluation\.shots=1 of task 'toy'"),
        ({"evaluations": [on("toy", detach="all")]}, r"Evaluation\.detach='all'"),
        ({"zero_shot_without": ["promt"]}, r"names 'promt', but .* Did you mean 'prompt'\?"),
        ({"best_on": "test"}, "FewShot.best_on='test' must be one of split, examples"),
        ({"examples": 0}, "FewShot.examples=0 must be at least 1"),
    ],
)
def test_what_has_no_meaning_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        few_shot(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable": ["decoder/prompt"]}, "FewShot.trainable=.*matches none"),
        ({"model": toy.PLAIN}, "FewShot.trainable=.*the model has none"),
    ],
)
def test_patterns_that_own_nothing_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        check(recipe(tmp_path, **changes))


def test_a_task_belongs_to_the_longest_dataset():
    datasets = ["rte", "rte_hard", "rt"]
    tasks = [few_shot(evaluations=[on(t)], datasets=datasets) for t in ("rte_a", "rte_hard_a")]
    assert [each.dataset(each.evaluations[0].task) for each in tasks] == ["rte", "rte_hard"]


def test_a_recipe_needs_stages_or_few_shot(tmp_path):
    with pytest.raises(UserError, match="needs stages"):
        Recipe("toy", str(tmp_path), ())
    with pytest.raises(UserError, match=r"FewShot\.restore='stage:mtl', but the stages are"):
        recipe(tmp_path, restore="stage:mtl")
    with pytest.raises(UserError, match="give the stage or selection of that name another one"):
        recipe(tmp_path, [toy.stage("few_shot")])


def test_what_is_recorded(tmp_path):
    record = RunRecord.of(recipe(tmp_path), with_data=False).settings
    assert record["few_shot"] == "FewShot" and record["few_shot.examples"] == 4
    # The task of its data is a placeholder; what is drawn from is each evaluation's.
    assert record["few_shot.data.toy_pair.task"] == "toy_pair"
    assert record["few_shot.data.toy_pair.split"] == "train"
    assert "few_shot.side_by_side" not in record


def test_the_dry_run_shows_it(capsys):
    assert train.main(["--gin_file=gin_configs/p3_none.gin", "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "16 task(s), each tuned on 16 examples for 100 epochs" in shown
    assert "rank mini_p3_nli_claim test of dataset mini_p3_nli (0 shots without" in shown
