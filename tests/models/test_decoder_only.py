import jax.numpy as jnp
import numpy as np
import pytest

from robust_ft.errors import UserError
from robust_ft.models import decoder_only


def test_padding_takes_no_position_and_is_not_seen():
    valid = jnp.asarray([[0, 1, 0, 1], [1, 1, 0, 0]], bool)
    batch = {"decoder_input_tokens": jnp.zeros((2, 3), jnp.int32)}
    found = decoder_only.layout(valid, batch)
    np.testing.assert_array_equal(found.positions[:, 4:], [[2, 3, 4]] * 2)
    np.testing.assert_array_equal(found.positions[0, [1, 3]], [0, 1])
    np.testing.assert_array_equal(found.positions[1, [0, 1]], [0, 1])
    np.testing.assert_array_equal(found.allowed[0, 4], [0, 1, 0, 1, 1, 0, 0])
    np.testing.assert_array_equal(found.allowed[1, 6], [1, 1, 0, 0, 1, 1, 1])


def test_a_window_counts_tokens_and_not_padding():
    valid = jnp.asarray([[1, 1, 0, 0, 1]], bool)
    found = decoder_only.layout(valid, {"decoder_input_tokens": jnp.zeros((1, 1), jnp.int32)})
    np.testing.assert_array_equal(found.bias(3)[0, 0, -1] == 0, [0, 1, 0, 0, 1, 1])


def test_packed_examples_see_themselves_and_start_at_0():
    batch = {
        "encoder_segment_ids": jnp.asarray([[1, 1, 2, 0]]),
        "decoder_input_tokens": jnp.zeros((1, 4), jnp.int32),
        "decoder_segment_ids": jnp.asarray([[1, 2, 2, 0]]),
    }
    valid = batch["encoder_segment_ids"] > 0
    found = decoder_only.layout(valid, batch)
    np.testing.assert_array_equal(found.positions[0, [0, 1, 4]], [0, 1, 2])
    np.testing.assert_array_equal(found.positions[0, [2, 5, 6]], [0, 1, 2])
    np.testing.assert_array_equal(found.allowed[0, 6], [0, 0, 1, 0, 0, 1, 1, 0])
    with pytest.raises(UserError, match="soft prompt"):
        decoder_only.layout(jnp.ones((1, 6), bool), batch)


def test_steps_go_on_where_the_input_ends():
    valid = jnp.asarray([[0, 1, 1], [1, 0, 0]], bool)
    keys = [{"key": jnp.ones((2, 3, 1, 2)), "value": jnp.ones((2, 3, 1, 2))}]
    cache = decoder_only.new_cache(valid, decoder_only.layout(valid), keys, 4)
    new = {name: jnp.full((2, 1, 1, 2), 5.0) for name in ("key", "value")}
    for i in range(2):
        found = decoder_only.step_layout(cache)
        np.testing.assert_array_equal(found.positions, [[2 + i], [1 + i]])
        np.testing.assert_array_equal(
            found.key_positions[:, 3:] - found.positions, [np.arange(4) - i] * 2
        )
        np.testing.assert_array_equal(found.allowed[:, 0, :3], valid)
        np.testing.assert_array_equal(found.allowed[:, 0, 3:], [np.arange(4) <= i] * 2)
        layers = [decoder_only.remember(cache["layers"][0], new, cache["length"])]
        cache = decoder_only.advance(cache, layers)
    assert cache["layers"][0]["input"]["key"] is keys[0]["key"]
    np.testing.assert_array_equal(cache["layers"][0]["target"]["key"][0, :, 0, 0], [5, 5, 0, 0])
