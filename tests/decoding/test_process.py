"""Each processor against a rule for one prefix, in whole searches with and without beams."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brute_force import best_of, every_sequence, plain_beam_search

from robust_ft.decoding import Decoder, chained, no_repeat_ngrams
from robust_ft.errors import UserError

EOS, PAD, START = 1, 0, 0
LENGTH = 4


def rule(before, vocab, settings):
    """Returns what the processors of a `Decoder` do, for one prefix in plain Python.

    Args:
        before: What the decoder has read before the first generated token.
        vocab: Number of tokens.
        settings: Those of the decoder.
    """
    size = settings.get("no_repeat_ngram_size", 0)

    def repeated(tokens):
        ngrams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
        return ngrams[-1:] and ngrams[-1] in ngrams[:-1]

    def process(log_probs, prefix):
        for name, position in (("first", 0), ("last", LENGTH - 1)):
            token = settings.get(f"forced_{name}_token")
            if token is not None and len(prefix) == position:
                return np.where(np.arange(vocab) == token, 0.0, -np.inf)
        out = log_probs.copy()
        for token in range(vocab):
            if (
                token in settings.get("banned_tokens", ())
                or (size and repeated([*before, *prefix, token]))
                or (token == EOS and len(prefix) < settings.get("min_decode_len", 0))
            ):
                out[token] = -np.inf
        return out

    return process


OPTIONS = [
    {"banned_tokens": (2,)},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"no_repeat_ngram_size": 9},
    {"forced_first_token": 3},
    {"forced_last_token": EOS},
    {
        "min_decode_len": 2,
        "banned_tokens": (2,),
        "no_repeat_ngram_size": 2,
        "forced_first_token": 3,
        "forced_last_token": EOS,
    },
]


def decode(model, settings, history=None):
    decoder = Decoder(max_decode_len=LENGTH, **settings)
    return jax.jit(
        lambda cache, start: decoder(
            model.step_fn(), cache, start, EOS, PAD, jax.random.key(0), history
        )
    )(model.cache(), model.start())


@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_in_a_wide_beam_is_enumeration(table_model, options):
    model = table_model(seed=3, batch=3, vocab=4, length=LENGTH, eos_bias=0.5)
    wide = {"beam_size": 108, "num_return": 4, "length_penalty": "hf", "early_stopping": "never"}
    decoded = decode(model, {**wide, **options})
    for row in range(model.batch):
        sequences = every_sequence(model, row, rule([START], 4, options))
        tokens, scores = best_of(sequences, 4, 0.6, "hf", LENGTH)
        np.testing.assert_array_equal(decoded.tokens[row], tokens)
        np.testing.assert_allclose(decoded.scores[row], scores, rtol=2e-5)


@pytest.mark.parametrize("number", range(len(OPTIONS)))
def test_every_option_in_a_narrow_beam_and_in_greedy_decoding(table_model, number):
    model = table_model(seed=4, batch=8, vocab=4, length=LENGTH, eos_bias=0.5)
    options, search = OPTIONS[number], ("t5x", "hf")[number % 2]
    process = rule([START], 4, options)
    settings = {"alpha": 0.5, "beam_size": 2, "num_return": 2, "length_penalty": search}
    greedy, beams = decode(model, options), decode(model, {**settings, **options})
    for row in range(model.batch):
        tokens, score = greedy_loop(model, row, process)
        np.testing.assert_array_equal(greedy.tokens[row, 0], tokens)
        np.testing.assert_allclose(greedy.scores[row, 0], score, rtol=2e-5)
        tokens, scores = plain_beam_search(model, row, 2, 0.5, search, 2, process=process)
        np.testing.assert_array_equal(beams.tokens[row], tokens)
        np.testing.assert_allclose(beams.scores[row], scores, rtol=2e-5)


def greedy_loop(model, row, process):
    tokens, score = [], 0.0
    while len(tokens) < model.length and EOS not in tokens:
        log_probs = process(model.log_probs(row, tokens), tuple(tokens))
        tokens.append(int(np.argmax(log_probs)))
        score += log_probs[tokens[-1]]
    return tokens + [PAD] * (model.length - len(tokens)), score


def test_sampling_obeys_too(table_model):
    model = table_model(seed=5, batch=4, vocab=4, length=LENGTH)
    settings = {"temperature": 1.0, "num_return": 50, "no_repeat_ngram_size": 1}
    decoded = decode(model, {**settings, "banned_tokens": [2]})
    for row in np.asarray(decoded.tokens).reshape(-1, LENGTH).tolist():
        said = row[: row.index(EOS) + 1] if EOS in row else row
        assert 2 not in said and START not in said
        assert len(set(said)) == len(said) or EOS not in row  # no token is left: any may come


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ngrams_of_what_was_read_before_count(size):
    """Uneven histories, random tokens: compared with all n-grams in Python."""
    rng = np.random.default_rng(size)
    rows, vocab, length = 6, 5, 7
    history = rng.integers(0, vocab, (rows, 6)).astype(np.int32)
    for row, padding in zip(history, range(rows), strict=True):
        row[:padding] = -1
    tokens = rng.integers(0, vocab, (2 * rows, length)).astype(np.int32)
    process = jax.jit(no_repeat_ngrams(size, jnp.asarray(history)))
    forbidden = 0
    for generated in range(length):
        out = np.asarray(process(jnp.zeros([2 * rows, vocab]), tokens, generated))
        for row in range(2 * rows):
            before = [*history[row // 2][history[row // 2] >= 0], *tokens[row, :generated]]
            ngrams = {tuple(before[i : i + size]) for i in range(len(before) - size + 1)}
            for token in range(vocab):
                expected = (*before[len(before) - size + 1 :], token) in ngrams
                assert (out[row, token] == -np.inf) == expected
                forbidden += expected
    assert forbidden > 0


def test_a_history_is_used_by_the_decoder(table_model):
    model = table_model(seed=6, batch=2, vocab=5, length=LENGTH, eos_bias=-3.0)
    history = np.array([[-1, 2, 0], [3, 4, 0]], np.int32)
    settings = {"beam_size": 2, "no_repeat_ngram_size": 1}
    tokens = np.asarray(decode(model, settings, jnp.asarray(history)).tokens)[:, 0].tolist()
    for said, before in zip(tokens, ([2, 0], [3, 4, 0]), strict=True):
        said = said[: said.index(EOS)] if EOS in said else said
        assert len(set(said)) == len(said) and not set(said) & set(before)


def test_chained():
    def plus(number):
        return lambda log_probs, tokens, generated: log_probs * 2 + number

    assert chained([]) is None
    tokens = jnp.zeros((1, 1), jnp.int32)
    assert chained([plus(1), plus(3)])(jnp.ones((1, 1)), tokens, jnp.asarray(0)) == 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"banned_tokens": [2, 4]}, "banned_tokens has 4, which is no token of 4"),
        ({"banned_tokens": [-1]}, "banned_tokens=-1 must be at least 0"),
        ({"forced_first_token": 4}, "a forced token has 4"),
        ({"forced_last_token": 9}, "a forced token has 9"),
        ({"forced_last_token": 2, "banned_tokens": [2]}, "forced_last_token=2 is one of the"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size=-1 must be at least 0"),
    ],
)
def test_settings_that_cannot_be(table_model, settings, message):
    model = table_model(seed=0, batch=1, vocab=4, length=LENGTH)
    with pytest.raises(UserError, match=message):
        decode(model, settings)
