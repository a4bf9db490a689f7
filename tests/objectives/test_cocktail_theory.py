"""The propositions of Ensembles and Cocktails, section 9, on multi-class logistic regression."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_ft.models.model import Model
from robust_ft.objectives import Cocktail, Teacher

CLASSES, EXAMPLES, FEATURES = 6, 12, 3
SEEN = 4  # labels of the training data are below it


@dataclasses.dataclass(frozen=True)
class Sizes:
    vocab_size: int = CLASSES
    emb_dim: int = FEATURES


@dataclasses.dataclass(frozen=True)
class LogisticRegression(Model):
    """One target position an example, whose logits are linear in its features."""

    config: Sizes = Sizes()

    def logits(self, params, batch, rng=None):
        return (batch["features"] @ params["theta"].T)[:, None]


MODEL = LogisticRegression()
RNG = np.random.default_rng(0)
TEACHER = {"theta": RNG.normal(size=(CLASSES, FEATURES)).astype(np.float32)}
INPUTS = RNG.normal(size=(EXAMPLES, FEATURES)).astype(np.float32)
NEW_INPUTS = 3 * RNG.normal(size=(50, FEATURES)).astype(np.float32)
LABELS = RNG.integers(0, SEEN, (EXAMPLES, 1))


def descend(objective, inputs, steps):
    """Returns the parameters after gradient descent from 0."""
    batch = {
        "features": inputs,
        "decoder_target_tokens": LABELS,
        "decoder_loss_weights": np.ones((EXAMPLES, 1), np.float32),
    }

    def loss(params):
        return objective(MODEL, params, batch, None, Teacher(MODEL, TEACHER))[0]

    def step(_, params):
        return jax.tree.map(lambda p, g: p - 0.2 * g, params, jax.grad(loss)(params))

    start = {"theta": jnp.zeros((CLASSES, FEATURES))}
    return jax.jit(lambda: jax.lax.fori_loop(0, steps, step, start))()


def probabilities(params, inputs):
    return jax.nn.softmax(MODEL.logits(params, {"features": inputs})[:, 0])


def test_classes_that_full_finetuning_does_not_see_stay_alike():
    theta = descend(Cocktail(0.0), INPUTS, 30)["theta"]
    np.testing.assert_allclose(theta[SEEN], theta[SEEN + 1], atol=1e-6)
    assert np.max(np.abs(theta[SEEN] - theta[0])) > 1
    distilled = descend(Cocktail(0.5), INPUTS, 30)["theta"]
    assert np.max(np.abs(distilled[SEEN] - distilled[SEEN + 1])) > 0.1


def test_distilled_alone_the_student_is_its_teacher_on_any_input():
    student = descend(Cocktail(1.0), INPUTS, 5000)
    # By adding the same to every class, normalizing constants may differ, probabilities may not.
    difference = np.asarray(student["theta"] - TEACHER["theta"])
    np.testing.assert_allclose(difference, difference[:1].repeat(CLASSES, 0), atol=1e-3)
    expected = probabilities(TEACHER, NEW_INPUTS)
    np.testing.assert_allclose(probabilities(student, NEW_INPUTS), expected, atol=1e-3)


def test_inputs_must_span_all_directions_for_it():
    flat = INPUTS.copy()
    flat[:, 2] = flat[:, 1]
    student = descend(Cocktail(1.0), flat, 5000)
    seen = NEW_INPUTS.copy()
    seen[:, 2] = seen[:, 1]
    np.testing.assert_allclose(
        probabilities(student, seen), probabilities(TEACHER, seen), atol=1e-3
    )
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(
            probabilities(student, NEW_INPUTS), probabilities(TEACHER, NEW_INPUTS), atol=0.1
        )
