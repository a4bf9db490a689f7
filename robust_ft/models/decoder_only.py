"""What decoder-only models share: input and target as one sequence, its masks and its KV cache.

The sequence of a row is [prompt; input; target], where the target is `decoder_input_tokens`, whose
first token is the input's last or a separator (`robust_ft.decoder_start`). Padding of the input is
masked wherever it stands, and positions count only the tokens that a token sees: so the amount and
place of padding change nothing.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from robust_ft.models import attention, kv_cache
from robust_ft.models.peft.base import KeyValues
from robust_ft.types import Batch

Cache = dict[str, Any]


class Layout(NamedTuple):
    """Positions and attention mask of tokens.

    Attributes:
        positions: Of the queries, from 0; padding does not count.
        key_positions: Of the keys.
        mask: Which keys a query sees.
    """

    positions: Int[Array, "batch query"]
    key_positions: Int[Array, "batch key"]
    mask: Bool[Array, "batch query key"]

    def bias(self) -> Float[Array, "batch 1 query key"]:
        """Returns the attention bias, the same for all heads."""
        return attention.mask_to_bias(self.mask)

    def windowed_bias(self, window: int, slots: int) -> Float[Array, "batch 1 query longer"]:
        """Returns the bias with which a query sees only the last `window` positions.

        Args:
            window: Positions that a query sees, its own included.
            slots: Slots of a prefix that take the positions before the first token. The window
                passes them, too: they have the bias's first columns.
        """
        slot_positions = jnp.arange(-slots, 0)[None]  # [1, slots]
        slot_positions = jnp.broadcast_to(slot_positions, (self.mask.shape[0], slots))
        keys = jnp.concatenate([slot_positions, self.key_positions], 1)
        distance = self.positions[:, :, None] - keys[:, None, :]  # [batch, query, slots + key]
        seen = jnp.pad(self.mask, ((0, 0), (0, 0), (slots, 0)), constant_values=True)
        return attention.mask_to_bias(seen & (distance < window))


def layout(input_mask: Bool[Array, "batch input"], batch: Batch | None = None) -> Layout:
    """Returns the layout of the input alone or, with a batch, of input and target.

    Examples of a packed row see only themselves, and their positions start at 0.
    """
    mask, segments = input_mask, None
    if batch is not None:
        # Padding at the end of a target is seen by nothing but padding.
        target_mask = jnp.ones(batch["decoder_input_tokens"].shape, bool)
        mask = jnp.concatenate([input_mask, target_mask], 1)  # [batch, length]
        segments = attention.input_segments(batch, input_mask)
        if segments is not None:
            segments = jnp.concatenate([segments, batch["decoder_segment_ids"]], 1)
    slots = jnp.arange(mask.shape[1])[None]  # [1, length]
    causal = slots[:, :, None] >= slots[:, None, :]
    seen = causal & mask[:, None, :]  # [batch, length, length]
    if segments is not None:
        seen &= attention.same_segment(segments, segments)
    # A token sees itself and what is before it: their number is its position. Padding may see
    # nothing; its position only has to be valid.
    positions = jnp.maximum(jnp.sum(seen, -1) - 1, 0)
    return Layout(positions, positions, seen)


def new_cache(
    input_mask: Bool[Array, "batch input"],
    inputs: Layout,
    keys: Sequence[KeyValues],
    max_length: int,
) -> Cache:
    """Returns the cache after the prefill, with room for `max_length` tokens of the target.

    Args:
        input_mask: Which of the input is not padding.
        inputs: The input's layout.
        keys: Each layer's keys and values of the input. They have a cache of their own, beside the
            target's: it never changes, so that decoding need not reorder it.
        max_length: The most tokens that will be read.
    """
    return {
        "position": jnp.sum(input_mask, -1),  # [batch], of the next token
        "length": jnp.zeros(input_mask.shape[0], jnp.int32),  # [batch], of the target so far
        "input_mask": input_mask,
        "input_positions": inputs.positions,
        "layers": [
            {"input": kv_cache.filled(each), "target": kv_cache.empty(each, max_length)}
            for each in keys
        ],
    }


def next_layout(cache: Cache, count: int) -> Layout:
    """Returns the layout of the next tokens, which see the input and the target up to themselves.

    Args:
        cache: Of what was read before them.
        count: Their number.
    """
    new = jnp.arange(count)[None]
    # Where the next tokens are in the sequence, and where in the target's cache: [batch, new].
    positions, lengths = (cache[name][:, None] + new for name in ("position", "length"))
    slots = jnp.arange(cache["layers"][0]["target"]["key"].shape[2])[None]  # [1, max_length]
    target_start = cache["position"] - cache["length"]  # [batch]
    input_mask = cache["input_mask"]
    return Layout(
        positions,
        jnp.concatenate([cache["input_positions"], target_start[:, None] + slots], 1),
        jnp.concatenate(
            [
                jnp.broadcast_to(input_mask[:, None], (*positions.shape, input_mask.shape[1])),
                slots[:, None] <= lengths[:, :, None],
            ],
            2,
        ),  # [batch, new, input + max_length]
    )


def update(
    layer: Cache, new: KeyValues, length: Int[Array, "batch"]
) -> tuple[Cache, Sequence[KeyValues]]:
    """Adds the keys and values of more tokens to a layer's cache.

    Args:
        layer: The layer's cache.
        new: Keys and values of the target's next tokens, [batch, new, heads, head_dim].
        length: Number of the target's tokens before them.

    Returns:
        The cache, and the blocks of keys and values that the tokens attend to.
    """
    slots = length[:, None] + jnp.arange(new["key"].shape[1])[None]  # [batch, new]
    target = kv_cache.update(layer["target"], new, slots)
    blocks = [kv_cache.swap(layer["input"]), kv_cache.swap(target)]
    return {"input": layer["input"], "target": target}, blocks


def advance(cache: Cache, new_layers: Sequence[Cache], count: int) -> Cache:
    """Returns the cache after `count` more tokens, with the layers' caches that they left."""
    moved = {name: cache[name] + count for name in ("position", "length")}
    return cache | moved | {"layers": list(new_layers)}
