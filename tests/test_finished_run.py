"""`robust_ft.load(run)`: what a run ended with, from its MODEL_DIR alone."""

import pytest
import toy
from test_export import NORMS, with_methods, write_base

import robust_ft
from robust_ft import runner, stage_start
from robust_ft.metrics import postprocess
from robust_ft.models.peft import IA3, Adapter, Lora, Prefix, Prompt
from robust_ft.recipe import Recipe

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


@pytest.mark.parametrize(("methods", "patterns"), METHODS.values(), ids=METHODS)
def test_every_method(base, tmp_path, methods, patterns):
    model = with_methods(*methods)
    stage = toy.stage(model=model, restore=base, trainable=patterns, **TEST, steps=2)
    assert_loads(trained(tmp_path, stage), tmp_path, "model")


@pytest.mark.parametrize("start", ["scratch", "base"])
def test_promot(base, tmp_path, start):
    """The model comes with the prompt that it was trained under."""
    restore = base if start == "base" else start
    recipe = toy.promot(tmp_path, prompt={"restore": restore} | TEST, model=TEST, seed=3)
    runner.run(recipe)
    loaded = assert_loads(recipe, tmp_path, "model")
    assert [method.name for method in loaded.model.peft] == ["prompt"]
    assert loaded.without("prompt").model.peft == ()
    assert_loads(recipe, tmp_path, "prompt", stage="prompt")
