"""Analyses of finished runs of tiny models, against NumPy in float64; and the command line."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from analysis_references import VOCABULARY, cosine_of, drift_of, gradients_of, of_family

import robust_ft
from robust_ft import runner, stage_start, train
from robust_ft.analysis import __main__ as command
from robust_ft.analysis_run import AnalysisSettings, analyse
from robust_ft.errors import UserError
from robust_ft.models.peft import Prompt
from robust_ft.predictor import Predictor
from robust_ft.recipe import Recipe

TARGET, OTHER = toy.evaluations("validation")[:2]
LABELS = AnalysisSettings(labels=("A",))
FLAGS = [
    f"--gin_file={toy.__file__.replace('toy.py', 'toy_promot.gin')}",
    "--gin.PROMPT_TRAIN_STEPS=2",
    "--gin.TRAIN_STEPS=4",
    "--gin.EVAL_PERIOD=2",
    "--gin.HELD_OUT_TASKS={0: ['toy_other']}",
]


def small(directory, family, evaluations=()):
    """Returns a run of one step; how it is evaluated is free after it has run."""
    stage = toy.stage(
        model=of_family(family, Prompt(length=2)), trainable=[".*"], steps=1, microbatches=1,
        evaluations=evaluations, final_evaluations=(),
    )  # fmt: skip
    return Recipe(family, str(directory), (stage,))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Returns a function: a family's recipe, run once for all tests of this module.

    The T5's is ProMoT, from the command line.
    """
    recipes = {}

    def of(family):
        if family not in recipes:
            directory = tmp_path_factory.mktemp("runs") / family
            if family == "t5":
                assert train.main([*FLAGS, f"--gin.MODEL_DIR={directory}"]) == 0
                recipes[family] = robust_ft.load_recipe(directory / "config.gin")
            else:
                runner.run(small(directory, family))
                recipes[family] = small(directory, family, (TARGET, OTHER))
        return recipes[family]

    return of


def ended(recipe):
    """Returns the last stage's model as it ended."""
    params = jax.tree.map(jnp.asarray, stage_start.finished(recipe, "model"))
    return Predictor(recipe.last.model, params, VOCABULARY)


def values(rows, recipe, task):
    """Returns {metric: value} of the last stage's selected step, on validation data."""
    step = stage_start.Outcome.read(f"{recipe.model_dir}/model").step
    return {
        row.metric: row.value
        for row in rows
        if (row.stage, row.step, row.task) == ("model", step, task) and row.split != "test"
    }


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "gpt2", "llama"])
def test_analyses_of_a_finished_run(finished, family):
    recipe = finished(family)
    target, other = recipe.last.evaluations[:2]
    model = ended(recipe)
    pretrained = stage_start.pretrained(recipe, recipe.stages[0])
    drift = values(analyse(recipe, "drift"), recipe, "drift")
    assert drift["target"] == pytest.approx(drift_of(target, model, pretrained), rel=1e-3)
    bare = model.without("prompt")
    assert drift["held_out"] == pytest.approx(drift_of(other, bare, pretrained), rel=1e-3)

    rows = analyse(recipe, "alignment")
    for name, own in (("", model), ("_without_prompt", bare)):
        found = values(rows, recipe, f"gradient_alignment_all_layers{name}")
        gradients = gradients_of(target, own)
        parts = [metric for metric in found if "/" in metric]
        assert len(parts) >= 3 * len({part.split("/")[1] for part in parts})
        for part in parts:
            paths = [path for path in gradients[0] if path.startswith(part + "/")]
            assert found[part] == pytest.approx(cosine_of(gradients, paths), abs=1e-3)

    found = values(analyse(recipe, "neighbors", LABELS), recipe, "prompt_neighbors")
    flat = toy.flat(model.params)
    (path,) = [path for path in flat if path.endswith("/prompt")]
    vectors, table = flat[path], flat["token_embedder/embedding"][: VOCABULARY.vocab_size]
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (vectors, table)]
    cosines = unit[0].astype(np.float64) @ unit[1].T  # [vectors, vocab]
    assert found["nearest_cosine"] == pytest.approx(cosines.max(1).mean(), abs=1e-4)
    (label,) = VOCABULARY.encode("A")
    assert found["labels_found"] == 100 * (label in np.argsort(-cosines, axis=1)[:, :5])


@pytest.mark.slow
def test_command_line(finished, monkeypatch, tmp_path, capsys):
    recipe = finished("t5")
    rows = analyse(recipe, "drift")
    assert {(row.stage, row.step) for row in rows} >= {("prompt", 0), ("prompt", 2), ("model", 0)}
    # Without its prompt the first stage's model is the pretrained one.
    first = [r.value for r in rows if r.stage == "prompt" and r.metric == "held_out"]
    assert first == pytest.approx([0] * len(first), abs=1e-6)
    # As if it had been stopped before the last stage's start.
    file = f"{recipe.model_dir}/drift.json"
    with open(file) as opened:
        content = json.load(opened)
    content["rows"] = [r for r in content["rows"] if (r["stage"], r["step"]) != ("model", 0)]
    with open(file, "w") as opened:
        json.dump(content, opened)
    calls = []
    at_step = stage_start.at_step
    monkeypatch.setattr(stage_start, "at_step", lambda *a: calls.append(a[3]) or at_step(*a))
    assert command.main(["drift", recipe.model_dir, f"--output={tmp_path}"]) == 0
    assert calls == [0] and "drift.png" in capsys.readouterr().out
    assert sorted(map(str, analyse(recipe, "drift"))) == sorted(map(str, rows))
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")
    assert "| model | 0 | validation |" in (tmp_path / "drift.md").read_text()
    report = robust_ft.write_report([recipe.model_dir], tmp_path)
    assert "| drift: target | 0.000 |" in report.markdown.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda r: analyse(r, "drfit"), "no analysis 'drfit', only .* Did you mean 'drift'"),
        (lambda r: analyse(r, "drift", AnalysisSettings(("modle",))), "Did you mean 'model'"),
        (
            lambda r: analyse(r, "drift", AnalysisSettings(limit=3)),
            "other settings: examples of toy in validation is 'all', now 3",
        ),
        (lambda r: analyse(r, "neighbors", AnalysisSettings(count=0)), "count=0"),
        (
            lambda r: command.main(["drift", r.model_dir, "--gin.PROMPT_LENGTH=4"]),
            "was made with other settings",
        ),
        (lambda r: command.main(["drift", r.model_dir, r.model_dir]), "needs --output=DIR"),
        (lambda r: command.main(["drift"]), "required: MODEL_DIR"),
        (lambda r: command.main(["drift", f"{r.model_dir}/model"]), "is not a run"),
        (lambda r: command.main(["neighbors", r.model_dir, "--limit=3"]), "no flag '--limit'"),
    ],
)
def test_mistakes(finished, call, sentence):
    recipe = finished("t5")
    analyse(recipe, "drift")
    with pytest.raises(UserError, match=sentence):
        call(recipe)


def test_an_unfinished_run(tmp_path):
    with pytest.raises(UserError, match=r"Stage 'model' of .* has not finished"):
        analyse(small(tmp_path, "t5", (TARGET,)), "drift")
