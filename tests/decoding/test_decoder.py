import jax
import numpy as np
import pytest

from robust_ft.decoding import Decoder, beam_search, greedy, sample
from robust_ft.errors import UserError

EOS, PAD = 1, 0


def test_settings_choose_the_algorithm(table_model):
    model = table_model(seed=0, batch=4, vocab=4, length=4)
    arguments = (model.step_fn(), model.cache(), model.start())
    beams = Decoder(max_decode_len=4, beam_size=3, alpha=1.0, length_penalty="hf", num_return=2)
    draws = Decoder(max_decode_len=4, temperature=0.7, top_k=3, top_p=0.9, num_return=5)

    @jax.jit
    def run(key):
        return [
            (Decoder(max_decode_len=4)(*arguments, EOS, PAD), greedy(*arguments, 4, EOS, PAD)),
            (beams(*arguments, EOS, PAD), beam_search(*arguments, 4, EOS, 3, 1.0, "hf", 2)),
            (
                draws(*arguments, EOS, PAD, key),
                sample(*arguments, 4, EOS, key, 0.7, 3, 0.9, num_return=5),
            ),
        ]

    for decoded, expected in run(jax.random.key(3)):
        np.testing.assert_array_equal(decoded.tokens, expected.tokens)
        np.testing.assert_allclose(decoded.scores, expected.scores, rtol=1e-6)


def test_a_decoder_is_a_static_argument_and_keeps_the_minimum(table_model):
    model = table_model(seed=1, batch=4, vocab=4, length=4, eos_bias=4.0)

    def run(decoder, cache, start):
        return decoder(model.step_fn(), cache, start, EOS, PAD).tokens

    tokens = jax.jit(run, static_argnums=0)(
        Decoder(max_decode_len=4, min_decode_len=2, beam_size=2), model.cache(), model.start()
    )
    assert np.all(np.asarray(tokens)[..., :2] != EOS)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_decode_len": 0}, "max_decode_len"),
        ({"min_decode_len": 8}, "min_decode_len"),
        ({"beam_size": 0}, "beam_size"),
        ({"num_return": 2}, "num_return"),
        ({"beam_size": 4, "length_penalty": "hugging"}, "not one of t5x, hf"),
        ({"top_k": 5}, "temperature"),
        ({"temperature": 1.0, "beam_size": 4}, "Decoder.beam_size=1"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 1.0, "num_return": 0}, "num_return"),
    ],
)
def test_settings_out_of_range(settings, named):
    with pytest.raises(UserError, match=named):
        Decoder(**{"max_decode_len": 8, **settings})


def test_sampling_needs_a_key(table_model):
    model = table_model(seed=2, batch=1, vocab=3, length=2)
    with pytest.raises(UserError, match="random key"):
        Decoder(max_decode_len=2, temperature=1.0)(
            model.step_fn(), model.cache(), model.start(), EOS, PAD
        )
