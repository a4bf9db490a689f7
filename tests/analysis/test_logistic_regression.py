"""Propositions 1 and 2 of Ensembles and Cocktails, on random problems."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_ft.analysis.logistic_regression import Experiment, probabilities, train
from robust_ft.errors import UserError

SEEDS = st.integers(0, 2**31 - 1)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 40), st.integers(1, 4), st.integers(2, 5))
def test_unseen_classes_stay_the_same_under_hard_labels(seed, steps, dim, unseen):
    """Proposition 1, at any iteration."""
    rng = np.random.default_rng(seed)
    inputs, labels = rng.normal(size=(12, dim)), rng.integers(0, 3, 12)
    theta = train(inputs, np.eye(3 + unseen)[labels], steps)
    np.testing.assert_allclose(theta[3:], np.broadcast_to(theta[3], theta[3:].shape), atol=1e-12)


@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_the_teachers_probabilities_carry_what_it_knows_of_unseen_classes(seed):
    """Proposition 2: trained on soft labels alone, the student is the teacher on any input."""
    rng = np.random.default_rng(seed)
    teacher = rng.normal(size=(5, 3))
    inputs, new = rng.normal(size=(60, 3)), 2 * rng.normal(size=(20, 3))
    student = train(inputs, probabilities(teacher, inputs), 10_000)
    np.testing.assert_allclose(probabilities(student, new), probabilities(teacher, new), atol=1e-4)
    # Equal up to a vector that all classes share, which changes no probability.
    difference = student - teacher
    np.testing.assert_allclose(
        difference, np.broadcast_to(difference.mean(0), difference.shape), atol=1e-2
    )


def test_the_gradient_is_that_of_the_cross_entropy():
    rng = np.random.default_rng(0)
    inputs, targets = rng.normal(size=(7, 2)), rng.dirichlet(np.ones(4), 7)
    rate = 2 * 7 / np.linalg.norm(inputs, 2) ** 2
    found = -train(inputs, targets, 1) / rate

    def loss(theta):
        return -np.mean(np.sum(targets * np.log(probabilities(theta, inputs)), axis=1))

    for index in np.ndindex(4, 2):
        nudge = np.zeros((4, 2))
        nudge[index] = 1e-6
        assert found[index] == pytest.approx((loss(nudge) - loss(-nudge)) / 2e-6, abs=1e-8)


def test_cocktails_keep_unseen_classes_and_hard_labels_do_not():
    experiment = Experiment(classes=20, dim=6, examples=300, steps=300)
    found = experiment.accuracies(0, (0.0, 0.5, 1.0))
    assert found["teacher"] == (100.0, 100.0)
    assert found["hard labels"][0] > 80 and found["hard labels"][1] == 0
    assert found["cocktail 0.5"][0] > 80 and found["cocktail 1"][1] > 60
    assert found["cocktail 0.5"][1] > found["hard labels"][1]


def test_bad_input():
    with pytest.raises(UserError, match=r"Experiment\.classes=0 must be at least 1"):
        Experiment(classes=0)
