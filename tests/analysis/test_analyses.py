"""Drift, gradient alignment and prompt neighbours, against NumPy in float64 and by hand."""

import dataclasses

import jax
import numpy as np
import pytest
import toy
from analysis_references import (
    VOCABULARY,
    cosine_of,
    drift_of,
    gradients_of,
    of_family,
    predictor,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_families import CONFIGS

from robust_ft import runner
from robust_ft.analysis import Drift, GradientAlignment, PromptNeighbors, examples
from robust_ft.analysis.prompt_neighbors import _nearest
from robust_ft.ensembles.predictor import Ensemble
from robust_ft.errors import UserError
from robust_ft.evaluator import EvalContext, Evaluator
from robust_ft.models.peft import Prompt
from robust_ft.predictor import Predictor
from robust_ft.trainable import flatten, merge, split

FAMILIES = [f if f == "t5" else pytest.param(f, marks=pytest.mark.slow) for f in CONFIGS]
TARGET, OTHER = toy.evaluations("validation")[:2]


@pytest.mark.parametrize("family", FAMILIES)
def test_drift_is_the_divergence_of_the_pretrained_model_from_the_model(family):
    prompted, base = of_family(family, Prompt(length=2)), of_family(family)
    now, before = predictor(prompted), predictor(base, seed=1)
    drift = Drift((TARGET, OTHER), batch_size=4)  # the split has 6 examples: two batches
    result = drift(EvalContext(now, pretrained=lambda: before))
    for evaluation, model in ((TARGET, now), (OTHER, now.without("prompt"))):
        expected = drift_of(evaluation, model, before)
        assert result.values[evaluation.role] == pytest.approx(expected, rel=1e-4)
    assert list(result.values) == ["target", "held_out"]  # in the order of the evaluations
    assert isinstance(drift, Evaluator) and result.num_examples == 12


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("all_layers", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_alignment_is_the_cosine_of_both_gradients(family, all_layers):
    model = predictor(of_family(family))
    alignment = GradientAlignment(TARGET, all_layers=all_layers, batch_size=4, seed=3)
    values = alignment(EvalContext(model)).values
    gradients = gradients_of(TARGET, model, seed=3)
    last = "decoder/layers_1/"
    parts = [f"{last}mlp", *(f"{last}self_attention/{part}" for part in ("qkv", "value"))]
    for part in parts:
        paths = [path for path in gradients[0] if path.startswith(part + "/")]
        assert (part in values) == bool(paths)
        if paths:
            assert values[part] == pytest.approx(cosine_of(gradients, paths), abs=1e-4)
    named = tuple(name + "/" for name in values if "/" in name)
    assert values["cosine"] == pytest.approx(
        cosine_of(gradients, [path for path in gradients[0] if path.startswith(named)]), abs=1e-4
    )
    layers = {"/".join(name.split("/")[:2]) for name in values if "/" in name}
    every = {name for path in gradients[0] if "layers_" in (name := "/".join(path.split("/")[:2]))}
    assert layers == (every if all_layers else {last[:-1]})


def test_targets_that_are_all_the_same_are_format_alone(monkeypatch):
    model = predictor(of_family("t5"))
    same = [np.array([70, 1], np.int32)] * 6
    monkeypatch.setattr(examples, "targets", lambda inputs: same)
    values = GradientAlignment(TARGET)(EvalContext(model)).values
    assert values["cosine"] == pytest.approx(1, abs=1e-6)
    assert values["format_norm"] == pytest.approx(1, abs=1e-6)


def test_without_a_target_there_is_no_drift_of_0(monkeypatch):
    monkeypatch.setattr(examples, "read", lambda evaluation: [])
    model = predictor(of_family("t5"))
    with pytest.raises(UserError, match="the tasks of the role 'target' have no target in 'valid"):
        Drift((TARGET,))(EvalContext(model, pretrained=lambda: model))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 5))
def test_nearest_rows(seed, count):
    rng = np.random.default_rng(seed)
    vectors, table = rng.normal(size=(4, 6)), rng.normal(size=(9, 6))
    cosines, tokens = _nearest(np.float32(vectors), np.float32(table), count)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (vectors, table)]
    expected = unit[0] @ unit[1].T
    np.testing.assert_array_equal(tokens, np.argsort(-expected, axis=1)[:, :count])
    np.testing.assert_allclose(cosines, -np.sort(-expected, axis=1)[:, :count], atol=1e-5)


def with_prompt(model, value):
    predicted = predictor(model)
    owned = frozenset(filter(model.peft_owns, flatten(predicted.params)))
    prompt, rest = split(predicted.params, owned)
    params = merge(jax.tree.map(lambda _: value, prompt), rest)
    return Predictor(model, params, VOCABULARY)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_of_tokens_has_these_as_neighbors(family):
    model = of_family(family, Prompt(length=3))
    table = np.asarray(predictor(model).params["token_embedder"]["embedding"])
    (a,), (c,) = VOCABULARY.encode("A"), VOCABULARY.encode("c")
    result = PromptNeighbors(1, ("A", "B"))(EvalContext(with_prompt(model, 3 * table[[a, c, a]])))
    assert result.values["nearest_cosine"] == pytest.approx(1, abs=1e-5)
    assert result.values["shared"] == pytest.approx(200 / 3)  # the first and the last
    assert result.values["labels_found"] == 50  # "A", and not "B"
    assert [line["prediction"] for line in result.predictions] == [
        "'A' 1.00", "'c' 1.00", "'A' 1.00",
    ]  # fmt: skip


def test_each_task_has_its_own_vectors():
    model = of_family("t5", Prompt(length=2, tasks=("x", "y")))
    table = np.asarray(predictor(model).params["token_embedder"]["embedding"])
    ids = np.array([[70, 71], [72, 73]])
    result = PromptNeighbors(count=2)(EvalContext(with_prompt(model, table[ids])))
    assert [line["input"] for line in result.predictions] == [
        "x, vector 0", "x, vector 1", "y, vector 0", "y, vector 1",
    ]  # fmt: skip
    assert result.values["shared"] == 0


@pytest.mark.slow
def test_in_a_recipe(tmp_path):
    analyses = (
        Drift((TARGET, OTHER), batch_size=4),
        GradientAlignment(TARGET),
        GradientAlignment(dataclasses.replace(TARGET, detach=("prompt",))),
        PromptNeighbors(),
    )
    changes = {"evaluations": (TARGET, *analyses), "final_evaluations": ()}
    rows = runner.run(toy.promot(tmp_path / "run", changes, changes)).rows
    found = {(r.stage, r.task, r.metric, r.step): r.value for r in rows if r.role == "analysis"}
    # Without its prompt the model is the pretrained one, until the second stage.
    assert found["prompt", "drift", "held_out", 6] == pytest.approx(0, abs=1e-6)
    assert found["model", "drift", "held_out", 6] > 1e-6
    assert 0 < found["prompt", "drift", "target", 0] != found["prompt", "drift", "target", 6]
    bare = [
        found["prompt", "gradient_alignment_without_prompt", "cosine", step] for step in (0, 2, 6)
    ]
    assert len(set(bare)) == 1  # the prompt alone trains
    assert {r.step for r in rows if r.task == "prompt_neighbors" and r.stage == "model"}
    assert list((tmp_path / "run/prompt/inference_eval").glob("prompt_neighbors-none-*.jsonl"))


@pytest.mark.parametrize(
    ("analysis", "sentence"),
    [
        (lambda: Drift(()), "Drift.evaluations is empty"),
        (lambda: Drift((TARGET, *toy.evaluations("test"))), "of one split, not of test and valid"),
        (lambda: PromptNeighbors(labels="A"), r"must be a list; write \['A'\]"),
        (lambda: PromptNeighbors()(EvalContext(predictor(of_family("t5")))), "set Model.prompt"),
        (lambda: Drift((TARGET,))(EvalContext(predictor(of_family("t5")))), "only a run has"),
        (
            lambda: GradientAlignment(dataclasses.replace(TARGET, limit=1))(
                EvalContext(predictor(of_family("t5")))
            ),
            "shuffles targets, but 'toy' has 1 example",
        ),
        (
            lambda: Drift((TARGET,))(EvalContext(object.__new__(Ensemble))),
            "of one model, not of an ensemble",
        ),
    ],
)
def test_bad_input(analysis, sentence):
    with pytest.raises(UserError, match=sentence):
        analysis()
