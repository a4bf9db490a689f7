"""FOMAML and Reptile against the paper's algorithms, written out as loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import assert_trees_close, random_batch, random_params, tiny_model, tree_equal

from robust_ft.errors import UserError
from robust_ft.models.peft import Prefix, Prompt
from robust_ft.objectives import CrossEntropy
from robust_ft.objectives.gradients import backprop
from robust_ft.objectives.meta_learning import Fomaml, Reptile
from robust_ft.optim import Adafactor, AdamW, Schedule
from robust_ft.trainable import flatten, merge, split, trainable_paths, unflatten

SIZES = {"num_encoder_layers": 1, "num_decoder_layers": 1}
PROMPTS = {"shallow": (Prompt(length=3),), "deep": (Prefix(length=2),)}
TASKS, ROWS = 3, 4
RULES = {"fomaml": Fomaml, "reptile": Reptile}
RATE = 1e-2
OPTIMIZERS = {
    # Ours and Optax's own, with the same settings.
    # A large epsilon: a first step of sign(gradient) would turn rounding into steps.
    "adam": (AdamW(Schedule(RATE), weight_decay=0.0, epsilon=1e-2), optax.adam(RATE, eps=1e-2)),
    "adafactor": (
        Adafactor(Schedule(RATE)),
        optax.adafactor(RATE, min_dim_size_to_factor=128, weight_decay_rate=None),
    ),
}


@functools.cache
def model_of(kind):
    return tiny_model(PROMPTS[kind], **SIZES)


def meta_batch(batches, tasks=TASKS, rows=ROWS):
    """Returns a batch [rows, tasks, batches, ...] and the same as lists: [task][batch]."""
    lists = []
    for task in range(tasks):
        lists.append([])
        for number in range(batches):
            rng = np.random.default_rng([task, number])
            lengths = rng.integers(1, 7, (2, rows))
            lengths[:, 0] = 6  # all batches are padded to one length
            lists[-1].append(random_batch(100 * task + number, *map(list, lengths)))
    stacked = {
        name: np.stack([np.stack([b[name] for b in task], 1) for task in lists], 1)
        for name in lists[0][0]
    }
    return stacked, lists


def loss_of(model):
    def loss_fn(params, batch, rng):
        loss, weight, sums = CrossEntropy()(model, params, batch, rng)
        return loss, (weight, sums)

    return loss_fn


@functools.cache
def mean_gradient_of(model):
    def mean(params, batch):
        loss, (weight, _) = loss_of(model)(params, batch, None)
        return loss / weight

    return jax.jit(jax.value_and_grad(mean))


def found(rule, model, batch, microbatches=1, state=None, trained=None, rng=0):
    trained = random_params(model) if trained is None else trained
    paths = rule.paths(model)
    state = rule.init(model, trained) if state is None else state
    run = jax.jit(
        lambda trained, state, batch, rng: rule(
            loss_of(model), trained, paths, state, batch, rng, microbatches
        )
    )
    return run(trained, state, batch, jax.random.key(rng))


class Reference:
    """The paper's Algorithms 1 and 2: a loop over tasks and steps, with Optax's own optimizer."""

    def __init__(self, model, optimizer, reptile):
        self.optimizer, self.reptile = optimizer, reptile
        self.gradient = mean_gradient_of(model)
        self.states = None

    def mean_gradient(self, params, batch):
        loss, gradient = self.gradient(unflatten(params), batch)
        return float(loss), flatten(gradient)

    def step(self, params, gradient, names, kind):
        part = {name: params[name] for name in names}
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, self.states[kind] = self.optimizer.update(
                {name: gradient[name] for name in names}, self.states[kind], part
            )
        return params | {name: part[name] + updates[name] for name in names}

    def fresh(self, params, prompt, rest):
        parts = {"prompt": prompt, "rest": rest}
        self.states = {
            kind: self.optimizer.init({n: params[n] for n in names})
            for kind, names in parts.items()
        }

    def __call__(self, params, prompt, lists, carries=False):
        """Returns the meta-gradient, a mean over tasks, and the mean loss of the queries."""
        start = flatten(params)
        rest = sorted(set(start) - set(prompt))
        total, losses = {name: np.zeros(x.shape) for name, x in start.items()}, []
        for *support, query in lists:
            if self.states is None or not carries:
                self.fresh(start, prompt, rest)
            now = dict(start)
            for batch in support:
                now = self.step(now, self.mean_gradient(now, batch)[1], prompt, "prompt")
            loss, gradient = self.mean_gradient(now, query)
            losses.append(loss)
            if self.reptile:
                after = self.step(now, gradient, prompt, "prompt")
                after = self.step(after, gradient, rest, "rest")
                gradient = {name: start[name] - after[name] for name in start}
            for name, leaf in gradient.items():
                total[name] += np.asarray(leaf, np.float64) / len(lists)
        return total, float(np.mean(losses))


def reference_of(model, kind, rule, lists, carries=False, times=1):
    prompt = sorted(Fomaml().paths(model))
    reference = Reference(model, OPTIMIZERS[kind][1], rule == "reptile")
    for _ in range(times):
        answer = reference(random_params(model), prompt, lists, carries)
    return answer


@pytest.mark.parametrize(
    ("inner_steps", "optimizer"),
    [
        (2, "adafactor"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in [(1, "adam"), (7, "adam"), (7, "adafactor")]
        ),
    ],
)
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", RULES)
def test_the_papers_algorithms(name, prompt, inner_steps, optimizer):
    model = model_of(prompt)
    batch, lists = meta_batch(inner_steps + 1)
    rule = RULES[name](TASKS, inner_steps, OPTIMIZERS[optimizer][0])
    gradient, sums, _ = found(rule, model, batch)
    expected, loss = reference_of(model, optimizer, name, lists)
    assert float(sums["weight"]) == TASKS
    np.testing.assert_allclose(float(sums["loss"]) / TASKS, loss, rtol=1e-5)
    for path, leaf in flatten(gradient).items():
        np.testing.assert_allclose(leaf / TASKS, expected[path], rtol=0, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("name", RULES)
def test_a_carried_state_goes_from_task_to_task_and_from_step_to_step(name):
    model = model_of("shallow")
    batch, lists = meta_batch(3)
    rule = RULES[name](TASKS, 2, OPTIMIZERS["adam"][0], carries_state=True)
    _, _, state = found(rule, model, batch, TASKS)
    gradient, _, _ = found(rule, model, batch, TASKS, state)
    expected, _ = reference_of(model, "adam", name, lists, carries=True, times=2)
    for path, leaf in flatten(gradient).items():
        np.testing.assert_allclose(leaf / TASKS, expected[path], rtol=0, atol=1e-5, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_every_division_into_microbatches_is_the_same(name):
    model = tiny_model(PROMPTS["shallow"], dropout_rate=0.1, **SIZES)
    batch, _ = meta_batch(3, tasks=4)
    rule = RULES[name](4, 2, OPTIMIZERS["adam"][0])
    (first, sums, _), *others = [found(rule, model, batch, groups) for groups in (1, 2, 4)]
    for gradient, other_sums, _ in others:
        assert_trees_close(gradient, first, 1e-5)
        assert_trees_close(other_sums, sums, 1e-6)
    gradient, _, _ = found(rule, model, batch, 4, rng=1)
    assert not tree_equal(gradient, others[-1][0]), "dropout depends on the step's key"


@pytest.mark.slow
def test_without_inner_steps_fomaml_is_backpropagation():
    model = model_of("shallow")
    batch, ((query,),) = meta_batch(1, tasks=1)
    gradient, sums, _ = found(Fomaml(1, 0), model, batch)
    expected, plain = backprop(loss_of(model), random_params(model), query, jax.random.key(0))
    weight = plain["weight"]
    assert_trees_close(gradient, jax.tree.map(lambda g: g / weight, expected), 1e-6)
    np.testing.assert_allclose(sums["loss"], plain["loss"] / weight, rtol=1e-6)


class Sgd:
    learning_rate = Schedule(0.1)

    def build(self):
        return optax.sgd(0.1)


def test_reptile_with_sgd_has_a_closed_form():
    """A quadratic loss |p + w - x|^2 / 2 of one row: its gradient by p and by w is p + w - x."""

    def loss_fn(params, batch, rng):
        error = params["prompt"] + params["w"] - batch["x"][0]
        return jnp.sum(error**2) / 2, (jnp.ones(()), {})

    p, w, support, query = (np.array(v) for v in ([1.0, 2.0], [0.5, -1.0], [3.0, 0.0], [-1.0, 4.0]))
    x = np.stack([support, query])[None, None]  # [rows, tasks, batches, 2]
    params, paths = {"prompt": jnp.asarray(p), "w": jnp.asarray(w)}, frozenset(["prompt"])
    rule = Reptile(1, 1, Sgd())
    gradient, _, _ = rule(loss_fn, params, paths, None, {"x": jnp.asarray(x)}, jax.random.key(0))
    rate = 0.1
    tuned = p - rate * (p + w - support)
    step = rate * (tuned + w - query)
    np.testing.assert_allclose(gradient["w"], step, rtol=1e-6)
    np.testing.assert_allclose(gradient["prompt"], p - (tuned - step), rtol=1e-6)


@pytest.mark.parametrize("name", RULES)
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
        Fomaml().paths(tiny_model(**SIZES))
