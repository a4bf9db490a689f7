import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCAB, example_batch, random_params, tiny_model, tree_equal

from robust_ft.errors import UserError
from robust_ft.objectives import Cocktail, CrossEntropy, Teacher
from robust_ft.objectives.chunked_loss import unchunked_statistics


def smoothed_cross_entropy(logits, targets, label_smoothing=0.0, z_loss=0.0):
    statistics = unchunked_statistics(jnp.asarray(logits), jnp.asarray(targets))
    return CrossEntropy(label_smoothing, z_loss).losses(statistics, logits.shape[-1])


jitted = jax.jit(smoothed_cross_entropy, static_argnums=(2, 3))


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    largest = logits.max(axis=-1, keepdims=True)
    return logits - largest - np.log(np.exp(logits - largest).sum(axis=-1, keepdims=True))


def slow_loss(logits, target, smoothing):
    """KL divergence of the smoothed distribution q from the softmax p, term by term."""
    log_p, loss = log_softmax(logits), 0.0
    for token, value in enumerate(log_p):
        q = 1 - smoothing if token == target else smoothing / (len(logits) - 1)
        loss += q * (np.log(q) - value) if q > 0 else 0.0
    return loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_cross_entropy_is_the_divergence_from_the_smoothed_target(smoothing, scale):
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(3, 4, 7)) * scale + 5).astype(np.float32)
    targets = rng.integers(0, 7, (3, 4))
    loss, z_loss = jitted(logits, targets, smoothing, 1e-2)
    expected = np.array(
        [[slow_loss(logits[i, j], targets[i, j], smoothing) for j in range(4)] for i in range(3)]
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-5)
    log_z = np.log(np.sum(np.exp(logits.astype(np.float64)), axis=-1))
    np.testing.assert_allclose(z_loss, 1e-2 * log_z**2, rtol=1e-5)
    assert loss.shape == z_loss.shape == (3, 4)


@given(
    vocab=st.integers(2, 6),
    smoothing=st.floats(0, 0.9),
    values=st.lists(st.floats(-50, 50, width=32), min_size=6, max_size=6),
    target=st.integers(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_loss_is_never_below_0(vocab, smoothing, values, target):
    logits = np.asarray(values[:vocab], np.float32)
    with jax.disable_jit():
        loss, _ = smoothed_cross_entropy(logits, jnp.asarray(target), smoothing)
    assert float(loss) >= -1e-4
    assert float(loss) == pytest.approx(slow_loss(logits, target, smoothing), rel=1e-4, abs=1e-4)


def test_loss_is_0_where_the_prediction_is_the_smoothed_target():
    q = np.full(VOCAB, 0.1 / (VOCAB - 1))
    q[7] = 0.9
    loss, _ = jitted(np.log(q).astype(np.float32) + 3, np.array(7), 0.1, 0.0)
    assert float(loss) == pytest.approx(0, abs=1e-6)


def test_gradient_is_softmax_minus_target_plus_the_z_term():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=9).astype(np.float32) * 2
    gradient = jax.grad(lambda x: sum(jitted(x, np.array(4), 0.2, 0.1)))(logits)
    p = np.exp(log_softmax(logits))
    q = np.where(np.arange(9) == 4, 0.8, 0.2 / 8)
    log_z = np.log(np.sum(np.exp(logits.astype(np.float64))))
    np.testing.assert_allclose(gradient, p - q + 2 * 0.1 * log_z * p, atol=1e-6)


def test_objective_sums_over_weighted_positions():
    model = tiny_model(num_encoder_layers=1, num_decoder_layers=1)
    params, batch = random_params(model), example_batch(3)
    weights = np.random.default_rng(4).uniform(0.2, 2, batch["decoder_loss_weights"].shape)
    batch["decoder_loss_weights"] = (batch["decoder_loss_weights"] * weights).astype(np.float32)
    objective = CrossEntropy(label_smoothing=0.1, z_loss=1e-2)
    loss, weight, sums = jax.jit(
        lambda params, batch: (objective(model, params, batch, None), None)[0]
    )(params, batch)
    logits = np.asarray(jax.jit(model.logits)(params, batch), np.float64)
    totals = {"loss": 0.0, "weight": 0.0, "z_loss": 0.0, "token_accuracy": 0.0}
    for row in range(2):
        for column, target in enumerate(batch["decoder_target_tokens"][row]):
            w, here = float(batch["decoder_loss_weights"][row, column]), logits[row, column]
            z = 1e-2 * np.log(np.sum(np.exp(here))) ** 2
            totals["loss"] += w * (slow_loss(here, target, 0.1) + z)
            totals["weight"] += w
            totals["z_loss"] += w * z
            totals["token_accuracy"] += w * (here.argmax() == target)
    assert sums.keys() == {"z_loss", "token_accuracy"}
    for name, value in {"loss": loss, "weight": weight, **sums}.items():
        assert value.dtype == jnp.float32 and value.shape == ()
        assert float(value) == pytest.approx(totals[name], rel=1e-5), name


@pytest.mark.parametrize("value", [-0.1, 1.0, 10])
def test_label_smoothing_is_a_probability(value):
    with pytest.raises(UserError, match=f"label_smoothing={value}"):
        CrossEntropy(label_smoothing=value)


def test_z_loss_is_no_reward():
    with pytest.raises(UserError, match="z_loss=-1"):
        CrossEntropy(z_loss=-1)


SIZES = {"num_encoder_layers": 1, "num_decoder_layers": 1}
STUDENT, TEACHER_MODEL = tiny_model(**SIZES), tiny_model(**SIZES, logits_via_embedding=True)
TEACHER = Teacher(TEACHER_MODEL, random_params(TEACHER_MODEL, seed=9))


def jitted_objective(objective):
    """Returns a function from (params, batch, teacher) to ((loss, (weight, sums)), gradient)."""

    def loss(params, batch, teacher):
        value, weight, sums = objective(STUDENT, params, batch, None, teacher)
        return value, (weight, sums)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize(("mixed", "temperature"), [(0.25, 1.0), (1.0, 1.0), (0.75, 2.0)])
def test_cocktail_mixes_divergence_and_cross_entropy(mixed, temperature):
    params, batch = random_params(STUDENT), example_batch(3)
    objective = Cocktail(mixed, temperature, CrossEntropy(label_smoothing=0.1, z_loss=1e-2))
    (loss, (weight, sums)), _ = jitted_objective(objective)(params, batch, TEACHER)
    logits = np.asarray(jax.jit(STUDENT.logits)(params, batch), np.float64)
    taught = np.asarray(jax.jit(TEACHER_MODEL.logits)(TEACHER.params, batch), np.float64)
    totals = dict.fromkeys(("loss", "kl", "cross_entropy", "z_loss"), 0.0)
    for row, column in np.argwhere(batch["decoder_loss_weights"] > 0):
        here, there = logits[row, column], taught[row, column]
        log_p, log_q = log_softmax(there / temperature), log_softmax(here / temperature)
        kl = np.sum(np.exp(log_p) * (log_p - log_q))
        hard = slow_loss(here, batch["decoder_target_tokens"][row, column], 0.1)
        z = 1e-2 * np.log(np.sum(np.exp(here))) ** 2
        values = (mixed * temperature**2 * kl + (1 - mixed) * hard + z, kl, hard, z)
        for name, value in zip(totals, values, strict=True):
            totals[name] += value
    assert float(weight) == batch["decoder_loss_weights"].sum()
    assert sums.keys() == {"kl", "cross_entropy", "z_loss", "token_accuracy"}
    for name, value in totals.items():
        assert float({"loss": loss, **sums}[name]) == pytest.approx(value, rel=1e-5), name


def test_without_teachers_weight_a_cocktail_is_cross_entropy_bit_for_bit():
    params, batch = random_params(STUDENT), example_batch(3)
    hard = CrossEntropy(label_smoothing=0.1, z_loss=1e-2)
    expected = jitted_objective(hard)(params, batch, None)
    found = jitted_objective(Cocktail(0.0, cross_entropy=hard))(params, batch, TEACHER)
    assert tree_equal(found, expected)


def test_with_the_teacher_alone_targets_only_say_which_positions_count():
    params, batch = random_params(STUDENT), example_batch(3)
    objective = jitted_objective(Cocktail(1.0))
    (loss, _), gradient = objective(params, batch, TEACHER)
    other = batch | {"decoder_target_tokens": batch["decoder_target_tokens"][::-1].copy()}
    (same_loss, _), same_gradient = objective(params, other, TEACHER)
    assert tree_equal((loss, gradient), (same_loss, same_gradient))
    fewer = batch | {"decoder_loss_weights": batch["decoder_loss_weights"].copy()}
    fewer["decoder_loss_weights"][0, 0] = 0
    (other_loss, _), _ = objective(params, fewer, TEACHER)
    assert float(other_loss) < float(loss)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    params, batch = random_params(STUDENT), example_batch(3)
    (loss, _), gradient = jitted_objective(Cocktail(1.0))(params, batch, Teacher(STUDENT, params))
    assert float(loss) == pytest.approx(0, abs=1e-5)
    assert max(float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(gradient)) < 1e-5


def test_the_teacher_has_no_gradient():
    params, batch = random_params(STUDENT), example_batch(3)
    gradient = jax.jit(
        jax.grad(
            lambda t: Cocktail(0.5)(STUDENT, params, batch, None, Teacher(TEACHER_MODEL, t))[0]
        )
    )(TEACHER.params)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_the_teachers_weight_is_a_share(value):
    with pytest.raises(UserError, match=rf"teacher_weight={value} must be from 0"):
        Cocktail(value)


@pytest.mark.parametrize("value", [0, -1.0])
def test_temperatures_are_above_0(value):
    with pytest.raises(UserError, match=f"temperature={value}"):
        Cocktail(temperature=value)


def test_a_cocktail_needs_a_teacher():
    with pytest.raises(UserError, match="needs a teacher"):
        Cocktail()(STUDENT, random_params(STUDENT), example_batch(), None)
