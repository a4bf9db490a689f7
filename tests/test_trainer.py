"""The training loop: when it evaluates, what it logs, what it hands on, what it refuses."""

import dataclasses
import math
import threading

import jax
import numpy as np
import pytest
import toy

from robust_ft.errors import UserError
from robust_ft.metric_writer import MetricWriter
from robust_ft.optim import Adafactor, Schedule
from robust_ft.outcome import Outcome
from robust_ft.recipe import Recipe
from robust_ft.run_context import Callback
from robust_ft.stage import stage_key, stage_seed
from robust_ft.stage_start import restore
from robust_ft.trainer import Stopped, fit
from robust_ft.training_log import Done, TrainingLog

PROMPT_ONLY = {"evaluations": toy.evaluations("validation", held_out=False)}


@pytest.fixture
def evaluate(monkeypatch):
    return toy.ScriptedEvaluate(monkeypatch)


def run(folder, stage, baseline=False, stop=None, callback=None):
    """Fits one stage from its own start; returns all parameters as copies and the summary."""
    shared = toy.shared(folder, baseline=baseline)
    callbacks = [] if callback is None else [callback]
    shared = shared._replace(stop=stop or threading.Event(), callbacks=callbacks)
    params = restore(Recipe("toy", str(folder), (stage,)), stage)
    return toy.flat(fit(stage, params, shared)), shared.summary


def stage(**changes):
    return toy.prompt_stage(**{**PROMPT_ONLY, "final_evaluations": (), **changes})


def steps_of(folder, split):
    lines = toy.read_lines(folder / "prompt" / "metrics.jsonl")
    return [line["step"] for line in lines if line["split"] == split]


def test_evaluates_before_at_every_period_and_at_the_end(tmp_path, evaluate):
    evaluate.scores = [0.0, 5.0, 5.0]
    params, _ = run(tmp_path, stage(steps=5, eval_period=3, log_period=2))
    assert steps_of(tmp_path, "validation") == [0, 3, 5]
    # Windows of two steps, ended early where an evaluation is.
    assert steps_of(tmp_path, "train") == [2, 3, 4, 5]
    assert Outcome.read(tmp_path / "prompt").step == 3
    at_three = evaluate.calls[1].params
    toy.assert_same(params, at_three)


def test_the_last_checkpoint_where_the_best_is_not_asked_for(tmp_path, evaluate):
    evaluate.scores = [0.0, 5.0, 1.0]
    run(tmp_path, stage(steps=4, select_best=False))
    outcome = Outcome.read(tmp_path / "prompt")
    assert (outcome.step, outcome.score) == (4, 1.0)


def test_patience_ends_the_stage_as_if_finished(tmp_path, evaluate, capsys):
    patient = stage(steps=20, patience=2, final_evaluations=toy.evaluations("test", False))
    evaluate.scores = [9.0, 1.0, 3.0, 3.0, 2.0, 9.0]  # at steps 0, 2, 4, 6, 8
    params, _ = run(tmp_path, patient)
    outcome = Outcome.read(tmp_path / "prompt")
    assert (outcome.step, outcome.score, outcome.steps) == (4, 3.0, 8)
    assert steps_of(tmp_path, "validation") == [0, 2, 4, 6, 8]
    assert "ends at step 8: after step 4 no score was better" in capsys.readouterr().out
    # Another length of the stage changes neither the steps nor the schedule.
    evaluate.scores = [9.0, 1.0, 3.0]
    plain, _ = run(tmp_path / "plain", stage(steps=4))
    toy.assert_same(params, plain)


def test_patience_goes_on_counting_after_a_restart(tmp_path, evaluate):
    patient = stage(steps=20, patience=2)
    evaluate.scores, stop = [0.0, 5.0, 1.0], threading.Event()
    with pytest.raises(Stopped, match="step 5"):
        run(tmp_path, patient, stop=stop, callback=toy.At("prompt", 5, stop.set))
    evaluate.scores = [2.0, 9.0]
    died = {"final_evaluations": toy.evaluations("test", False)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Outcome, "write", lambda *_: toy.raising(RuntimeError)())
        with pytest.raises(RuntimeError):
            run(tmp_path, stage(steps=20, patience=2, **died))
    assert not (tmp_path / "prompt" / "outcome.json").exists()
    run(tmp_path, stage(steps=20, patience=2, **died))  # nothing is left to train
    outcome = Outcome.read(tmp_path / "prompt")
    assert (outcome.step, outcome.steps) == (2, 6)
    assert steps_of(tmp_path, "validation") == [0, 2, 4, 6]


@pytest.mark.parametrize(
    "changes",
    [
        {"patience": 2, "select_best": False},
        {"patience": 2, "evaluations": ()},
        {"patience": 2, "evaluations": toy.evaluations("validation")[1:]},
    ],
)
def test_patience_needs_a_score(changes):
    with pytest.raises(UserError, match="patience=2 of stage 'prompt' waits for a better"):
        stage(**changes)


def test_without_evaluations_the_last_checkpoint(tmp_path, evaluate):
    run(tmp_path, stage(steps=3, evaluations=()))
    outcome = Outcome.read(tmp_path / "prompt")
    assert (outcome.step, outcome.score, evaluate.calls) == (3, None, [])


def test_the_baseline_stays_where_both_use_one_split(tmp_path, evaluate):
    evaluate.scores = [11.0, 22.0, 33.0, 44.0]
    both = toy.evaluations("validation", held_out=False)
    _, summary = run(tmp_path, stage(steps=2, final_evaluations=both), baseline=True)
    # At step 0, 11 with the prompt, then 22 without it: the pretrained model. 44 is the final one.
    assert [(row.step, row.value) for row in summary.rows] == [(0, 22.0), (2, 44.0)]
    assert [call.detached for call in evaluate.calls] == [False, True, False, False]


def test_nothing_is_there_twice_after_a_death_before_the_first_checkpoint(tmp_path, evaluate):
    class Died(Exception):
        pass

    with pytest.raises(Died):
        run(tmp_path, stage(steps=2), callback=toy.At("prompt", 1, toy.raising(Died)))
    assert steps_of(tmp_path, "validation") == [0]
    run(tmp_path, stage(steps=2))
    assert steps_of(tmp_path, "validation") == [0, 2]


def test_stopping_saves_once_and_logs_what_was_done(tmp_path, evaluate):
    stop = threading.Event()
    at_three = toy.At("prompt", 3, stop.set)
    with pytest.raises(Stopped, match="step 3 of stage 'prompt'"):
        run(tmp_path, stage(steps=6, log_period=10), stop=stop, callback=at_three)
    assert steps_of(tmp_path, "train") == [2, 3]
    # Stopped again at once: there is nothing new to save.
    with pytest.raises(Stopped, match="step 3"):
        run(tmp_path, stage(steps=6, log_period=10), stop=stop)
    run(tmp_path, stage(steps=6, log_period=10))
    assert steps_of(tmp_path, "train") == [2, 3, 4, 6]
    assert steps_of(tmp_path, "validation") == [0, 2, 4, 6]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder with a stage that stopped at step 2 of 4."""
    folder = tmp_path_factory.mktemp("stopped")

    class Die(Callback):
        def on_checkpoint(self, stage, step):
            raise RuntimeError

    with pytest.MonkeyPatch.context() as patch:
        toy.ScriptedEvaluate(patch)
        with pytest.raises(RuntimeError):
            run(folder, stage(steps=4), callback=Die())
    return folder


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 1}, "checkpoint of step 2, but stage 'prompt' has only Stage.steps=1"),
        ({"batch_size": 8}, "batch_size is 4, but this run's is 8"),
        ({"trainable": [".*"]}, "other trainable parameters"),
        ({"optimizer": Adafactor(Schedule(0.1))}, "another optimizer"),
        (
            {"model": dataclasses.replace(toy.MODEL, peft=(toy.Prompt(length=4),))},
            r"\(encoder/prompt: \(3, 16\), now \(4, 16\)\)",
        ),
    ],
)
def test_a_changed_config_does_not_resume(stopped, evaluate, changes, sentence):
    files = sorted(path for path in stopped.rglob("*") if path.suffix in (".json", ".jsonl"))
    before = [path.read_bytes() for path in files]
    with pytest.raises(UserError, match=sentence):
        run(stopped, stage(**{"steps": 4, **changes}))
    assert [path.read_bytes() for path in files] == before


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        *(
            ({field: 0}, f"{field}=0 of stage 'model' must be at least 1")
            for field in ("steps", "batch_size", "microbatches", "eval_period", "log_period")
        ),
        ({"microbatches": 3}, "microbatches=3 of stage 'model' does not divide its batch_size=4"),
        ({"trainable": []}, "'model' trains nothing"),
    ],
)
def test_settings_are_checked(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        toy.stage(**changes)


def test_randomness_of_seeds_stages_and_uses_differs():
    keys = [
        jax.random.key_data(stage_key(seed, name, use)).tobytes()
        for seed in (0, 1)
        for name in ("prompt", "model")
        for use in ("init", "peft", "dropout")
    ]
    assert len(set(keys)) == len(keys)
    assert stage_seed(0, "model") == stage_seed(0, "model") != stage_seed(1, "model")


def done(step, loss, weight, rate=0.1):
    values = {"loss": loss, "weight": weight, "token_accuracy": weight / 2}
    values |= {"grad_norm": 3.0, "learning_rate": rate}
    sums = {name: np.float32(value) for name, value in values.items()}
    return Done(step, sums, np.zeros(3, bool), np.arange(8))


def test_the_log_weighs_tokens_and_lags_one_window(tmp_path):
    class Progress:
        def update(self, *arguments, **numbers):
            shown.append((*arguments, numbers))

    shown = []
    with MetricWriter(tmp_path) as writer:
        log = TrainingLog(writer, Progress(), lambda *_: None, period=2, batch_size=8)
        log.add(done(1, loss=10.0, weight=2.0, rate=0.1))
        log.add(done(2, loss=2.0, weight=6.0, rate=0.3))
        log.add(done(3, loss=5.0, weight=1.0))
        assert shown == [(2, 16, {})] and not (tmp_path / "metrics.jsonl").exists()
        log.add(done(4, loss=5.0, weight=1.0))
        assert shown[1:] == [(4, 16, {"loss": 1.5})]
        log.flush(4)
        assert shown[2:] == [(4, 0, {"loss": 5.0})]
        log.add(done(5, loss=0.0, weight=0.0))  # a batch of padding only
        log.flush(5)
        log.flush(5)
        assert shown[3:] == [(5, 0, {"loss": 0.0})] * 2
    lines = toy.read_lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert lines[0]["token_accuracy"] == 0.5 and lines[0]["grad_norm"] == 3.0
    assert lines[0]["learning_rate"] == pytest.approx(0.2)


def test_batches_by_length_reach_the_stage(tmp_path, evaluate):
    run(tmp_path / "plain", stage(steps=4))
    run(tmp_path / "sorted", stage(steps=4, by_length=2))
    plain, ours = (
        [
            line
            for line in toy.read_lines(tmp_path / name / "prompt/metrics.jsonl")
            if "loss" in line
        ]
        for name in ("plain", "sorted")
    )
    assert [line["step"] for line in plain] == [line["step"] for line in ours]
    assert [line["loss"] for line in plain] != [line["loss"] for line in ours]


@pytest.mark.parametrize(
    ("scores", "selected"),
    [((math.nan, math.nan, -3.0, math.nan), 4), ((-5.0, 1.0, 130.0, math.nan), 4)],
)
def test_scores_of_any_scale_select_and_nan_never_does(tmp_path, monkeypatch, scores, selected):
    toy.ScriptedEvaluate(monkeypatch, scores)
    _, summary = run(tmp_path, stage())
    outcome = Outcome.read(tmp_path / "prompt")
    assert (outcome.step, outcome.score) == (selected, scores[2])
    values = [row.value for row in summary.rows if row.split == "validation"]
    assert values == pytest.approx(list(scores), nan_ok=True)
