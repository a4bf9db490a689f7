"""A step whose loss or parameters are not finite ends the run, or is skipped and counted."""

import dataclasses
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from robust_ft import finite
from robust_ft.errors import UserError
from robust_ft.objectives import CrossEntropy
from robust_ft.optim import AdamW, Schedule
from robust_ft.recipe import Recipe
from robust_ft.stage_start import restore
from robust_ft.stage_step import train_batches
from robust_ft.train_step import TrainState
from robust_ft.trainable import flatten
from robust_ft.trainer import Stopped, fit

NAN_STEP = 4


@dataclasses.dataclass(frozen=True)
class NanAt(CrossEntropy):
    """Cross-entropy; on one batch the loss, or only its gradient, is NaN.

    Attributes:
        total: The sum of that batch's input tokens.
        gradient_only: Whether the loss itself stays finite.
    """

    total: int = -1
    gradient_only: bool = False

    def __call__(self, model, params, batch, rng, teacher=None):
        loss, weight, sums = super().__call__(model, params, batch, rng, teacher)
        factor = jnp.where(jnp.sum(batch["encoder_input_tokens"]) == self.total, jnp.nan, 0.0)
        flat = flatten(params)
        leaf = flat.get(toy.PROMPT, flat["decoder/decoder_norm/scale"])
        added = _only_gradient(leaf, factor) if self.gradient_only else factor * jnp.sum(leaf)
        return loss + added, weight, sums


@jax.custom_vjp
def _only_gradient(x, factor):
    return jnp.zeros(())


_only_gradient.defvjp(
    lambda x, factor: (jnp.zeros(()), (x, factor)),
    lambda saved, g: (jnp.full_like(saved[0], saved[1]), jnp.zeros(())),
)


@pytest.fixture
def evaluate(monkeypatch):
    return toy.ScriptedEvaluate(monkeypatch)


def stage(**changes):
    settings = {"final_evaluations": (), "microbatches": 1, "batch_size": 4, "log_period": 100}
    settings |= {"evaluations": toy.evaluations("validation", held_out=False)}
    return toy.prompt_stage(**{**settings, **changes})


def batches_of(stage):
    """Returns the first batches of a stage, and the examples of each."""
    source, found = train_batches(stage, toy.shared("/tmp").partitioner, 0), []
    for _ in range(stage.steps):
        batch = next(source)
        found.append((batch, source.named(source.examples)))
    source.close()
    return found


def broken(step=NAN_STEP, gradient_only=False, **changes):
    """Returns a stage whose batch at a step, from 1, makes NaN, and that batch's examples."""
    batch, examples = batches_of(stage(**changes))[step - 1]
    total = int(batch["encoder_input_tokens"].sum())
    objective = NanAt(total=total, gradient_only=gradient_only)
    return stage(objective=objective, **changes), examples


def run(folder, stage, stop=None):
    shared = toy.shared(folder)._replace(stop=stop or threading.Event())
    params = restore(Recipe("toy", str(folder), (stage,)), stage)
    return toy.flat(fit(stage, params, shared))


@pytest.mark.parametrize(
    ("packing", "gradient_only"),
    [
        (False, True),
        (True, False),
        pytest.param(False, False, marks=pytest.mark.slow),
        pytest.param(True, True, marks=pytest.mark.slow),
    ],
)
def test_it_says_which_step_parameters_examples_and_checkpoint(
    tmp_path, evaluate, gradient_only, packing
):
    changes = {"model": toy.PLAIN, "trainable": [".*"], "packing": packing} if packing else {}
    failing, examples = broken(gradient_only=gradient_only, steps=6, **changes)
    with pytest.raises(UserError) as caught:
        run(tmp_path, failing)
    text = str(caught.value)
    assert f"Step {NAN_STEP} of stage 'prompt' gives NaN or infinity in" in text
    assert ("in the loss" in text) == (not gradient_only)
    leaf = "decoder/decoder_norm/scale" if packing else toy.PROMPT
    count = f"1 of {28 if packing else 1} parameters ({leaf})"
    assert count in text
    numbers = sorted(position for _, position in examples)
    assert f"the examples {', '.join(map(str, numbers))} of 'toy'" in text
    assert "goes on from checkpoint_2" in text and "Stage.on_nonfinite='skip'" in text
    # What was good is there still, nothing else is.
    folders = sorted(path.name for path in (tmp_path / "prompt").glob("checkpoint_*"))
    assert folders == ["checkpoint_2"]
    steps = [line["step"] for line in toy.read_lines(tmp_path / "prompt" / "metrics.jsonl")]
    assert NAN_STEP not in steps
    with pytest.raises(UserError, match=f"Step {NAN_STEP} of"):
        run(tmp_path, failing)


def test_without_a_checkpoint_the_stage_starts_again(tmp_path, evaluate):
    failing, _ = broken(1, steps=2)
    with pytest.raises(UserError, match="starts the stage again"):
        run(tmp_path, failing)
    assert not list((tmp_path / "prompt").glob("checkpoint_*"))


def test_it_is_looked_at_before_stopping_saves(tmp_path, evaluate):
    failing, _ = broken(3, steps=10, eval_period=10)
    stop = threading.Event()
    at_three = toy.At("prompt", 3, stop.set)
    with pytest.raises(UserError, match="Step 3"):
        shared = toy.shared(tmp_path)._replace(stop=stop, callbacks=[at_three])
        fit(failing, restore(Recipe("toy", str(tmp_path), (failing,)), failing), shared)
    assert not list((tmp_path / "prompt").glob("checkpoint_*"))


@pytest.mark.parametrize("gradient_only", [pytest.param(False, marks=pytest.mark.slow), True])
def test_skipping_leaves_all_but_the_number_of_steps(tmp_path, evaluate, capsys, gradient_only):
    skipping, examples = broken(
        3, gradient_only, steps=3, eval_period=3, on_nonfinite="skip", log_period=3
    )
    skipped = run(tmp_path / "skip", skipping)
    two = run(tmp_path / "two", stage(steps=2, eval_period=3, log_period=3))
    toy.assert_same(skipped, two)
    [line] = [x for x in toy.read_lines(tmp_path / "skip/prompt/metrics.jsonl") if "loss" in x]
    [expected] = [x for x in toy.read_lines(tmp_path / "two/prompt/metrics.jsonl") if "loss" in x]
    assert line.pop("skipped") == 1.0
    assert line.keys() == expected.keys()
    for name in line.keys() - {"step", "split"}:  # of two programs, which may round otherwise
        assert line[name] == pytest.approx(expected[name], rel=1e-6), name
    said = capsys.readouterr().out
    assert "step 3 skipped" in said and str(examples[0][1]) in said
    assert (tmp_path / "skip/prompt/checkpoint_3").exists()


def test_the_learning_rate_goes_on_after_a_step_that_is_skipped():
    tx = AdamW(Schedule(3.0, warmup_steps=3)).build()  # the rates 1, 2, 3

    def train_step(state, frozen, teacher, batch, rng, anchor=None):
        updates, opt_state = tx.update({"x": batch["gradient"]}, state.opt_state, state.trainable)
        trained = optax.apply_updates(state.trainable, updates)
        sums = {"loss": jnp.sum(batch["gradient"])}
        return TrainState(state.step + 1, trained, opt_state), sums

    step = finite.checked(train_step, skip=True)
    state = TrainState(
        jnp.zeros((), jnp.int32), {"x": jnp.zeros(())}, tx.init({"x": jnp.zeros(())})
    )
    for gradient, expected in ((1.0, -1.0), (np.nan, -1.0), (1.0, -4.0)):
        state, sums, flags = step(state, {}, None, {"gradient": jnp.asarray(gradient)}, None)
        assert float(state.trainable["x"]) == pytest.approx(expected, abs=1e-3)
        assert bool(flags.any()) == np.isnan(gradient) == bool(sums["skipped"])
    assert int(state.step) == 3


def test_without_anything_to_skip_it_is_the_same_step(tmp_path, evaluate):
    skipping = run(tmp_path / "skip", stage(on_nonfinite="skip", log_period=2))
    stopping = run(tmp_path / "stop", stage(log_period=2))
    toy.assert_same(skipping, stopping)
    lines = [
        [x for x in toy.read_lines(tmp_path / name / "prompt/metrics.jsonl") if "loss" in x]
        for name in ("skip", "stop")
    ]
    assert [x.pop("skipped") for x in lines[0]] == [0.0] * 3
    assert lines[0] == [
        {k: v if isinstance(v, str) else pytest.approx(v) for k, v in line.items()}
        for line in lines[1]
    ]


def test_a_base_is_looked_at(tmp_path, evaluate):
    plain = stage(steps=4)
    params = restore(Recipe("toy", str(tmp_path), (plain,)), plain)
    bad = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.inf), params)
    with pytest.raises(UserError, match=r"restore='scratch', holds NaN or infinity in \d+ of"):
        fit(plain, bad, toy.shared(tmp_path))
    assert not (tmp_path / "prompt").exists()


def test_a_checkpoint_with_nan_is_not_returned_to(tmp_path, evaluate, monkeypatch):
    stop = threading.Event()
    stopping = toy.shared(tmp_path)._replace(stop=stop, callbacks=[toy.At("prompt", 3, stop.set)])
    plain = stage(steps=4)
    start = restore(Recipe("toy", str(tmp_path), (plain,)), plain)
    # As an earlier version would have saved it.
    monkeypatch.setattr(finite.NonFinite, "__call__", lambda *_: None)
    with pytest.raises(Stopped):
        failing, _ = broken(3, steps=4)
        fit(failing, start, stopping)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"would return at step 3, holds NaN .*encoder/prompt"):
        run(tmp_path, plain)


def test_names_are_few_and_counted():
    params = {"a": jnp.ones(2), "b": {"c": jnp.array([1.0, np.nan]), "d": jnp.array(np.inf)}}
    finite.check({"a": params["a"]}, "It", "fix it")
    with pytest.raises(
        UserError,
        match=re.escape("It holds NaN or infinity in 2 of 3 parameters (b/c, b/d); fix it."),
    ):
        finite.check(params, "It", "fix it")
