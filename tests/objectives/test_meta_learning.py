"""FOMAML and Reptile against the paper's algorithms, written out as loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharded_meta_learning
from meta_learning_cases import (
    OPTIMIZERS,
    PROMPTS,
    RULES,
    TASKS,
    Reference,
    Sgd,
    assert_gradient,
    meta_batch,
    model_of,
)
from sharded_training import run
from tiny_models import assert_trees_close, random_params, tiny_model, tree_equal

from robust_ft.errors import UserError
from robust_ft.objectives import CrossEntropy, chunked_loss
from robust_ft.objectives.gradients import backprop
from robust_ft.objectives.meta_learning import Fomaml, Reptile
from robust_ft.trainable import flatten, merge, split, trainable_paths

KEY = jax.random.key(0)


@pytest.fixture
def chunked(monkeypatch):
    """Divides the vocabulary of every loss."""
    monkeypatch.setattr(chunked_loss, "MAX_CHUNK_ELEMENTS", 1)


def loss_of(model):
    def loss_fn(params, batch, rng):
        loss, weight, sums = CrossEntropy()(model, params, batch, rng)
        return loss, (weight, sums)

    return loss_fn


def found(rule, model, batch, microbatches=1, state=None, key=KEY):
    trained = random_params(model)
    paths = rule.paths(model)
    state = rule.init(model, trained) if state is None else state
    run = jax.jit(
        lambda trained, state, batch, key: rule(
            loss_of(model), trained, paths, state, batch, key, microbatches
        )
    )
    return run(trained, state, batch, key)


def mean_of(gradient):
    return {path: leaf / TASKS for path, leaf in flatten(gradient).items()}


STEPS = [(0, "adam"), (1, "adam"), (2, "adafactor"), (7, "adam"), (7, "adafactor")]
ONE_QUICK = [n if n == "fomaml" else pytest.param(n, marks=pytest.mark.slow) for n in RULES]
QUICK = [("reptile", "shallow", 0, "adam")]


@pytest.mark.parametrize(
    ("name", "prompt", "inner_steps", "optimizer"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in ((name, prompt, *how) for name in RULES for prompt in PROMPTS for how in STEPS)
    ],
)
def test_the_papers_algorithms(name, prompt, inner_steps, optimizer, chunked):
    """With dropout, rematerialization and a chunked loss."""
    model = model_of(prompt)
    batch, lists = meta_batch(inner_steps + 1)
    rule = RULES[name](TASKS, inner_steps, OPTIMIZERS[optimizer][0])
    gradient, sums, _ = found(rule, model, batch)
    reference = Reference(prompt, optimizer, name == "reptile")
    expected, loss = reference(random_params(model), lists, KEY)
    assert float(sums["weight"]) == TASKS
    np.testing.assert_allclose(float(sums["loss"]) / TASKS, loss, rtol=1e-5)
    assert_gradient(mean_of(gradient), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_a_carried_state_goes_from_task_to_task_and_from_step_to_step(name):
    model = model_of("shallow")
    batch, lists = meta_batch(3)
    rule = RULES[name](TASKS, 2, OPTIMIZERS["adam"][0], carries_state=True)
    _, _, state = found(rule, model, batch, TASKS)
    gradient, _, _ = found(rule, model, batch, TASKS, state)
    reference = Reference("shallow", "adam", name == "reptile")
    for _ in range(2):
        expected, _ = reference(random_params(model), lists, KEY, carries=True)
    assert_gradient(mean_of(gradient), expected)


@pytest.mark.slow
def test_on_8_devices(tmp_path):
    """Batches and parameters in shards, and groups of tasks."""
    run("sharded_meta_learning.py", tmp_path / "found.npz", patience=900)
    results = [{} for _ in sharded_meta_learning.CASES]
    with np.load(tmp_path / "found.npz") as arrays:
        for name in arrays:
            number, _, rest = name.partition("/")
            results[int(number)][rest] = arrays[name]
    for case, result in zip(sharded_meta_learning.CASES, results, strict=True):
        reference = Reference(case.prompt, case.optimizer, case.rule == "reptile")
        _, lists = meta_batch(case.steps + 1)
        # The train step's own key is of its number.
        key = jax.random.fold_in(KEY, 0)
        expected, loss = reference(random_params(model_of(case.prompt)), lists, key, case.carries)
        np.testing.assert_allclose(result.pop("loss"), loss, rtol=1e-5, err_msg=str(case))
        assert_gradient(result, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_every_division_into_microbatches_is_the_same(name):
    model = model_of("shallow")
    batch, _ = meta_batch(3)
    rule = RULES[name](TASKS, 2, OPTIMIZERS["adam"][0])
    (first, sums, _), *others = [found(rule, model, batch, groups) for groups in (1, 2, TASKS)]
    for gradient, other_sums, _ in others:
        assert_trees_close(gradient, first, 1e-5)
        assert_trees_close(other_sums, sums, 1e-6)
    gradient, _, _ = found(rule, model, batch, TASKS, key=jax.random.key(1))
    assert not tree_equal(gradient, others[-1][0]), "dropout depends on the step's key"


@pytest.mark.slow
def test_without_inner_steps_fomaml_is_backpropagation():
    model = model_of("shallow", dropout_rate=0.0)
    batch, ((query,),) = meta_batch(1, tasks=1)
    gradient, sums, _ = found(Fomaml(1, 0), model, batch)
    summed = loss_of(model)

    def mean(params, batch, rng):  # divided before backpropagation, not after: it rounds otherwise
        loss, (weight, metrics) = summed(params, batch, rng)
        return loss / weight, (jnp.ones(()), metrics)

    expected, plain = backprop(mean, random_params(model), query, jax.random.key(0))
    assert_trees_close(gradient, expected, 1e-6)
    np.testing.assert_allclose(sums["loss"], plain["loss"], rtol=1e-6)


def test_reptile_with_sgd_has_a_closed_form():
    """A quadratic loss |p + w - x|^2 / 2 of one row: its gradient by p and by w is p + w - x."""

    def loss_fn(params, batch, rng):
        error = params["prompt"] + params["w"] - batch["x"][0]
        return jnp.sum(error**2) / 2, (jnp.ones(()), {})

    p, w, support, query = (np.array(v) for v in ([1.0, 2.0], [0.5, -1.0], [3.0, 0.0], [-1.0, 4.0]))
    x = np.stack([support, query])[None, None]  # [rows, tasks, batches, 2]
    params, paths = {"prompt": jnp.asarray(p), "w": jnp.asarray(w)}, frozenset(["prompt"])
    rule = Reptile(1, 1, Sgd(0.1))
    gradient, _, _ = rule(loss_fn, params, paths, None, {"x": jnp.asarray(x)}, KEY)
    rate = 0.1
    tuned = p - rate * (p + w - support)
    step = rate * (tuned + w - query)
    np.testing.assert_allclose(gradient["w"], step, rtol=1e-6)
    np.testing.assert_allclose(gradient["prompt"], p - (tuned - step), rtol=1e-6)


@pytest.mark.parametrize("name", ONE_QUICK)
def test_only_what_trains_has_a_gradient(name):
    """A stage that trains a part of the base; the rest is the objective's."""
    model = model_of("shallow")
    trained, frozen = split(
        random_params(model), trainable_paths(model.shapes(), [".*/prompt", "decoder/.*"])
    )
    batch, _ = meta_batch(2)
    rule, paths = RULES[name](TASKS, 1), Fomaml().paths(model)
    whole = loss_of(model)
    gradient, _, _ = rule(
        lambda params, batch, rng: whole(merge(params, frozen), batch, rng),
        trained,
        paths,
        None,
        batch,
        jax.random.key(0),
    )
    assert flatten(gradient).keys() == flatten(trained).keys()


@pytest.mark.parametrize(
    ("changes", "field"), [({"tasks": 0}, "tasks=0"), ({"inner_steps": -1}, "inner_steps=-1")]
)
def test_what_is_refused(changes, field):
    with pytest.raises(UserError, match=f"Fomaml.{field} must"):
        Fomaml(**changes)
    with pytest.raises(UserError, match="peft"):
        Fomaml().paths(tiny_model())
