"""`robust_ft.load(run)`: what a run ended with, from its MODEL_DIR alone."""

import dataclasses
import shutil

import pytest
import toy
from random_checkpoints import edit_json
from test_export import NORMS, with_methods, write_base

import robust_ft
from robust_ft import runner, stage_start
from robust_ft.convert import convert
from robust_ft.ensembles.mixture_weight import Candidate, SelectedWeight
from robust_ft.errors import UserError
from robust_ft.export import FOLDER
from robust_ft.files import write_json
from robust_ft.metrics import postprocess
from robust_ft.models.peft import IA3, Adapter, Lora, Prefix, Prompt
from robust_ft.recipe import Recipe
from robust_ft.restore import load_for_model

ALL = [".*"]
TEST = {"evaluations": (), "final_evaluations": toy.evaluations("test", held_out=False)}
QUIET = {"evaluations": (), "final_evaluations": (), "steps": 1, "microbatches": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("bases") / "base")


def trained(directory, *stages, seed=0):
    """Runs stages and returns the recipe."""
    recipe = Recipe("toy", str(directory), stages, seed)
    runner.run(recipe)
    return recipe


def predictions(directory, stage):
    """Returns the inputs and predictions that a stage's last evaluation wrote."""
    folder = directory / stage / "inference_eval"
    file = max(folder.glob("toy-test-*.jsonl"))
    rows = toy.read_lines(file)
    return [row["input"] for row in rows], [row["prediction"] for row in rows]


def assert_loads(recipe, directory, name, stage=None):
    """Asserts that a stage is loaded with the parameters and predictions that it ended with."""
    loaded = robust_ft.load(directory, stage=stage)
    expected = stage_start.predictor(recipe, name)
    assert loaded.model == expected.model
    assert loaded.vocabulary == expected.vocabulary
    toy.assert_same(toy.flat(loaded.params), toy.flat(expected.params))
    inputs, said = predictions(directory, name)
    answers = loaded.predict(inputs, toy.DECODER, inputs_length=toy.DATA.inputs_length)
    assert [postprocess.first_word(answer) for answer in answers] == said
    return loaded


METHODS = {
    "full": ((), ALL),
    "norms": ((), [NORMS]),
    "prompt": ((Prompt(length=3),), ["peft"]),
    "prefix": ((Prefix(length=2, mid_dim=5),), ["peft"]),
    "lora": ((Lora(rank=2, alpha=6.0, dropout_rate=0.1),), ["peft"]),
    "adapter": ((Adapter(size=3),), ["peft"]),
    "ia3 and norms": ((IA3(),), ["peft", NORMS]),
    "prompt and model": ((Prompt(length=3),), ALL),
    "a fixed prompt": ((Prompt(length=3, initialization="random_uniform"),), ["base"]),
    "a prompt that started as a text": (
        (Prompt(length=3, initialization="text", text="Say", vocabulary=toy.DATA.vocabulary),),
        ["peft"],
    ),
}


QUICK = {"lora", "prompt and model"}


@pytest.mark.parametrize(
    ("methods", "patterns"),
    [
        pytest.param(*each, id=name, marks=[pytest.mark.slow] * (name not in QUICK))
        for name, each in METHODS.items()
    ],
)
def test_every_method(base, tmp_path, methods, patterns):
    model = with_methods(*methods)
    stage = toy.stage(model=model, restore=base, trainable=patterns, **TEST, steps=2)
    run = tmp_path / "run"
    assert_loads(trained(run, stage), run, "model")
    # Converted, it says the same: merged, or with an export of what cannot be merged beside it.
    out = tmp_path / "out"
    convert(str(run), str(out), output_format="robust_ft")
    beside = out / FOLDER
    converted = robust_ft.load(out, weights=str(beside) if beside.is_dir() else None)
    inputs, said = predictions(run, "model")
    answers = converted.predict(inputs, toy.DECODER, inputs_length=toy.DATA.inputs_length)
    assert [postprocess.first_word(answer) for answer in answers] == said


@pytest.mark.parametrize("start", [pytest.param("scratch", marks=pytest.mark.slow), "base"])
def test_promot(base, tmp_path, start):
    """The model comes with the prompt that it was trained under."""
    restore = base if start == "base" else start
    recipe = toy.promot(tmp_path, prompt={"restore": restore} | TEST, model=TEST, seed=3)
    runner.run(recipe)
    loaded = assert_loads(recipe, tmp_path, "model")
    assert [method.name for method in loaded.model.peft] == ["prompt"]
    assert loaded.without("prompt").model.peft == ()
    assert_loads(recipe, tmp_path, "prompt", stage="prompt")


def test_a_chain_of_stages(base, tmp_path):
    """Each lays what it trained over what the one before ended with."""
    second = with_methods(Prompt("second", length=2))
    stages = (
        toy.stage("norms", model=toy.PLAIN, restore=base, trainable=[NORMS], **QUIET),
        toy.stage("late", restore="stage:norms", model=second, trainable=["peft"], **QUIET),
        toy.stage("last", restore="stage:late", model=second, trainable=["base"], **QUIET),
    )
    recipe = trained(tmp_path, *stages)
    for name in ("norms", "late", "last"):
        loaded = robust_ft.load(tmp_path, stage=name)
        expected = stage_start.predictor(recipe, name)
        assert loaded.model == expected.model
        toy.assert_same(toy.flat(loaded.params), toy.flat(expected.params))


@pytest.fixture(scope="module")
def promot(base, tmp_path_factory):
    """ProMoT, of a base in a folder of its own."""
    folder = tmp_path_factory.mktemp("promot")
    shutil.copytree(base, folder / "base")
    prompt = {"restore": str(folder / "base"), **QUIET}
    runner.run(toy.promot(folder / "run", prompt=prompt, model=QUIET))
    return folder


def test_what_is_refused_names_the_right_call(promot):
    run = promot / "run"
    (checkpoint,) = (run / "model").glob("checkpoint_*")
    call = rf"call robust_ft.load\('{run}', stage='model'\)"
    with pytest.raises(
        UserError, match=f"with the Prompt 'prompt', which it does not hold; {call}"
    ):
        robust_ft.load(promot / "base", weights=checkpoint)
    both = f"{run}/prompt/export,{checkpoint}"
    found = robust_ft.load(promot / "base", weights=both)
    toy.assert_same(toy.flat(found.params), toy.flat(robust_ft.load(run).params))
    with pytest.raises(UserError, match=f"model' is a stage of a run; {call}"):
        robust_ft.load(run / "model")
    with pytest.raises(UserError, match=r"no stage 'modle', only prompt, model. Did you mean 'mod"):
        robust_ft.load(run, stage="modle")
    with pytest.raises(UserError, match="is no run, so it has no stage 'model'"):
        robust_ft.load(promot / "base", stage="model")
    with pytest.raises(UserError, match=rf"is a run: robust_ft.load\('{run}'\) loads"):
        load_for_model(toy.MODEL, str(run))


def test_a_base_that_has_changed_or_is_gone(promot, tmp_path):
    """The second stage trained all of it, and needs it no more."""
    shutil.copytree(promot / "run", tmp_path / "run")
    model = tmp_path / "run" / "prompt" / "model.json"
    text = model.read_text().replace(str(promot / "base"), str(tmp_path / "base"))
    model.write_text(text)
    with pytest.raises(UserError, match=r"no checkpoint at '.*base'.* 'prompt' of .* started from"):
        robust_ft.load(tmp_path / "run", stage="prompt")
    robust_ft.load(tmp_path / "run")
    write_base(tmp_path / "base", seed=1)
    with pytest.raises(UserError, match="belongs to another base"):
        robust_ft.load(tmp_path / "run", stage="prompt")


def test_runs_that_have_not_finished_or_are_of_earlier_versions(promot, tmp_path):
    shutil.copytree(promot / "run", tmp_path / "run")
    (tmp_path / "run" / "model" / "outcome.json").rename(tmp_path / "outcome.json")
    with pytest.raises(UserError, match=r"Stage 'model' of .* has not finished; the same command"):
        robust_ft.load(tmp_path / "run")
    (tmp_path / "run" / "prompt" / "model.json").unlink()
    with pytest.raises(UserError, match=r"has no model.json: an earlier robust_ft wrote it"):
        robust_ft.load(tmp_path / "run", stage="prompt")


def test_selections(promot, tmp_path):
    """A cocktail's student is a stage; an ensemble is two, and the call is named."""
    shutil.copytree(promot / "run", tmp_path / "run")
    edit_json(tmp_path / "run" / "run.json", selections=["ensemble", "cocktail"])
    for name, folders, members in (
        ("ensemble", ("ensemble/lambda_0.25", "ensemble/lambda_1"), ("prompt", "model")),
        ("cocktail", ("prompt", "model"), ()),
    ):
        candidates = [Candidate(w, 1 - w, f, 1) for w, f in zip((0.25, 1), folders, strict=True)]
        (tmp_path / "run" / name).mkdir()
        selected = SelectedWeight.of(candidates, members)
        write_json(tmp_path / "run" / name / "selection.json", dataclasses.asdict(selected))
    loaded = robust_ft.load(tmp_path / "run")
    toy.assert_same(
        toy.flat(loaded.params), toy.flat(robust_ft.load(promot / "run", stage="prompt").params)
    )
    with pytest.raises(UserError) as error:
        robust_ft.load(tmp_path / "run", stage="ensemble")
    run = tmp_path / "run"
    assert str(error.value).endswith(
        f"call robust_ft.Ensemble([robust_ft.load('{run}', stage='prompt'), "
        f"robust_ft.load('{run}', stage='model')], (0.25, 0.75))."
    )
