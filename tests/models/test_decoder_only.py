import jax.numpy as jnp
import numpy as np
import pytest

from robust_ft.errors import UserError
from robust_ft.models import decoder_only


def test_padding_takes_no_position_and_is_not_seen():
    input_mask = jnp.asarray([[0, 1, 0, 1], [1, 1, 0, 0]], bool)
    batch = {"decoder_input_tokens": jnp.zeros((2, 3), jnp.int32)}
    layout = decoder_only.layout(input_mask, batch)
    np.testing.assert_array_equal(layout.positions[:, 4:], [[2, 3, 4]] * 2)
    np.testing.assert_array_equal(layout.positions[0, [1, 3]], [0, 1])
    np.testing.assert_array_equal(layout.positions[1, [0, 1]], [0, 1])
    np.testing.assert_array_equal(layout.mask[0, 4], [0, 1, 0, 1, 1, 0, 0])
    np.testing.assert_array_equal(layout.mask[1, 6], [1, 1, 0, 0, 1, 1, 1])


def test_a_window_counts_tokens_and_not_padding():
    input_mask = jnp.asarray([[1, 1, 0, 0, 1]], bool)
    layout = decoder_only.layout(input_mask, {"decoder_input_tokens": jnp.zeros((1, 1), jnp.int32)})
    np.testing.assert_array_equal(layout.windowed_bias(3, 0)[0, 0, -1] == 0, [0, 1, 0, 0, 1, 1])
    # The last token is at position 3, and a prefix of two slots at -2 and -1.
    seen = layout.windowed_bias(5, 2)[0, 0, -1] == 0
    np.testing.assert_array_equal(seen, [0, 1, 1, 1, 0, 0, 1, 1])


def test_packed_examples_see_themselves_and_start_at_0():
    batch = {
        "encoder_segment_ids": jnp.asarray([[1, 1, 2, 0]]),
        "decoder_input_tokens": jnp.zeros((1, 4), jnp.int32),
        "decoder_segment_ids": jnp.asarray([[1, 2, 2, 0]]),
    }
    input_mask = batch["encoder_segment_ids"] > 0
    layout = decoder_only.layout(input_mask, batch)
    np.testing.assert_array_equal(layout.positions[0, [0, 1, 4]], [0, 1, 2])
    np.testing.assert_array_equal(layout.positions[0, [2, 5, 6]], [0, 1, 2])
    np.testing.assert_array_equal(layout.mask[0, 6], [0, 0, 1, 0, 0, 1, 1, 0])
    with pytest.raises(UserError, match="soft prompt"):
        decoder_only.layout(jnp.ones((1, 6), bool), batch)


def test_steps_go_on_where_the_input_ends():
    input_mask = jnp.asarray([[0, 1, 1], [1, 0, 0]], bool)
    keys = [{"key": jnp.ones((2, 3, 1, 2)), "value": jnp.ones((2, 3, 1, 2))}]
    cache = decoder_only.new_cache(input_mask, decoder_only.layout(input_mask), keys, 4)
    new = {name: jnp.full((2, 1, 1, 2), 5.0) for name in ("key", "value")}
    for i in range(2):
        layout = decoder_only.next_layout(cache, 1)
        np.testing.assert_array_equal(layout.positions, [[2 + i], [1 + i]])
        np.testing.assert_array_equal(
            layout.key_positions[:, 3:] - layout.positions, [np.arange(4) - i] * 2
        )
        np.testing.assert_array_equal(layout.mask[:, 0, :3], input_mask)
        np.testing.assert_array_equal(layout.mask[:, 0, 3:], [np.arange(4) <= i] * 2)
        layer, (inputs, target) = decoder_only.update(cache["layers"][0], new, cache["length"])
        assert inputs["key"].shape == (2, 3, 1, 2) and target["value"].shape == (2, 4, 1, 2)
        assert layer["input"] is cache["layers"][0]["input"]
        cache = decoder_only.advance(cache, [layer], 1)
    np.testing.assert_array_equal(target["key"][0, :, 0, 0], [5, 5, 0, 0])


def test_several_tokens_at_once_are_laid_out_as_one_by_one():
    input_mask = jnp.asarray([[0, 1, 1], [1, 0, 0]], bool)
    keys = [{"key": jnp.ones((2, 3, 1, 2)), "value": jnp.ones((2, 3, 1, 2))}]
    cache = decoder_only.new_cache(input_mask, decoder_only.layout(input_mask), keys, 4)
    together = decoder_only.next_layout(cache, 3)
    for i in range(3):
        alone = decoder_only.next_layout(cache, 1)
        np.testing.assert_array_equal(together.positions[:, i : i + 1], alone.positions)
        np.testing.assert_array_equal(together.mask[:, i : i + 1], alone.mask)
        np.testing.assert_array_equal(together.key_positions, alone.key_positions)
        cache = decoder_only.advance(cache, cache["layers"], 1)
