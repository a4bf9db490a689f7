"""Ensembles as step functions: their distribution, and decoding over it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_ft.decoding import beam_search, greedy
from robust_ft.ensembles.mixing import ensemble, mixed

EOS, VOCAB, LENGTH = 1, 4, 4


def softmax(logits):
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
def test_the_mean_is_of_probabilities(weight):
    rng = np.random.default_rng(0)
    p, q = softmax(rng.normal(size=(2, 50, 1000)) * 4)
    weights = jnp.array([weight, 1 - weight])
    with np.errstate(divide="ignore"):
        found = mixed([jnp.log(p), jnp.log(q)], weights)
    np.testing.assert_allclose(
        np.exp(np.asarray(found, np.float64)), weight * p + (1 - weight) * q, rtol=0, atol=1e-6
    )
    np.testing.assert_allclose(found, np.log(weight * p + (1 - weight) * q), rtol=0, atol=1e-5)


def test_impossible_tokens():
    p = jnp.log(jnp.array([[0.5, 0.5, 0.0]]))
    q = jnp.log(jnp.array([[1.0, 0.0, 0.0]]))
    np.testing.assert_allclose(np.exp(mixed([p, q], jnp.array([0.5, 0.5]))), [[0.75, 0.25, 0]])
    # A member of weight 0 changes nothing, not even in the last bit.
    np.testing.assert_array_equal(mixed([p, q], jnp.array([1.0, 0.0])), p)
    np.testing.assert_array_equal(mixed([p], jnp.array([1.0])), p)


@pytest.fixture
def both(table_model):
    """Two models of the same sizes, and their caches."""
    models = [table_model(seed, 3, VOCAB, LENGTH, eos_bias=-0.5) for seed in (1, 2)]
    step = [model.step_fn() for model in models]
    return models, step, tuple(jax.tree.map(jnp.asarray, model.cache()) for model in models)


def best_sequences(models, weights, alpha):
    """The most probable sequence of each row by enumeration, in float64, and its score."""
    best = []
    for row in range(models[0].batch):
        found = []
        for length in range(1, LENGTH + 1):
            for said in itertools.product([t for t in range(VOCAB) if t != EOS], repeat=length - 1):
                said = (*said, EOS)
                total = sum(
                    np.log(
                        sum(
                            w * np.exp(m.log_probs(row, said[:i])[said[i]])
                            for w, m in zip(weights, models, strict=True)
                        )
                    )
                    for i in range(length)
                )
                found.append((total / ((5 + length) / 6) ** alpha, said))
        best.append(max(found))
    return best


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_beams_over_an_ensemble_find_the_best_by_enumeration(both, weight):
    models, steps, caches = both
    weights = (weight, 1 - weight)
    found = beam_search(
        ensemble(steps, jnp.array(weights)),
        caches,
        models[0].start(),
        LENGTH,
        EOS,
        beam_size=VOCAB**LENGTH,
        alpha=0.6,
    )
    for row, (score, said) in enumerate(best_sequences(models, weights, 0.6)):
        tokens = np.asarray(found.tokens)[row, 0]
        assert tuple(tokens[: len(said)]) == said and not tokens[len(said) :].any()
        np.testing.assert_allclose(found.scores[row, 0], score, rtol=1e-5)


def test_greedy_follows_the_common_history(both):
    models, steps, caches = both
    found = greedy(ensemble(steps, jnp.array([0.4, 0.6])), caches, models[0].start(), LENGTH, EOS)
    for row, said in enumerate(np.asarray(found.tokens)[:, 0]):
        for i, token in enumerate(said):
            history = tuple(said[:i])
            if EOS in history:
                break
            p, q = (np.exp(model.log_probs(row, history)) for model in models)
            assert token == np.argmax(0.4 * p + 0.6 * q)
