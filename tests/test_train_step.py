import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import (
    assert_trees_close,
    example_batch,
    random_batch,
    random_params,
    tiny_model,
    tree_equal,
)

from robust_ft.models.peft import Prompt
from robust_ft.objectives import Cocktail, CrossEntropy, Teacher
from robust_ft.optim import Adafactor, AdamW, Schedule
from robust_ft.train_step import accumulate, init_state, make_train_step
from robust_ft.trainable import flatten, merge, split, trainable_paths

SIZES = {"num_encoder_layers": 1, "num_decoder_layers": 1}
MODEL = tiny_model((Prompt(length=3),), **SIZES)
ADAM = AdamW(Schedule(1e-2, warmup_steps=4))
TUTOR = tiny_model(**SIZES, logits_via_embedding=True)
TEACHER = Teacher(TUTOR, random_params(TUTOR, seed=1))
BATCH = random_batch(1, [6, 4, 5, 1, 6, 6, 2, 3], [7, 1, 2, 7, 3, 1, 5, 1])


def prepared(patterns, optimizer=ADAM, model=MODEL):
    """Returns (state, frozen) where the parameters that match train."""
    params = random_params(model)
    trained, frozen = split(params, trainable_paths(params, patterns))
    return init_state(optimizer, trained), frozen


@functools.cache
def jitted_step(model, optimizer, **settings):
    settings = {"objective": CrossEntropy(), "optimizer": optimizer} | settings
    return jax.jit(make_train_step(model, **settings))


def steps(
    patterns,
    count=1,
    batch=BATCH,
    optimizer=ADAM,
    model=MODEL,
    seed=0,
    teacher=None,
    **settings,
):
    """Returns (states, frozen, sums) of so many steps; the first state is the initial one."""
    step = jitted_step(model, optimizer, **settings)
    state, frozen = prepared(patterns, optimizer, model)
    states, sums = [state], []
    for _ in range(count):
        state, last = step(state, frozen, teacher, batch, jax.random.key(seed))
        states.append(state)
        sums.append(last)
    return states, frozen, sums


@pytest.mark.parametrize("objective", [CrossEntropy(), Cocktail(0.5)], ids=["alone", "teacher"])
def test_microbatches_change_nothing(objective):
    weights = np.random.default_rng(0).uniform(0.1, 3, BATCH["decoder_loss_weights"].shape)
    batch = BATCH | {
        "decoder_loss_weights": (BATCH["decoder_loss_weights"] * weights).astype(np.float32)
    }
    # With the usual epsilon, Adam would blow up what rounding leaves of gradients of 0.
    settings = {
        "batch": batch,
        "optimizer": AdamW(Schedule(1e-2), epsilon=1e-2),
        "objective": objective,
        "teacher": None if objective == CrossEntropy() else TEACHER,
    }
    (_, whole), _, (sums,) = steps([".*"], **settings)
    (_, parts), _, (added,) = steps([".*"], **settings, microbatches=4)
    assert sums.keys() == added.keys()
    for name in sums:
        assert float(added[name]) == pytest.approx(float(sums[name]), rel=1e-5), name
    assert_trees_close(parts.trainable, whole.trainable, rtol=0, atol=1e-6)


def test_microbatches_are_strides_that_cover_each_example_once():
    batch = {"x": jnp.arange(12.0).reshape(6, 2)}
    seen = []

    def gradient_of(part, rng):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), part["x"])
        return {"w": part["x"].sum(0)}, {"weight": jnp.float32(part["x"].shape[0])}

    gradient, sums = jax.jit(lambda b: accumulate(gradient_of, b, jax.random.key(0), 3))(batch)
    jax.effects_barrier()
    np.testing.assert_array_equal(gradient["w"], [30, 36])
    assert float(sums["weight"]) == 6
    starts = [x[:, 0].tolist() for x in seen]
    assert sorted(starts) == [[0, 6], [2, 8], [4, 10]]


def test_microbatches_of_bfloat16_gradients_are_added_in_float32():
    batch = {"x": jnp.concatenate([jnp.full(1, 256), jnp.ones(63)]).astype(jnp.bfloat16)}

    def gradient_of(part, rng):
        return {"w": part["x"].sum()}, {"weight": jnp.float32(1)}

    gradient, _ = accumulate(gradient_of, batch, jax.random.key(0), 64)
    assert gradient["w"].dtype == jnp.float32 and float(gradient["w"]) == 256 + 63


def test_gradients_may_be_kept_in_bfloat16():
    seen = {}

    class Recorder:
        learning_rate = Schedule(0.0)

        def build(self):
            def update(gradient, state, params):
                return jax.tree.map(jnp.zeros_like, params), gradient

            return optax.GradientTransformation(lambda params: params, update)

    state, frozen = prepared([".*/mlp/.*"], ADAM)
    state = state._replace(opt_state=state.trainable)
    for dtype in (None, "bfloat16"):
        step = make_train_step(MODEL, CrossEntropy(), Recorder(), gradient_dtype=dtype)
        step = jax.jit(step).lower(state, frozen, None, BATCH, jax.random.key(0))
        seen[dtype] = step.compile()(state, frozen, None, BATCH, jax.random.key(0))[0].opt_state
    weight = float(BATCH["decoder_loss_weights"].sum())
    for path, exact in flatten(seen[None]).items():
        rounded = (exact * weight).astype(jnp.bfloat16).astype(jnp.float32) / weight
        kept = flatten(seen["bfloat16"])[path]
        # A rounding may fall to the other side: one of 8 bits.
        np.testing.assert_allclose(kept, rounded, rtol=2**-7, err_msg=path)
        share = np.mean(np.asarray(kept * weight) == np.asarray(rounded * weight))
        assert share > 0.9 and not np.array_equal(kept, exact), path


def test_gradient_is_of_the_weighted_mean():
    states, frozen, (sums,) = steps([".*"])

    def mean_loss(params):
        loss, weight, _ = CrossEntropy()(MODEL, params, BATCH, None)
        return loss / weight, (loss, weight)

    grad = jax.jit(jax.grad(mean_loss, has_aux=True))
    gradient, (loss, weight) = grad(merge(states[0].trainable, frozen))
    assert float(weight) == BATCH["decoder_loss_weights"].sum()
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradient)))
    assert float(sums["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(sums["weight"]) == float(weight)
    assert float(sums["grad_norm"]) == pytest.approx(float(norm), rel=1e-4)
    # Adam's first moment after one step is (1 - beta1) times the gradient.
    assert_trees_close(
        jax.tree.map(lambda m: m * 10, states[1].opt_state[0].mu), gradient, rtol=1e-4
    )


def test_a_batch_without_any_weight_changes_nothing():
    empty = {name: np.zeros_like(rows) for name, rows in BATCH.items()}
    (before, after), _, (sums,) = steps([".*"], batch=empty)
    assert tree_equal(before.trainable, after.trainable)
    assert float(sums["loss"]) == float(sums["weight"]) == float(sums["grad_norm"]) == 0


def test_weights_that_sum_to_less_than_one_still_give_the_mean():
    light = BATCH | {"decoder_loss_weights": BATCH["decoder_loss_weights"] * np.float32(1e-3)}
    *_, (sums,) = steps([".*"])
    *_, (light_sums,) = steps([".*"], batch=light)
    assert float(light_sums["grad_norm"]) == pytest.approx(float(sums["grad_norm"]), rel=1e-4)


@pytest.mark.parametrize("optimizer", [ADAM, Adafactor(Schedule(1e-2))], ids=["AdamW", "Adafactor"])
def test_only_the_trainable_parameters_change_and_have_a_state(optimizer):
    states, frozen, _ = steps([".*/prompt"], count=2, optimizer=optimizer)
    expected = random_params(MODEL)
    prompt, others = split(expected, frozenset({"encoder/prompt"}))
    assert tree_equal(frozen, others)
    assert flatten(states[-1].trainable).keys() == {"encoder/prompt"}
    assert not tree_equal(states[-1].trainable, prompt)
    # One prompt of 3 x 16, its moments, and no array as large as any other parameter.
    moments = [leaf for leaf in jax.tree.leaves(states[-1].opt_state) if leaf.ndim]
    assert {leaf.shape for leaf in moments} <= {(3, 16), (1,)}
    assert sum(leaf.shape == (3, 16) for leaf in moments) == (2 if optimizer is ADAM else 1)


def test_frozen_parameters_cost_no_gradient_and_no_state():
    model = tiny_model((Prompt(length=3),), vocab_size=20_000, **SIZES)
    batch = example_batch()
    shapes = model.shapes()
    bytes_of = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa
    usage = {}
    for pattern in (".*/prompt", ".*"):
        trained, frozen = split(shapes, trainable_paths(shapes, [pattern]))
        state = jax.eval_shape(lambda trained: init_state(ADAM, trained), trained)
        step = jax.jit(make_train_step(model, CrossEntropy(), ADAM), donate_argnums=0)
        compiled = step.lower(state, frozen, None, batch, jax.random.key(0)).compile()
        usage[pattern] = compiled.memory_analysis()
    prompt, full = usage[".*/prompt"], usage[".*"]
    parameters, table = bytes_of(shapes), 20_000 * 16 * 4
    # Arguments: the parameters once, and twice more as Adam's moments where they train.
    assert parameters < prompt.argument_size_in_bytes < 1.02 * parameters
    assert 3 * parameters < full.argument_size_in_bytes < 3.02 * parameters
    # Results: the whole state, or the prompt's; the state before it is donated.
    assert prompt.output_size_in_bytes < 1e4
    assert full.alias_size_in_bytes > 0.99 * 3 * parameters
    # The gradients of the embedding and of the head are the difference; logits need the rest.
    assert full.temp_size_in_bytes - prompt.temp_size_in_bytes > 0.9 * 2 * table


def test_loss_falls_to_nothing_on_one_batch():
    optimizer = Adafactor(Schedule(0.05), multiply_by_parameter_scale=True)
    _, _, sums = steps([".*"], count=60, batch=example_batch(), optimizer=optimizer)
    losses = [float(s["loss"] / s["weight"]) for s in sums]
    assert losses[0] > 2 and losses[-1] < 0.1
    assert float(sums[-1]["token_accuracy"] / sums[-1]["weight"]) == 1


def test_steps_and_learning_rates_count_from_the_first_update():
    states, _, sums = steps([".*/prompt"], count=5)
    assert [int(state.step) for state in states] == [0, 1, 2, 3, 4, 5]
    rates = [float(s["learning_rate"]) for s in sums]
    np.testing.assert_allclose(rates, [0.0025, 0.005, 0.0075, 0.01, 0.01], rtol=1e-6)


def test_dropout_differs_by_step_and_seed_and_can_be_repeated():
    model = tiny_model(dropout_rate=0.2, **SIZES)
    still = AdamW(Schedule(0.0))
    runs = [
        [float(s["loss"]) for s in steps([".*"], 3, optimizer=still, model=model, seed=seed)[2]]
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1]
    assert len({*runs[0], *runs[2]}) == 6


def test_dropout_differs_by_microbatch():
    model = tiny_model(dropout_rate=0.2, **SIZES)
    # Eight times the same example: without its own key, each microbatch would drop the same.
    same = {name: np.repeat(rows[:1], 8, axis=0) for name, rows in BATCH.items()}
    losses = []

    def gradient_fn(loss_fn, trained, batch, rng):
        loss, (weight, sums) = loss_fn(trained, batch, rng)
        jax.debug.callback(lambda x: losses.append(float(x)), loss)
        return jax.tree.map(jnp.zeros_like, trained), {"loss": loss, "weight": weight, **sums}

    steps([".*"], batch=same, model=model, microbatches=4, gradient_fn=gradient_fn)
    jax.effects_barrier()
    assert len(set(losses)) == 4


def test_bfloat16_parameters_stay_so():
    state, frozen = prepared([".*/mlp/.*"])
    trained = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state.trainable)
    step = jitted_step(MODEL, ADAM)
    state, _ = step.eval_shape(init_state(ADAM, trained), frozen, None, BATCH, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {jnp.dtype("bfloat16")}


def test_gradient_fn_and_teacher_are_handed_on():
    seen = {}

    class Objective:
        takes_teacher = needs_teacher = True

        def __call__(self, model, params, batch, rng, teacher=None):
            seen["teacher"] = teacher
            return CrossEntropy()(model, params, batch, rng)

    def gradient_fn(loss_fn, trained, batch, rng):
        loss, (weight, sums) = loss_fn(trained, batch, rng)
        return jax.tree.map(jnp.ones_like, trained), {"loss": loss, "weight": weight, **sums}

    state, frozen = prepared([".*/prompt"])
    step = make_train_step(MODEL, Objective(), ADAM, gradient_fn)
    teacher = Teacher(MODEL, {"anything": jnp.ones(3)})
    _, sums = jax.eval_shape(step, state, frozen, teacher, BATCH, jax.random.key(0))
    assert seen["teacher"].params["anything"].shape == (3,)
    assert sums.keys() == {
        "loss",
        "weight",
        "z_loss",
        "token_accuracy",
        "grad_norm",
        "learning_rate",
    }
