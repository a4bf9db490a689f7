"""Ensembles and cocktails of finished stages: decoded, chosen by ID validation, and found again."""

import dataclasses
import json
from pathlib import Path

import pytest
import toy

from robust_ft import assets, claiming, inference, runner, stage_start
from robust_ft.ensembles import selection as selection_lib
from robust_ft.ensembles.mixture_weight import SelectedWeight
from robust_ft.ensembles.predictor import Ensemble
from robust_ft.ensembles.selection import (
    CocktailSelection,
    EnsembleSelection,
    check_vocabularies,
    students,
)
from robust_ft.errors import UserError
from robust_ft.evaluate import suite
from robust_ft.evaluator import OOD, TARGET
from robust_ft.objectives import Cocktail
from robust_ft.outcome import Outcome
from robust_ft.recipe import Recipe
from robust_ft.summary import Summary
from robust_ft.vocabulary import ByteVocabulary, SentencePieceVocabulary, TokenizersVocabulary

WEIGHTS = (0.0, 0.5, 1.0)


def evaluations(split):
    return suite(split, toy.TARGET_EVALUATION, ood_tasks=["toy_other"])


STUDENTS = (0.0, 0.5)
SETTINGS = {
    "steps": 2,
    "microbatches": 1,
    "evaluations": evaluations("validation"),
    "final_evaluations": evaluations("test"),
}
LIGHT = toy.prompt_stage(**SETTINGS)
FULL = toy.stage("full", model=toy.PLAIN, trainable=[".*"], **SETTINGS)
STUDENT = dataclasses.replace(FULL, name="s", objective=Cocktail(), teacher="stage:prompt")
ENSEMBLE = EnsembleSelection(
    light="stage:prompt",
    full="stage:full",
    weights=WEIGHTS,
    evaluations=evaluations("validation"),
    final_evaluations=evaluations("test"),
)
COCKTAIL = CocktailSelection(student="s", full="stage:full", weights=STUDENTS)


def made(directory, **changes):
    stages = (LIGHT, FULL, *students(STUDENT, STUDENTS))
    built = Recipe("toy_cocktail", str(directory), stages, selections=(COCKTAIL, ENSEMBLE))
    return dataclasses.replace(built, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "run"
    return directory, runner.run(made(directory)).rows


def lines(folder, task="toy-test", step=2):
    return toy.read_lines(folder / "inference_eval" / f"{task}-{step:06}.jsonl")


def test_students_are_stages_of_all_weights_but_0():
    found = students(STUDENT, WEIGHTS)
    assert [(s.name, s.objective.teacher_weight) for s in found] == [("s_0.5", 0.5), ("s_1", 1)]
    assert {s.teacher for s in found} == {"stage:prompt"}
    assert COCKTAIL.stages == ("full", "s_0.5")
    assert ENSEMBLE.stages == ("prompt", "full")


@pytest.mark.slow
def test_weights_0_and_1_are_the_two_models(finished):
    directory, _ = finished
    for task in ("toy-test", "toy_other-test"):
        for weight, stage in ((0, "full"), (1, "prompt")):
            alone = lines(directory / stage, task)
            assert lines(directory / "ensemble" / f"lambda_{weight}", task) == alone


@pytest.mark.slow
def test_rows_say_lambda_and_every_weight_is_tested(finished):
    _, rows = finished
    for name, weights in (("ensemble", WEIGHTS), ("cocktail", STUDENTS)):
        tested = {
            (row.weight, row.task, row.role)
            for row in rows
            if row.stage == name and row.split == "test"
        }
        assert tested == {
            (w, task, role) for w in weights for task, role in (("toy", TARGET), ("toy_other", OOD))
        }
    assert all(row.weight is None for row in rows if row.stage in ("prompt", "full", "s_0.5"))


@pytest.mark.slow
def test_ood_data_is_never_decoded_for_the_choice(finished):
    _, rows = finished
    validated = {r.task for r in rows if r.stage == "ensemble" and r.split != "test"}
    assert validated == {"toy"}


@pytest.mark.slow
def test_choices_are_what_validation_scores_say(finished):
    directory, rows = finished
    for name in ("ensemble", "cocktail"):
        selection = SelectedWeight.read(directory / name)
        scores = {
            row.weight: row.value
            for row in rows
            if (row.stage, row.split, row.role, row.metric)
            == (name, "validation", TARGET, "accuracy")
        }
        assert {c.weight: c.score for c in selection.candidates} == scores
        assert scores[selection.weight] == max(scores.values())
    folders = [c.folder for c in SelectedWeight.read(directory / "cocktail").candidates]
    assert folders == ["full", "s_0.5"]
    about = json.loads((directory / "run.json").read_text())
    assert about["selections"] == ["cocktail", "ensemble"]


@pytest.mark.slow
def test_a_finished_choice_is_not_made_again(finished, monkeypatch):
    directory, rows = finished
    monkeypatch.setattr(selection_lib, "evaluate", lambda *_: pytest.fail("decoded again"))
    assert runner.run(made(directory)).rows == rows


@pytest.mark.slow
def test_other_weights_in_the_same_folder_are_refused(finished):
    directory, _ = finished
    other = dataclasses.replace(ENSEMBLE, weights=(0.0, 1.0))
    with pytest.raises(UserError, match=r"selections\.ensemble\.weights"):
        runner.run(made(directory, selections=(COCKTAIL, other)))


@pytest.mark.slow
def test_a_finished_recipe_is_evaluated_as_its_last_choice(finished):
    directory, rows = finished
    wanted = inference.Inference(evaluations("test"))
    weight = SelectedWeight.read(directory / "ensemble").weight
    found = inference.evaluate_all(made(directory), wanted)
    expected = {
        (r.task, r.metric): r.value
        for r in rows
        if (r.stage, r.weight, r.split) == ("ensemble", weight, "test")
    }
    assert {(r.task, r.metric): r.value for r in found} == expected
    assert {(r.stage, r.step) for r in found} == {("ensemble", -1)}
    assert isinstance(runner.final_predictor(made(directory)), Ensemble)
    student = runner.final_predictor(made(directory, selections=(ENSEMBLE, COCKTAIL)))
    chosen = SelectedWeight.read(directory / "cocktail").selected.folder
    toy.assert_same(
        toy.flat(student.params), toy.flat(stage_start.finished(made(directory), chosen))
    )


def test_an_unfinished_choice_is_no_predictor(tmp_path):
    with pytest.raises(UserError, match="'ensemble' has not been chosen yet"):
        runner.final_predictor(made(tmp_path))


@pytest.mark.parametrize(
    ("selection", "sentence"),
    [
        (dataclasses.replace(ENSEMBLE, light="stage:promt"), "a stage 'promt'.*Did you mean"),
        (dataclasses.replace(COCKTAIL, student="t"), "'cocktail' needs a stage 't_0.5'"),
        (dataclasses.replace(COCKTAIL, name="full"), "the name 'full' is taken"),
    ],
)
def test_choices_that_do_not_fit_the_stages(tmp_path, selection, sentence):
    with pytest.raises(UserError, match=sentence):
        made(tmp_path, selections=(selection,))


LARGER = dataclasses.replace(toy.PLAIN, config=dataclasses.replace(toy.CONFIG, vocab_size=512))
OTHER = dataclasses.replace(toy.DATA, vocabulary=ByteVocabulary(extra_ids=5))
ELSEWHERE = {"data": OTHER, "evaluations": (), "final_evaluations": ()}


def with_vocabulary(stage, vocabulary):
    return dataclasses.replace(stage, data=dataclasses.replace(stage.data, vocabulary=vocabulary))


@pytest.mark.parametrize(
    ("selection", "full", "sentence"),
    [
        (ENSEMBLE, {"model": LARGER}, "'ensemble' .* 'prompt' and 'full' .*, of 264 and 512"),
        (ENSEMBLE, ELSEWHERE, "'ensemble' .* 'prompt' and 'full' .*, of 264 and 264"),
        # The student of weight 0, full finetuning, has no teacher to be checked with.
        (COCKTAIL, {"model": LARGER}, "'cocktail' .* 'full' and 's_0.5' .*, of 512 and 264"),
        (COCKTAIL, ELSEWHERE, "'cocktail' .* 'full' and 's_0.5' .*, of 264 and 264"),
    ],
)
def test_two_vocabularies_are_refused_before_anything_trains(tmp_path, selection, full, sentence):
    stages = (LIGHT, dataclasses.replace(FULL, **full), *students(STUDENT, STUDENTS))
    with pytest.raises(UserError, match=sentence):
        claiming.claim(made(tmp_path / "run", stages=stages, selections=(selection,)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("selection", [ENSEMBLE, COCKTAIL])
def test_one_vocabulary_need_not_be_read(selection):
    absent = SentencePieceVocabulary("absent.model")
    stages = {
        stage.name: with_vocabulary(stage, absent)
        for stage in (LIGHT, FULL, *students(STUDENT, STUDENTS))
    }
    check_vocabularies(selection, stages)
    stages["full"] = FULL
    with pytest.raises(UserError, match=r"'absent.model' does not exist"):
        check_vocabularies(selection, stages)


def test_two_copies_of_a_file_are_one_vocabulary(tmp_path):
    shipped = "asset:mini/tokenizer.json"
    (tmp_path / "tokenizer.json").write_bytes(Path(assets.resolve(shipped)).read_bytes())
    paths = {"prompt": shipped, "full": str(tmp_path / "tokenizer.json")}
    stages = {
        stage.name: with_vocabulary(stage, TokenizersVocabulary(paths[stage.name]))
        for stage in (LIGHT, FULL)
    }
    check_vocabularies(ENSEMBLE, stages)


def test_ood_data_that_would_choose_is_refused():
    named = suite("validation", toy.TARGET_EVALUATION, target_tasks=["toy_other"])
    with pytest.raises(
        UserError, match=r"'ensemble' would be selected on 'toy_other', .* the role 'ood'"
    ):
        dataclasses.replace(ENSEMBLE, evaluations=named)
    only_ood = [e for e in evaluations("validation") if e.role == OOD]
    with pytest.raises(UserError, match="give it an evaluation with the role 'target'"):
        dataclasses.replace(ENSEMBLE, evaluations=only_ood)


@pytest.mark.parametrize("wrong", [(0.5, 1.2), (-0.1,), (), (0.5, 0.5)])
def test_weights_that_are_none(wrong):
    for selection in (ENSEMBLE, COCKTAIL):
        with pytest.raises(UserError, match="lambda"):
            dataclasses.replace(selection, weights=wrong)


def test_students_without_validation_scores_cannot_be_chosen_from(tmp_path):
    (tmp_path / "full").mkdir()
    Outcome(2, None, ()).write(tmp_path / "full")
    alone = dataclasses.replace(COCKTAIL, weights=(0.0,))
    with pytest.raises(UserError, match="stage 'full' has none; give it evaluations"):
        alone.run(tmp_path, Summary(tmp_path), load=pytest.fail)
