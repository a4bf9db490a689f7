"""Evaluations: what is decoded, what is counted, and how tasks average."""

import dataclasses
import functools
import json
import types

import jax
import numpy as np
import pytest
import toy

from robust_ft import evaluate as evaluate_lib
from robust_ft.data import loader
from robust_ft.ensembles.predictor import Ensemble
from robust_ft.errors import UserError
from robust_ft.evaluate import suite
from robust_ft.evaluator import HELD_OUT, KEPT, OOD, TARGET, Result, evaluate, held_out_rows
from robust_ft.models.peft import Prompt
from robust_ft.predictor import BasePredictor, Predictor


class Recorder(BasePredictor):
    """A predictor that says what it is told to, and keeps the batches.

    Args:
        say: from the text of an input to the output.
    """

    def __init__(self, say):
        self.say = say
        self.model = toy.MODEL
        self.vocabulary = toy.DATA.vocabulary
        self.batches = []
        self.detached = ()

    def without(self, *names):
        self.detached = names
        return self

    def generate(self, batch, decoder):
        self.batches.append({name: rows.copy() for name, rows in batch.items()})
        texts = [self.vocabulary.decode(row.tolist()) for row in batch["encoder_input_tokens"]]
        tokens = np.zeros((len(texts), 2, 40), np.int32)
        for row, text in zip(tokens, texts, strict=True):
            said = [*self.vocabulary.encode(self.say(text)), self.vocabulary.eos_id]
            row[0, : len(said)] = said
            row[1] = 99  # the second best, which does not count
        return types.SimpleNamespace(tokens=tokens)


def make(role, split="test", shots=0, score=0.0, share=None, count=3, task="toy"):
    values = {"accuracy": score, "exact_match": 7.0}
    if share is not None:
        values["format_share"] = share
    return Result(task, split, role, values, count, shots=shots)


def test_every_example_is_scored_once_and_in_order():
    predictor = Recorder(lambda text: "a" if text == "is 3 odd" else text)
    evaluation = dataclasses.replace(toy.TARGET_EVALUATION, batch_size=10)
    result = evaluate(evaluation, predictor)
    # Of the training split, 24 examples.
    assert [p["input"] for p in result.predictions] == [f"is {i} odd" for i in range(24)]
    assert [p["target"] for p in result.predictions] == list("aab" * 8)
    assert result.predictions[3]["prediction"] == "a"
    assert result.metric == "accuracy" and result.score == pytest.approx(100 / 24)


def test_rows_that_fill_up_repeat_a_real_one():
    predictor = Recorder(lambda text: "a")
    data = dataclasses.replace(toy.DATA, split="test")  # 7 examples
    result = evaluate(dataclasses.replace(toy.TARGET_EVALUATION, data=data), predictor)
    assert [batch["encoder_input_tokens"].shape for batch in predictor.batches] == [(4, 12)] * 2
    last = predictor.batches[-1]["encoder_input_tokens"]
    np.testing.assert_array_equal(last[3], last[0])
    assert len(result.predictions) == 7
    assert result.values == {
        "accuracy": pytest.approx(500 / 7),
        "exact_match": pytest.approx(500 / 7),
        "format_share": 1.0,
    }


def test_format_share_is_of_trimmed_outputs():
    # Whole outputs: one is in the format as it is, one after trimming, one never.
    outputs = {"is 0 odd": "b", "is 1 odd": "<extra_id_0> b <extra_id_1> junk", "is 2 odd": "no"}
    predictor = Recorder(outputs.__getitem__)
    evaluation = dataclasses.replace(
        toy.TARGET_EVALUATION, data=dataclasses.replace(toy.DATA, split="validation"), limit=3
    )
    examples = [
        dataclasses.replace(e, inputs=np.array([*toy.DATA.vocabulary.encode(t), 1], np.int32))
        for e, t in zip(loader.eval_examples(evaluation.data, 3), outputs, strict=True)
    ]
    (_, info) = evaluate_lib._examples(evaluation.task_data, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_lib, "_examples", lambda data, limit: (examples, info))
        result = evaluate(evaluation, predictor)
    assert result.values["format_share"] == pytest.approx(2 / 3)


def test_prompts_are_detached_and_limits_spread():
    predictor = Recorder(lambda text: "x")
    evaluation = dataclasses.replace(toy.HELD_OUT_EVALUATION, limit=3, target_format=None)
    evaluation = dataclasses.replace(
        evaluation,
        data=dataclasses.replace(evaluation.data, task="toy_other", split="validation"),
        shots=1,
    )
    result = evaluate(evaluation, predictor)
    assert predictor.detached == ("prompt",)
    inputs = ["0 x count 0", "0 x count 2", "0 x count 4"]  # one shot, of the split's 6
    assert [p["input"] for p in result.predictions] == inputs
    assert "format_share" not in result.values


def test_examples_get_their_tasks_prompt():
    predictor = Recorder(lambda text: "a")
    prompt = Prompt(length=3, tasks=("other", "toy"))
    predictor.model = dataclasses.replace(toy.PLAIN, peft=(prompt,))
    evaluate(dataclasses.replace(toy.TARGET_EVALUATION, limit=6), predictor)
    for batch in predictor.batches:
        assert batch["task_index"].dtype == np.int32
        assert batch["task_index"].tolist() == [1] * 4
    data = dataclasses.replace(toy.DATA, task="toy_other")
    with pytest.raises(UserError, match="no prompt for the task 'toy_other', only for other, toy"):
        evaluate(dataclasses.replace(toy.TARGET_EVALUATION, data=data), predictor)
    # Without prompts there is no need for one.
    predictor.model, predictor.batches = toy.PLAIN, []
    evaluate(dataclasses.replace(toy.TARGET_EVALUATION, data=data, limit=4), predictor)
    assert "task_index" not in predictor.batches[0]


def with_choices(monkeypatch, choices):
    """Gives the first examples these answer choices."""
    cached, info = evaluate_lib._examples(toy.DATA, len(choices))
    examples = [
        dataclasses.replace(e, answer_choices=tuple(c))
        for e, c in zip(cached, choices, strict=True)
    ]
    monkeypatch.setattr(evaluate_lib, "_examples", lambda data, limit: (examples, info))
    return [example.inputs_text for example in examples]


def test_answer_choices_are_ranked(monkeypatch):
    choices = [["b", "a"], ["a", "b", "aa", "ba"], ["b"], ["b", "a"], ["bbb", "a"]]
    texts = with_choices(monkeypatch, choices)
    predictor = Predictor(toy.MODEL, toy.MODEL.init(jax.random.key(1)), toy.DATA.vocabulary)
    evaluation = dataclasses.replace(toy.TARGET_EVALUATION, detach="all", batch_size=40)
    plain = predictor.without("prompt")
    for per_token in (False, True):
        result = evaluate(dataclasses.replace(evaluation, per_token=per_token), predictor)
        ranked = plain.rank(texts, choices, per_token, inputs_length=12, batch_size=40)
        expected = [row[best] for row, best in zip(choices, ranked.best, strict=True)]
        assert [p["prediction"] for p in result.predictions] == expected
        right = [p["prediction"] == p["target"] for p in result.predictions]
        assert result.score == pytest.approx(100 * np.mean(right)) and 0 < result.score < 100
    with_choices(monkeypatch, [*choices[:4], []])
    with pytest.raises(UserError, match="'toy' has answer choices for 4 of 5 examples"):
        evaluate(evaluation, predictor)


def with_three_prompts():
    prompt = Prompt(length=3, tasks=("one", "two", "toy"))
    return dataclasses.replace(toy.PLAIN, peft=(prompt,))


def test_prompts_vote():
    class Voters(Recorder):
        """Two prompts agree on every other example, and all differ on the rest."""

        def generate(self, batch, decoder):
            decoded = super().generate(batch, decoder)
            for row, prompt in zip(decoded.tokens, batch["task_index"], strict=True):
                said = {"c": "aba", "d": "bac"}[self.vocabulary.decode(row[0].tolist())][prompt]
                row[0, 0] = self.vocabulary.encode(said)[0]
            return decoded

    predictor = Voters(lambda text: "c" if int(text.split()[1]) % 2 == 0 else "d")
    predictor.model = with_three_prompts()
    evaluation = dataclasses.replace(
        toy.TARGET_EVALUATION,
        data=dataclasses.replace(toy.DATA, split="validation"),
        prompts=["two", "one", "toy"],
        target_format="a",
    )
    result = evaluate(evaluation, predictor)
    batch = predictor.batches[0]
    assert batch["task_index"].tolist() == [1, 0, 2] * 4
    rows = batch["encoder_input_tokens"].reshape(4, 3, -1)
    np.testing.assert_array_equal(rows, np.repeat(rows[:, :1], 3, axis=1))
    assert np.any(rows[0] != rows[1])
    # "two" says bababa, "one" ababab and "toy" acacac: the most frequent answer, or two's.
    assert [p["prediction"] for p in result.predictions] == list("aaaaaa")
    assert [p["target"] for p in result.predictions] == list("aabaab")
    assert result.metric == "accuracy" and result.score == pytest.approx(400 / 6)
    assert result.values["accuracy_prompt_average"] == pytest.approx((50 + 50 + 100 / 3) / 3)
    assert result.values["accuracy_prompt_best"] == 50
    assert result.values["format_share"] == 1


def test_prompts_vote_on_answer_choices(monkeypatch):
    choices = [["b", "a"], ["a", "b", "aa"], ["b", "a", "ab"]]
    texts = with_choices(monkeypatch, choices)
    model = with_three_prompts()
    params = jax.tree.map(lambda leaf: 3 * leaf, model.init(jax.random.key(1)))
    predictor = Predictor(model, params, toy.DATA.vocabulary)
    prompts = ("toy", "one", "two")
    evaluation = dataclasses.replace(toy.TARGET_EVALUATION, prompts=prompts, batch_size=12)
    result = evaluate(evaluation, predictor)
    best = [
        predictor.rank(texts, choices, inputs_length=12, batch_size=12, task=prompt).best
        for prompt in prompts
    ]
    for i, (row, prediction) in enumerate(zip(choices, result.predictions, strict=True)):
        said = [row[of_prompt[i]] for of_prompt in best]
        assert prediction["prediction"] == max(said, key=said.count)


def test_prompts_that_cannot_vote():
    with pytest.raises(UserError, match="asks for the prompts one, but no task has a prompt"):
        evaluate(dataclasses.replace(toy.TARGET_EVALUATION, prompts=["one"]), Recorder(str))
    with pytest.raises(UserError, match=r"write \['one'\]"):
        dataclasses.replace(toy.TARGET_EVALUATION, prompts="one")


def test_ensembles_are_evaluated_as_models_are():
    vocabulary = toy.DATA.vocabulary
    prompted, full = (
        Predictor(model, model.init(jax.random.key(seed)), vocabulary)
        for seed, model in enumerate((toy.MODEL, toy.PLAIN))
    )
    # Held-out tasks are evaluated without the prompt.
    expected, found = (
        evaluate(toy.HELD_OUT_EVALUATION, each)
        for each in (prompted, Ensemble([full, prompted], [0, 1]))
    )
    assert found.predictions == expected.predictions and found.values == expected.values


def with_and_without(*scores):
    """Returns results of tasks without LoRA, and with it (None: not evaluated so)."""
    for number, (without, kept) in enumerate(scores):
        result = make(HELD_OUT, task=f"toy{number}", score=without)
        yield dataclasses.replace(result, without=("lora",))
        if kept is not None:
            yield make(KEPT, task=f"toy{number}", score=kept)


def test_means_with_and_without_methods_are_never_mixed():
    results = list(with_and_without((10.0, 0.0), (30.0, 4.0)))
    for order in (results, results[::-1]):
        rows = [r for r in held_out_rows(order, "model", 4) if r.metric == "norm_avg"]
        assert [(r.role, r.value, r.without) for r in rows] == [
            (KEPT, 2.0, ()), (HELD_OUT, 20.0, ("lora",)),
        ]  # fmt: skip
    # A task that detaches nothing is in both means; one without the other number is in neither.
    other = make(HELD_OUT, task="other", score=50.0)
    rows = [r for r in held_out_rows([*results, other], "m", 4) if r.metric == "norm_avg"]
    assert [r.value for r in rows] == [18.0, 30.0]
    results = list(with_and_without((10.0, 0.0), (30.0, None)))
    rows = [r for r in held_out_rows(results, "m", 4) if r.metric == "norm_avg"]
    assert [(r.role, r.value) for r in rows] == [(HELD_OUT, 20.0)]


def test_rows_of_a_result(tmp_path):
    result = make(HELD_OUT, shots=2, score=50.0)
    rows = result.rows("model", 4)
    assert rows[0].to_json() == {
        "stage": "model",
        "step": 4,
        "task": "toy",
        "role": "held_out",
        "split": "test",
        "shots": 2,
        "metric": "accuracy",
        "value": 50.0,
        "num_examples": 3,
    }
    assert [row.metric for row in rows] == ["accuracy", "exact_match"]
    result = dataclasses.replace(result, predictions=[{"input": "ü\n", "prediction": "☃"}])
    result.write(tmp_path / "new", 4)
    (file,) = (tmp_path / "new").iterdir()
    assert file.name == "toy_2shot-test-000004.jsonl"
    assert json.loads(file.read_text()) == {"input": "ü\n", "prediction": "☃"}


def test_held_out_rows_average_the_first_metric_by_split_and_shots():
    results = [
        make(TARGET, score=99.0, share=1.0),
        make(HELD_OUT, score=10.0, share=0.5),
        make(HELD_OUT, score=30.0, count=5),
        make(HELD_OUT, shots=1, score=80.0, share=0.25),
        make(HELD_OUT, split="validation", score=4.0),
    ]
    rows = held_out_rows(results, "model", 2)
    found = {(r.split, r.shots, r.metric): (r.value, r.num_examples) for r in rows}
    assert found == {
        ("test", 0, "norm_avg"): (20.0, 8),
        ("test", 0, "format_share"): (0.5, 8),
        ("test", 1, "norm_avg"): (80.0, 3),
        ("test", 1, "format_share"): (0.25, 3),
        ("validation", 0, "norm_avg"): (4.0, 3),
    }
    assert all((r.task, r.role, r.stage) == (HELD_OUT, HELD_OUT, "model") for r in rows)
    assert held_out_rows(results[:1], "model", 2) == []


def test_suite():
    target, held_out = toy.TARGET_EVALUATION, toy.HELD_OUT_EVALUATION
    found = suite("test", target, held_out, {0: ["a", "b"], 2: ["a"]}, limit=5)
    assert [e.task for e in found] == ["toy", "a", "b", "a_2shot"]
    assert [e.role for e in found] == [TARGET, HELD_OUT, HELD_OUT, HELD_OUT]
    assert [e.detach for e in found] == [(), "all", "all", "all"]
    assert {e.data.split for e in found} == {"test"} and {e.limit for e in found} == {5}
    assert found[3].data.task == "a" and found[3].task_data.task == "a_2shot"
    assert suite("test", target) == suite("test", target, held_out)
    assert suite("test", target)[0].limit is None


def test_suite_of_several_targets_and_other_data():
    target, held_out = toy.TARGET_EVALUATION, toy.HELD_OUT_EVALUATION
    found = suite("test", target, held_out, {0: ["c"]}, ["a", "b"], ["a_ood"])
    roles = [(e.task, e.role, e.detach) for e in found]
    assert roles == [
        ("a", TARGET, ()),
        ("b", TARGET, ()),
        ("a_ood", OOD, ()),
        ("c", HELD_OUT, "all"),
    ]


def test_what_is_detached():
    on = functools.partial(dataclasses.replace, toy.TARGET_EVALUATION)
    assert on(detach="all").detached(toy.MODEL) == ("prompt",)
    assert on(detach="all").detached(toy.PLAIN) == ()
    assert on(detach=["prompt"]).detached(toy.MODEL) == ("prompt",)
    with pytest.raises(UserError, match=r"'toy' detaches 'promt', .* Did you mean 'prompt'"):
        on(detach=["promt"]).detached(toy.MODEL)


def test_settings_are_checked():
    for field, value in (("batch_size", 0), ("limit", 0), ("limit", -1)):
        with pytest.raises(UserError, match=f"{field}={value} of the evaluation on 'toy'"):
            dataclasses.replace(toy.TARGET_EVALUATION, **{field: value})


@pytest.mark.parametrize(
    ("names", "message"),
    [((), "Task 'toy' names no metric"), (("ter", "bleu"), "Task 'toy' names ter first, by which")],
)
def test_a_task_without_a_metric_to_select_by(monkeypatch, names, message):
    examples, info = evaluate_lib._examples(toy.DATA, 2)
    info = dataclasses.replace(info, metrics=names)
    monkeypatch.setattr(evaluate_lib, "_examples", lambda data, limit: (examples, info))
    with pytest.raises(UserError, match=message):
        evaluate(toy.TARGET_EVALUATION, Recorder(lambda text: "a"))
