import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brute_force import argmax_loop

from robust_ft.decoding import greedy, min_length, sample
from robust_ft.decoding.greedy import reshape_distribution
from robust_ft.errors import UserError

EOS, PAD = 1, 0


def run(model, **settings):
    @jax.jit
    def search(cache, start):
        return greedy(model.step_fn(), cache, start, model.length, EOS, **settings)

    return search(model.cache(), model.start())


@pytest.mark.parametrize("jit", [False, True])
def test_greedy_equals_an_argmax_loop(table_model, jit):
    model = table_model(seed=0, batch=16, vocab=4, length=5, eos_bias=0.5)

    with jax.disable_jit() if not jit else contextlib.nullcontext():
        decoded = run(model)
    expected = [argmax_loop(model, row) for row in range(model.batch)]
    np.testing.assert_array_equal(decoded.tokens[:, 0], [tokens for tokens, _ in expected])
    np.testing.assert_allclose(decoded.scores[:, 0], [s for _, s in expected], rtol=1e-5)
    lengths = {tokens.index(EOS) for tokens, _ in expected if EOS in tokens}
    assert len(lengths) > 2, "the examples should end at different lengths"


def test_output_after_the_end_is_padded_with_the_given_id(table_model):
    model = table_model(seed=1, batch=16, vocab=4, length=5, eos_bias=1.0)
    decoded = run(model, pad_id=9)
    expected = [argmax_loop(model, row, pad=9)[0] for row in range(model.batch)]
    np.testing.assert_array_equal(decoded.tokens[:, 0], expected)
    assert 9 in np.asarray(decoded.tokens)


def test_greedy_stops_when_all_have_ended():
    calls = []

    def step(cache, tokens):
        jax.debug.callback(lambda _: calls.append(1), cache)
        ended = cache >= jnp.arange(len(cache))  # row i ends at its token i
        logits = jnp.where(jnp.arange(4)[None] == jnp.where(ended, EOS, 2)[:, None], 0.0, -9.0)
        return jax.nn.log_softmax(logits), cache + 1

    start = np.zeros([3], np.int32)
    decoded = jax.jit(lambda start: greedy(step, start, start, 50, EOS, PAD))(start)
    jax.effects_barrier()
    assert len(calls) == 3
    np.testing.assert_array_equal(
        decoded.tokens[:, 0, :4], [[EOS, 0, 0, 0], [2, EOS, 0, 0], [2, 2, EOS, 0]]
    )


def test_min_length_forbids_the_end(table_model):
    model = table_model(seed=2, batch=8, vocab=4, length=5, eos_bias=3.0)
    decoded = run(model, process=min_length(2, EOS))
    expected = [argmax_loop(model, row, min_tokens=2)[0] for row in range(model.batch)]
    np.testing.assert_array_equal(decoded.tokens[:, 0], expected)


def test_sampling_follows_the_distribution_of_each_history(table_model):
    model = table_model(seed=3, batch=2, vocab=3, length=2)
    draws = 20_000
    decoded = jax.jit(
        lambda key: sample(
            *(model.step_fn(), model.cache(), model.start(), model.length, EOS, key),
            num_return=draws,
        )
    )(jax.random.key(0))
    tokens, scores = np.asarray(decoded.tokens), np.asarray(decoded.scores)
    for row in range(model.batch):
        first = model.log_probs(row, [])
        for a in range(model.vocab):
            second = model.log_probs(row, [a]) if a != EOS else np.log([1, 1e-300, 1e-300])
            for b in range(model.vocab):
                p = np.exp(first[a] + second[b])
                share = np.mean(np.all(tokens[row] == [a, b], axis=-1))
                assert abs(share - p) < 5 * np.sqrt(p * (1 - p) / draws) + 1e-9
                chosen = np.all(tokens[row] == [a, b], axis=-1)
                expected = first[a] + (second[b] if a != EOS else 0.0)
                np.testing.assert_allclose(scores[row][chosen], expected, rtol=1e-5)
    assert np.all(np.diff(scores, axis=1) <= 0), "best first"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 1.0, "top_k": 0, "top_p": 1.0}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5, "top_k": 0, "top_p": 1.0}, np.array([16, 9, 4, 1]) / 30),
        ({"temperature": 1.0, "top_k": 2, "top_p": 1.0}, [4 / 7, 3 / 7, 0, 0]),
        ({"temperature": 1.0, "top_k": 9, "top_p": 1.0}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 1.0, "top_k": 0, "top_p": 0.69}, [4 / 7, 3 / 7, 0, 0]),
        ({"temperature": 1.0, "top_k": 0, "top_p": 0.71}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"temperature": 1.0, "top_k": 0, "top_p": 1e-6}, [1, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.7}, [4 / 7, 3 / 7, 0, 0]),
        ({"temperature": 0.5, "top_k": 0, "top_p": 0.8}, np.array([16, 9, 0, 0]) / 25),
    ],
)
def test_reshaped_distribution(settings, expected):
    shuffle = np.array([2, 0, 3, 1])
    log_probs = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))[:, shuffle]
    probs = jax.nn.softmax(reshape_distribution(log_probs, **settings))
    np.testing.assert_allclose(probs[0], np.asarray(expected)[shuffle], atol=1e-6)


def test_top_k_of_one_is_greedy_and_a_key_repeats_its_draws(table_model):
    model = table_model(seed=4, batch=8, vocab=4, length=4)
    arguments = (model.step_fn(), model.cache(), model.start(), model.length, EOS)
    one, best = jax.jit(
        lambda key: (
            sample(*arguments, key, temperature=2.0, top_k=1),
            greedy(*arguments, PAD),
        )
    )(jax.random.key(0))
    np.testing.assert_array_equal(one.tokens, best.tokens)
    np.testing.assert_allclose(one.scores, best.scores, rtol=1e-6)

    draw = jax.jit(lambda key: sample(*arguments, key).tokens)
    draws = [draw(jax.random.key(seed)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert np.any(draws[0] != draws[2])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"num_return": 0}, "num_return"),
    ],
)
def test_sampling_settings_out_of_range(table_model, settings, named):
    model = table_model(seed=5, batch=1, vocab=3, length=2)
    with pytest.raises(UserError, match=named):
        sample(model.step_fn(), model.cache(), model.start(), 2, EOS, jax.random.key(0), **settings)
