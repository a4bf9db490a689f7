"""Decoding that stops at any of several ids, against brute force."""

import jax
import numpy as np
import pytest
from brute_force import PAD, argmax_loop, best_of, every_sequence, plain_beam_search

from robust_ft.decoding import Decoder, beam_search, greedy, sample

ENDS = (1, 4, 2)
ALPHAS = (-1.0, 0.6, 1.0)


def assert_same(decoded, expected):
    """Compares with [(tokens, scores)] of each example."""
    np.testing.assert_array_equal(decoded.tokens, [tokens for tokens, _ in expected])
    np.testing.assert_allclose(decoded.scores, [scores for _, scores in expected], rtol=2e-5)


def last_tokens(decoded):
    """Returns the tokens that end sequences; only what follows them is padding (99)."""
    rows = np.asarray(decoded.tokens).reshape(-1, decoded.tokens.shape[-1])
    return {row[row != 99][-1] for row in rows}


@pytest.mark.parametrize("ends", [ENDS, (1,), 1, (3, 0)])
def test_greedy_stops_at_each(table_model, ends):
    model = table_model(seed=1, batch=24, vocab=6, length=5)
    decoded = jax.jit(
        lambda cache, start: greedy(model.step_fn(), cache, start, model.length, ends, 99)
    )(model.cache(), model.start())
    every = (ends,) if isinstance(ends, int) else ends
    expected = [argmax_loop(model, row, pad=99, ends=every) for row in range(model.batch)]
    np.testing.assert_array_equal(decoded.tokens[:, 0], [tokens for tokens, _ in expected])
    np.testing.assert_allclose(decoded.scores[:, 0], [score for _, score in expected], rtol=1e-5)
    assert last_tokens(decoded) >= set(every), "each should end some example"


@pytest.mark.parametrize("decoder", ["greedy", "beams"])
def test_a_minimum_length_forbids_each(table_model, decoder):
    model = table_model(seed=2, batch=12, vocab=6, length=5, eos_bias=2.0)
    settings = Decoder(max_decode_len=5, min_decode_len=2, beam_size=3 if decoder == "beams" else 1)
    decoded = jax.jit(
        lambda cache, start: settings(model.step_fn(), cache, start, ENDS, PAD)
    )(model.cache(), model.start())  # fmt: skip
    tokens = np.asarray(decoded.tokens)
    assert not np.isin(tokens[..., :2], ENDS).any()
    if decoder == "greedy":
        expected = [argmax_loop(model, row, min_tokens=2, ends=ENDS)[0] for row in range(12)]
    else:

        def process(log_probs, prefix):
            return np.where(np.isin(np.arange(6), ENDS) & (len(prefix) < 2), -np.inf, log_probs)

        expected = [
            plain_beam_search(model, row, 3, 0.6, "t5x", 1, ends=ENDS, process=process)[0][0]
            for row in range(12)
        ]
    np.testing.assert_array_equal(tokens[:, 0], expected)


def test_sampling_stops_at_each_and_follows_the_distribution(table_model):
    model = table_model(seed=3, batch=1, vocab=4, length=2)
    ends, draws = (1, 2), 20_000
    decoded = jax.jit(
        lambda key: sample(
            *(model.step_fn(), model.cache(), model.start(), 2, ends, key),
            num_return=draws,
            pad_id=99,
        )
    )(jax.random.key(0))
    tokens, scores = np.asarray(decoded.tokens)[0], np.asarray(decoded.scores)[0]
    found = 0
    for sequence, log_prob in every_sequence(model, 0, ends=ends):
        same = np.all(tokens == [*sequence, *[99] * (2 - len(sequence))], axis=1)
        p = np.exp(log_prob)
        assert abs(same.mean() - p) < 5 * np.sqrt(p * (1 - p) / draws)
        np.testing.assert_allclose(scores[same], log_prob, rtol=1e-5)
        found += same.sum()
    assert found == draws


def searched(model, ends, **settings):
    """Yields each alpha and what beam search finds."""

    @jax.jit
    def search(alpha, cache, start):
        step = model.step_fn()
        return beam_search(step, cache, start, model.length, ends, alpha=alpha, **settings)

    for alpha in ALPHAS:
        yield alpha, search(alpha, model.cache(), model.start())


@pytest.mark.parametrize(
    ("vocab", "length", "beam_size", "num_return", "length_penalty"),
    [(5, 3, 10, 4, "t5x"), (5, 3, 24, 4, "hf")],
)
def test_a_wide_beam_finds_what_enumeration_finds(
    table_model, vocab, length, beam_size, num_return, length_penalty
):
    # Of 5 tokens 3 end: 2 beams stay live, then 4, with 20 extensions at most.
    model = table_model(seed=4, batch=8, vocab=vocab, length=length)
    settings = {"beam_size": beam_size, "num_return": num_return, "length_penalty": length_penalty}
    if length_penalty == "hf":
        settings["early_stopping"] = "never"
    for alpha, decoded in searched(model, ENDS, **settings):
        expected = [
            best_of(
                every_sequence(model, row, ends=ENDS),
                num_return,
                alpha,
                length_penalty,
                length,
                ENDS,
            )
            for row in range(model.batch)
        ]
        assert_same(decoded, expected)


@pytest.mark.parametrize(
    ("length_penalty", "early_stopping"),
    [("t5x", False), ("hf", False), ("hf", True), ("hf", "never")],
)
@pytest.mark.parametrize(("ends", "beam_size"), [(ENDS, 2), ((5, 3), 4)])
def test_a_narrow_beam_equals_a_plain_one(
    table_model, ends, beam_size, length_penalty, early_stopping
):
    model = table_model(seed=5, batch=16, vocab=7, length=5, scale=1.0)
    settings = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    for alpha, decoded in searched(model, ends, beam_size=beam_size, num_return=2, **settings):
        expected = [
            plain_beam_search(model, row, beam_size, alpha, length_penalty, 2, early_stopping, ends)
            for row in range(model.batch)
        ]
        assert_same(decoded, expected)
