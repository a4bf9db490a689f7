import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brute_force import best_of, every_sequence, penalised, plain_beam_search

from robust_ft.decoding import beam_search, greedy, min_length, no_repeat_ngrams
from robust_ft.errors import UserError

# The package's attribute of this name is the function.
beam_search_module = importlib.import_module("robust_ft.decoding.beam_search")

EOS, PAD = 1, 0
ALPHAS = (-1.0, 0.0, 0.6, 1.0, 2.0)


def run(model, alpha, ends=EOS, **settings):
    """Compiled once for each shape: the table and alpha are arguments."""

    @jax.jit
    def search(table, alpha, cache, start):
        return beam_search(
            model.step_fn(table), cache, start, model.length, ends, alpha=alpha, **settings
        )

    for value in np.atleast_1d(alpha):
        yield value, search(model.table, value, model.cache(), model.start())


def assert_same(decoded, expected):
    """Compares with [(tokens, scores)] of each example."""
    np.testing.assert_array_equal(decoded.tokens, [tokens for tokens, _ in expected])
    np.testing.assert_allclose(decoded.scores, [scores for _, scores in expected], rtol=2e-5)


@pytest.mark.parametrize(
    ("vocab", "length", "beam_size", "num_return", "eos_bias", "length_penalty"),
    [
        (3, 4, 12, 1, 0.0, "t5x"),
        (3, 4, 24, 5, -2.0, "hf"),
        (4, 3, 18, 18, 0.0, "t5x"),
        (5, 3, 80, 3, 2.0, "hf"),
    ],
)
def test_a_wide_beam_finds_what_enumeration_finds(
    table_model, vocab, length, beam_size, num_return, eos_bias, length_penalty
):
    # The beam holds every prefix, and twice the beam every extension: nothing is pruned. Hugging
    # Face's beam has to hold every extension, as only these may end.
    extensions = (vocab - 1) ** (length - 1) * vocab
    assert (beam_size if length_penalty == "hf" else 2 * beam_size) >= extensions
    model = table_model(seed=vocab, batch=4, vocab=vocab, length=length, eos_bias=eos_bias)
    settings = {"beam_size": beam_size, "num_return": num_return, "length_penalty": length_penalty}
    if length_penalty == "hf":
        settings["early_stopping"] = "never"
    for alpha, decoded in run(model, ALPHAS, **settings):
        expected = [
            best_of(every_sequence(model, row), num_return, alpha, length_penalty, length)
            for row in range(model.batch)
        ]
        assert_same(decoded, expected)


@pytest.mark.parametrize(
    ("vocab", "beam_size", "num_return", "eos_bias", "length_penalty", "early_stopping"),
    [
        (7, 2, 1, 0.0, "t5x", False),
        (7, 2, 1, 0.0, "hf", False),
        (5, 3, 3, 1.5, "t5x", False),
        (5, 3, 2, 1.5, "hf", True),
        (3, 4, 4, -6.0, "hf", "never"),
        (4, 3, 2, 1.0, "hf", "never"),
        (2, 4, 2, 0.0, "t5x", False),
    ],
)
def test_a_narrow_beam_equals_a_plain_one(
    table_model, vocab, beam_size, num_return, eos_bias, length_penalty, early_stopping
):
    model = table_model(seed=vocab, batch=12, vocab=vocab, length=5, eos_bias=eos_bias)
    shared = (length_penalty, num_return, early_stopping)
    for alpha, decoded in run(
        model,
        ALPHAS,
        beam_size=beam_size,
        length_penalty=length_penalty,
        num_return=num_return,
        early_stopping=early_stopping,
    ):
        expected = [
            plain_beam_search(model, row, beam_size, alpha, *shared) for row in range(model.batch)
        ]
        assert_same(decoded, expected)


def test_early_stopping_makes_a_difference(table_model):
    """Guards the test above."""
    model = table_model(seed=5, batch=12, vocab=5, length=5, eos_bias=1.5)
    settings = {"beam_size": 3, "num_return": 3, "length_penalty": "hf"}
    found = []
    for early_stopping in (True, False, "never"):
        ((_, decoded),) = run(model, 2.0, **settings, early_stopping=early_stopping)
        found.append(np.asarray(decoded.scores))
    assert np.all(found[0] <= found[1]) and np.all(found[1] <= found[2])
    assert np.any(found[0] < found[1]) and np.any(found[1] < found[2])


def test_examples_end_at_different_lengths_and_some_not_at_all(table_model):
    """Guards the tests above: their tables do reach the cases they are meant for."""
    model = table_model(seed=3, batch=12, vocab=3, length=5, eos_bias=-6.0)
    ((_, decoded),) = run(model, 0.6, beam_size=4, num_return=4)
    tokens = np.asarray(decoded.tokens)
    ended = np.any(tokens == EOS, axis=-1)
    assert 0 < ended.mean() < 1
    assert np.all(np.diff(ended.astype(int), axis=1) <= 0), "those that ended come first"
    assert len(set(np.argmax(tokens == EOS, axis=-1)[ended])) > 1


@pytest.mark.parametrize("alpha", [-1.0, 0.6, 2.0])
def test_stopping_early_changes_nothing_but_the_work(table_model, monkeypatch, alpha):
    model = table_model(seed=8, batch=12, vocab=5, length=5, eos_bias=2.0)
    steps = []

    def counting_step(cache, tokens):
        jax.debug.callback(lambda _: steps.append(1), tokens)
        return model.step_fn()(cache, tokens)

    def search():
        steps.clear()
        decoded = jax.jit(
            lambda cache, start: beam_search(
                counting_step, cache, start, 5, EOS, 3, alpha, num_return=2
            )
        )(model.cache(), model.start())
        jax.effects_barrier()
        return decoded, len(steps)

    early, early_steps = search()
    monkeypatch.setattr(beam_search_module, "_is_done", lambda *_: jnp.zeros([12], bool))
    late, late_steps = search()
    assert late_steps == 5
    assert early_steps <= late_steps
    np.testing.assert_array_equal(early.tokens, late.tokens)
    np.testing.assert_array_equal(early.scores, late.scores)


@pytest.mark.parametrize(
    ("alpha", "ends_at_once", "length"),
    [
        # Rising penalty: log(0.18) / 2^2 cannot beat log(0.82), but log(0.18) / 5^2 does.
        (2.0, 0.82, 5),
        # Falling: log(0.63) * 5 cannot beat log(0.37), but log(0.63) * 2 does.
        (-1.0, 0.37, 2),
    ],
)
def test_the_search_goes_on_while_the_penalty_can_still_help(alpha, ends_at_once, length):
    """Ends at once, or else surely with `length` tokens: the longer one is better."""

    def step(position, tokens):
        first = jnp.log(jnp.array([1e-30, ends_at_once, 1 - ends_at_once]))
        others = jnp.log(jnp.array([1e-30, 1e-30, 1.0]))
        end = jnp.log(jnp.array([1e-30, 1.0, 1e-30]))
        later = jnp.where(position[:, None] == length - 1, end, others)
        return jnp.where(position[:, None] == 0, first, later), position + 1

    start = np.zeros([1], np.int32)
    decoded = jax.jit(
        lambda start: beam_search(step, start, start, 5, EOS, 2, alpha, length_penalty="hf")
    )(start)
    expected = [2] * (length - 1) + [EOS] + [PAD] * (5 - length)
    np.testing.assert_array_equal(decoded.tokens[0, 0], expected)


def test_a_sure_ending_stops_the_search_at_once():
    steps = []

    def step(cache, tokens):
        jax.debug.callback(lambda _: steps.append(1), tokens)
        log_probs = jnp.full([len(tokens), 6], -20.0).at[:, EOS].set(-1e-6)
        return log_probs, cache

    search = jax.jit(lambda cache, start: beam_search(step, cache, start, 100, EOS, beam_size=4))
    decoded = search({"x": np.zeros([2, 3])}, np.zeros([2], np.int32))
    jax.effects_barrier()
    assert len(steps) == 1
    np.testing.assert_array_equal(decoded.tokens[:, 0, :2], [[EOS, PAD], [EOS, PAD]])


def test_one_beam_equals_greedy(table_model):
    model = table_model(seed=9, batch=12, vocab=4, length=5)
    best = jax.jit(lambda cache, start: greedy(model.step_fn(), cache, start, 5, EOS, PAD))(
        model.cache(), model.start()
    )
    tokens = np.asarray(best.tokens)
    lengths = np.where(np.any(tokens == EOS, -1), np.argmax(tokens == EOS, -1) + 1, 5)
    for alpha, decoded in run(model, ALPHAS, beam_size=1):
        np.testing.assert_array_equal(decoded.tokens, tokens)
        expected = penalised(np.asarray(best.scores), lengths, alpha, "t5x")
        np.testing.assert_allclose(decoded.scores, expected, rtol=2e-5)


def test_compiled_or_not(table_model):
    model = table_model(seed=9, batch=12, vocab=4, length=5)
    ((_, compiled),) = run(model, 0.6, beam_size=3, num_return=2)
    plain = beam_search(
        *(model.step_fn(), model.cache(), model.start(), 5, EOS, 3, 0.6), num_return=2
    )
    np.testing.assert_array_equal(plain.tokens, compiled.tokens)
    np.testing.assert_allclose(plain.scores, compiled.scores, rtol=1e-6)


def test_padding_id_and_min_length(table_model):
    model = table_model(seed=10, batch=8, vocab=4, length=5, eos_bias=3.0)
    settings = {"num_return": 2, "pad_id": 9, "process": min_length(2, EOS)}
    ((_, decoded),) = run(model, 0.6, beam_size=3, **settings)

    def process(log_probs, prefix):
        return np.where((np.arange(4) == EOS) & (len(prefix) < 2), -np.inf, log_probs)

    expected = [
        plain_beam_search(model, row, 3, 0.6, "t5x", 2, process=process)
        for row in range(model.batch)
    ]
    after_end = np.cumsum(np.asarray(decoded.tokens) == EOS, axis=-1) > 0
    after_end = np.concatenate([np.zeros_like(after_end[..., :1]), after_end[..., :-1]], -1)
    assert np.all(np.asarray(decoded.tokens)[after_end] == 9)
    tokens = np.where(after_end, PAD, decoded.tokens)
    np.testing.assert_array_equal(tokens, [tokens for tokens, _ in expected])


def test_processors_see_the_tokens_of_their_own_beam(table_model):
    model = table_model(seed=11, batch=6, vocab=6, length=4, eos_bias=-1.0)
    history = jnp.full([model.batch, 1], -1)
    ((_, decoded),) = run(
        model, 0.6, beam_size=3, num_return=3, process=no_repeat_ngrams(1, history)
    )

    def process(log_probs, prefix):
        return np.where(np.isin(np.arange(6), prefix), -np.inf, log_probs)

    expected = [
        plain_beam_search(model, row, 3, 0.6, "t5x", 3, process=process)
        for row in range(model.batch)
    ]
    assert_same(decoded, expected)


def test_one_token_vocabulary_and_fewer_sequences_than_asked():
    def step(cache, tokens):
        return jnp.zeros([len(tokens), 2]).at[:, 0].set(-jnp.inf), cache

    start = np.zeros([1], np.int32)
    decoded = jax.jit(
        lambda start: beam_search(step, {}, start, 3, EOS, beam_size=4, num_return=3)
    )(start)
    np.testing.assert_array_equal(decoded.tokens, [[[EOS, 0, 0], [0, 0, 0], [0, 0, 0]]])
    np.testing.assert_array_equal(decoded.scores, [[0.0, -np.inf, -np.inf]])

    def single(cache, tokens):
        return jnp.zeros([len(tokens), 1]), cache

    decoded = jax.jit(
        lambda start: beam_search(single, {}, start, 3, eos_id=0, pad_id=7, beam_size=4)
    )(start)
    np.testing.assert_array_equal(decoded.tokens, [[[0, 7, 7]]])


def test_an_untouched_leaf_is_not_reordered(table_model):
    """The encoder's keys and values are the largest leaves; a gather would copy them each step."""
    model = table_model(seed=12, batch=2, vocab=4, length=3)

    def search(touch):
        def step(cache, tokens):
            log_probs, small = model.step_fn()(cache["small"], tokens)
            return log_probs, {"small": small, "encoder": touch(cache["encoder"])}

        return lambda big: (
            beam_search(
                step, {"small": model.cache(), "encoder": big}, model.start(), 3, EOS, beam_size=3
            ).tokens
        )

    big = jnp.zeros([2, 11, 13])
    jaxprs = [str(jax.make_jaxpr(search(touch))(big)) for touch in (lambda x: x, lambda x: x + 0)]
    gathers = [
        sum("gather[" in line and "2,3,11,13" in line for line in jaxpr.splitlines())
        for jaxpr in jaxprs
    ]
    assert gathers == [0, 1]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"length_penalty": "t5"}, "Did you mean 't5x'"),
        ({"beam_size": 0}, "beam_size"),
        ({"beam_size": 2, "num_return": 3}, "num_return"),
        ({"num_return": 0}, "num_return"),
        ({"length_penalty": "hf", "early_stopping": "newer"}, "not 'newer'"),
        ({"length_penalty": "hf", "early_stopping": ""}, "not ''"),
        ({"early_stopping": True}, "for length_penalty='hf'"),
    ],
)
def test_settings_out_of_range(table_model, settings, named):
    model = table_model(seed=5, batch=1, vocab=3, length=2)
    with pytest.raises(UserError, match=named):
        beam_search(model.step_fn(), model.cache(), model.start(), 2, EOS, **settings)
