"""The moving average of parameters: its values, its place in checkpoints, and who sees it."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

import robust_ft
from robust_ft import runner, stage_anchor
from robust_ft.half_finetuning import HalfFinetuning
from robust_ft.objectives import Ewc, Fisher
from robust_ft.optim import AdamW, Schedule
from robust_ft.recipe import Recipe
from robust_ft.restore import load_params
from robust_ft.stage_checkpoints import StageCheckpoints, checkpoint_folder
from robust_ft.train_step import init_state, make_train_step
from robust_ft.trainable import flatten

DECAY = 0.9


@dataclasses.dataclass(frozen=True)
class Distance:
    """A quarter of the distance of all parameters to 1, to the fourth power."""

    takes_teacher: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = False

    def __call__(self, model, params, batch, rng, teacher=None):
        loss = sum(jnp.sum((x.astype(jnp.float32) - 1) ** 4) / 4 for x in flatten(params).values())
        return loss, jnp.float32(1), {}


def steps(dtype, count=5):
    """Returns the states of so many steps, each copied before it is donated."""
    params = {"a": {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), dtype)}}
    optimizer = AdamW(Schedule(0.1))
    step = make_train_step(toy.PLAIN, Distance(), optimizer, ema_decay=DECAY)
    step = jax.jit(step, donate_argnums=0)
    init = jax.jit(lambda p: init_state(optimizer, p, averaged=True), donate_argnums=0)
    state = init(params)
    states = [jax.tree.map(jnp.copy, state)]
    for _ in range(count):
        state, _ = step(state, {}, None, {}, jax.random.key(0))
        states.append(jax.tree.map(jnp.copy, state))
    return states


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_average_in_float64(dtype):
    states = steps(dtype)
    average = np.asarray(states[0].trainable["a"]["kernel"], np.float64)
    for state in states[1:]:
        leaf = state.trainable["a"]["kernel"]
        average = DECAY * average + (1 - DECAY) * np.asarray(leaf, np.float64)
        kept = state.average["a"]["kernel"]
        assert kept.dtype == jnp.float32 and leaf.dtype == dtype
        np.testing.assert_allclose(kept, average, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(state.evaluated["a"]["kernel"], kept.astype(dtype))
    assert np.abs(average - np.asarray(leaf, np.float64)).max() > 0.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_holds_both(dtype, tmp_path):
    first, *_, last = steps(dtype, 2)
    with StageCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(last, {}, 1.0)
        restored, _ = checkpoints.restore(like=first)
    toy.assert_same(toy.flat(restored._asdict()["trainable"]), toy.flat(last.trainable))
    for name in ("average", "opt_state", "step"):
        kept, expected = (jax.tree.leaves(getattr(state, name)) for state in (restored, last))
        assert all(np.array_equal(a, b) for a, b in zip(kept, expected, strict=True)), name
    loaded = load_params(str(checkpoint_folder(tmp_path, 2)))
    toy.assert_same(loaded, toy.flat(last.evaluated))


@pytest.mark.slow
def test_remedies_together_are_evaluated_handed_on_and_resumed(tmp_path, monkeypatch):
    """A penalty, half of the matrices frozen and averaged parameters, killed in between."""
    optimizer = HalfFinetuning(optimizer=AdamW(Schedule(0.01)), period=2)
    changes = {
        "model": toy.PLAIN,
        "trainable": ["base"],
        "final_evaluations": (),
        "microbatches": 1,
        "steps": 5,
        "optimizer": optimizer,
        "ema_decay": DECAY,
        "penalty": Ewc(weight=50.0, fisher=Fisher(data=toy.DATA, examples=8)),
    }
    scripted = toy.ScriptedEvaluate(monkeypatch)
    recipe = Recipe("r", str(tmp_path / "whole"), (toy.stage(select_best=False, **changes),))
    runner.run(recipe)
    whole = toy.final(tmp_path / "whole", "model")
    toy.assert_same(scripted.calls[-1].params, whole)  # what was evaluated last
    toy.assert_same(toy.flat(robust_ft.load(recipe.model_dir).params), whole)
    broken = dataclasses.replace(recipe, model_dir=str(tmp_path / "broken"))
    with pytest.raises(ZeroDivisionError):
        runner.run(broken, [toy.At("model", 3, toy.raising(ZeroDivisionError))])
    (kept,) = (tmp_path / "broken/model").glob("fisher_*.safetensors")
    assert kept.read_bytes() == (tmp_path / "whole/model" / kept.name).read_bytes()
    monkeypatch.setattr(stage_anchor, "fisher_information", toy.raising(AssertionError))
    runner.run(broken)
    toy.assert_same(toy.final(tmp_path / "broken", "model"), whole)
