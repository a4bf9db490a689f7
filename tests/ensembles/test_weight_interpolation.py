"""Weight interpolation against NumPy in float64, and as a run's selection and model."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import toy
from test_export import base_params, write_base
from tiny_families import model_of, params_of

import robust_ft
from robust_ft import checks, convert, inference, runner
from robust_ft.ensembles.mixture_weight import SelectedWeight
from robust_ft.ensembles.weight_interpolation import InterpolationSelection, between
from robust_ft.errors import UserError
from robust_ft.models.peft import Lora, Prompt
from robust_ft.predictor import Predictor
from robust_ft.recipe import Recipe
from robust_ft.restore import load_params
from robust_ft.trainable import flatten, unflatten

LORA = Lora(rank=2, alpha=3.0)
families = pytest.mark.parametrize("family", [pytest.param("t5", marks=pytest.mark.slow), "llama"])


def predictors(family, *peft, frozen=()):
    """Returns a model with the parameters of two seeds; those in `frozen` have the first's."""
    model = model_of(family, *peft)
    start, end = (flatten(params_of(model, seed)) for seed in (0, 1))
    for path in start:
        if path.endswith("/b"):
            start[path] = jnp.zeros_like(start[path])
        if frozen and frozen(path):
            end[path] = start[path]
    vocabulary = toy.DATA.vocabulary
    return [Predictor(model, unflatten(flat), vocabulary) for flat in (start, end)]


@families
def test_parameters_of_the_model(family):
    start, end = predictors(family, frozen=lambda path: "embedder" in path)
    first, last = flatten(start.params), flatten(end.params)
    for weight in (0.0, 0.3, 1.0):
        for path, found in flatten(between(start, end, weight).params).items():
            ends = (np.asarray(flat[path], np.float64) for flat in (first, last))
            expected = sum(w * x for w, x in zip((1 - weight, weight), ends, strict=True))
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6, err_msg=path)
            exact = {0.0: first, 1.0: last}.get(weight, first if "embedder" in path else {})
            if path in exact:
                assert np.array_equal(found, exact[path]), path


@families
def test_a_lora_is_scaled(family):
    start, end = predictors(family, LORA, frozen=lambda path: "lora" not in path)
    plain, last = (flatten(LORA.merge(each.params)) for each in (start, end))
    for weight in (0.0, 0.3, 1.0):
        merged = flatten(LORA.merge(between(start, end, weight).params))
        for path, found in merged.items():
            kernel, whole = (np.asarray(flat[path], np.float64) for flat in (plain, last))
            expected = kernel + weight * (whole - kernel)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6, err_msg=path)


SELECTION = InterpolationSelection(
    stage="stage:full",
    weights=(0.0, 0.5, 1.0),
    evaluations=toy.evaluations("validation"),
    final_evaluations=toy.evaluations("test"),
)
CHANGES = {"steps": 2, "microbatches": 1, "final_evaluations": ()}


def made(directory, base, **changes):
    settings = {"model": toy.PLAIN, "trainable": ["base"], "restore": base, **CHANGES, **changes}
    return Recipe("r", str(directory), (toy.stage("full", **settings),), selections=(SELECTION,))


def test_what_cannot_be_interpolated():
    with pytest.raises(UserError, match=r"'wise_ft' needs a pretrained model .*'full' .*scratch"):
        checks.check(made("unused", "scratch"))
    stage = made("unused", "a", model=toy.MODEL, trainable=[".*"]).stages[0]
    with pytest.raises(UserError, match=r"The Prompt 'prompt' of stage 'full' has no pretrained"):
        SELECTION.check({"full": stage})
    with_lora = dataclasses.replace(toy.PLAIN, peft=(LORA,))
    first = dataclasses.replace(stage, name="first", model=with_lora, trainable=["peft"])
    again = dataclasses.replace(first, name="full", restore="stage:first")
    with pytest.raises(UserError, match=r"The Lora 'lora' of stage 'full' was there before"):
        SELECTION.check({"first": first, "full": again})
    under = dataclasses.replace(stage, model=toy.MODEL, trainable=["base"])
    SELECTION.check({"full": under})  # as in ProMoT's second stage
    assert isinstance(toy.MODEL.peft[0], Prompt)


SCORES = [3.0, 9.0, 9.0]  # of each alpha; the tie goes to 1/2


def selected(recipe, monkeypatch, scores):
    """Runs a recipe and returns its rows and its model as loaded, which is its result."""
    scripted = toy.ScriptedEvaluate(monkeypatch)
    scripted.scores = scores
    rows = [row for row in runner.run(recipe).rows if row.stage == "wise_ft"]
    assert SelectedWeight.read(Path(recipe.model_dir) / "wise_ft").weight == 0.5
    assert {row.weight for row in rows} == set(SELECTION.weights)
    loaded = robust_ft.load(recipe.model_dir)
    toy.assert_same(toy.flat(runner.final_predictor(recipe).params), toy.flat(loaded.params))
    return rows, loaded


@pytest.mark.slow
def test_the_selected_model_is_the_runs_result(tmp_path, monkeypatch):
    base, start = write_base(tmp_path / "base"), base_params()
    recipe = made(tmp_path / "run", base)
    write = InterpolationSelection._write

    def killed(*arguments):
        write(*arguments)
        raise OSError

    with pytest.MonkeyPatch.context() as patch:  # all but selection.json is written
        toy.ScriptedEvaluate(patch, [1.0, 2.0, *SCORES])
        patch.setattr(InterpolationSelection, "_write", killed)
        with pytest.raises(OSError):
            runner.run(recipe)
    _, loaded = selected(recipe, monkeypatch, SCORES)
    end = toy.final(tmp_path / "run", "full")
    for path, leaf in flatten(loaded.params).items():
        expected = 0.5 * np.asarray(start[path]) + 0.5 * end[path]
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=1e-6, err_msg=path)
    wanted = inference.Inference(toy.evaluations("test"))
    assert {row.stage for row in inference.evaluate_all(recipe, wanted)} == {"wise_ft"}
    convert.convert(str(tmp_path / "run"), str(tmp_path / "converted"))
    converted = toy.flat(robust_ft.load(tmp_path / "converted").params)
    toy.assert_same(converted, toy.flat(loaded.params))
    checkpoint = next((tmp_path / "run/wise_ft").glob("checkpoint_*"))
    toy.assert_same(load_params(str(checkpoint)), toy.flat(loaded.params))


@pytest.mark.slow
def test_a_scaled_lora_is_exported_and_evaluated_with_and_without(tmp_path, monkeypatch):
    base, start = write_base(tmp_path / "base"), base_params()
    model = dataclasses.replace(toy.PLAIN, peft=(LORA,))
    recipe = made(tmp_path / "run", base, model=model, trainable=["peft"])
    rows, loaded = selected(recipe, monkeypatch, [1.0, 2.0, *SCORES])
    assert {"held_out", "kept"} < {row.role for row in rows}
    found, end = toy.flat(loaded.params), toy.final(tmp_path / "run", "full")
    for path, leaf in end.items():
        np.testing.assert_array_equal(found[path], leaf * (0.5 if path.endswith("/b") else 1))
    assert all(np.array_equal(found[path], leaf) for path, leaf in start.items())
    export = robust_ft.load(base, weights=tmp_path / "run/wise_ft/export")
    toy.assert_same(toy.flat(export.params), found)
