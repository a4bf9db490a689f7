"""Stages that train by FOMAML or Reptile: whole, stopped and resumed."""

import threading

import pytest
import toy
from test_trainer import run

from robust_ft.claiming import claim
from robust_ft.errors import UserError
from robust_ft.models.peft import Prompt
from robust_ft.objectives.meta_learning import Fomaml, Reptile
from robust_ft.optim import AdamW, Schedule
from robust_ft.recipe import Recipe
from robust_ft.trainer import Stopped

SETTINGS = {"tasks": 2, "inner_steps": 2, "inner_optimizer": AdamW(Schedule(0.05))}
RULES = {
    "fomaml": Fomaml(**SETTINGS),
    "reptile": Reptile(**SETTINGS),
    "fomaml, state carried": Fomaml(**SETTINGS, carries_state=True),
    "reptile, state carried": Reptile(**SETTINGS, carries_state=True),
}


def stage(rule, **changes):
    settings = {
        "gradient": rule,
        "trainable": [".*"],
        "evaluations": (),
        "final_evaluations": (),
        "steps": 6,
        **changes,
    }
    return toy.stage(**settings)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_stopped_stage_resumes_exactly(rule, tmp_path):
    expected, _ = run(tmp_path / "whole", stage(rule))
    stop = threading.Event()
    with pytest.raises(Stopped, match="step 3"):
        run(tmp_path / "stopped", stage(rule), stop=stop, callback=toy.At("model", 3, stop.set))
    found, _ = run(tmp_path / "stopped", stage(rule))
    toy.assert_same(found, expected)
    start, _ = run(tmp_path / "one", stage(rule, steps=1))
    assert any((expected[path] != start[path]).any() for path in expected if path != toy.PROMPT)


REFUSED = {
    "packing": ({"packing": True}, "Stage.packing=True of stage 'model' mixes"),
    "by_length": ({"by_length": 2}, "Stage.by_length=2 of stage 'model' mixes"),
    "microbatches": ({"microbatches": 4}, "Fomaml.tasks=2 is no multiple of it; choose 1 or 2"),
    "carried": (
        {"gradient": RULES["fomaml, state carried"], "microbatches": 1},
        "set Stage.microbatches=2",
    ),
}


@pytest.mark.parametrize(("changes", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_a_stage_refuses(changes, sentence):
    changes = {"gradient": RULES["fomaml"], **changes}
    with pytest.raises(UserError, match=sentence):
        stage(None, **changes)


def test_what_is_tuned_must_train():
    (prompt,) = toy.MODEL.peft
    assert isinstance(prompt, Prompt)
    only_base = stage(RULES["reptile"], trainable=["base"])
    with pytest.raises(UserError, match=f"Reptile.tunes names '{toy.PROMPT}', which does not"):
        only_base.trainable_paths()


def test_a_task_that_is_too_small_before_the_first_stage(tmp_path):
    """24 examples, 2 batches of 16."""
    second = stage(RULES["fomaml"], batch_size=16, restore="stage:prompt")
    recipe = Recipe("toy", str(tmp_path / "run"), (toy.prompt_stage(), second))
    message = r"'toy' has 24 examples .* of 16 each need 32; .* lower Stage.batch_size to 12\."
    with pytest.raises(UserError, match=message):
        claim(recipe)
    assert not (tmp_path / "run").exists()
