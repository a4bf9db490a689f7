"""What decoder-only models share: input and target are one sequence, and the input's keys are kept.

The sequence of a row is [prompt; input; target], where the target is `decoder_input_tokens`, whose
first token separates it from the input. Padding of the input is masked wherever it stands, and
positions count only what a token may see: so the number and place of padding change nothing.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from robust_ft.errors import UserError
from robust_ft.models import layers
from robust_ft.models.peft.base import Keys, Peft
from robust_ft.types import Batch

Cache = dict[str, Any]


class Layout(NamedTuple):
    """Where tokens stand, and what they may see.

    Attributes:
        positions: From 0, without padding.
        key_positions: The same of the tokens that are attended to.
        allowed: Which of these a token may see.
    """

    positions: Int[Array, "batch query"]
    key_positions: Int[Array, "batch key"]
    allowed: Bool[Array, "batch query key"]

    def bias(self, window: int | None = None) -> Float[Array, "batch one query key"]:
        """Returns the attention bias; with a window, only the last so many tokens are seen."""
        allowed = self.allowed
        if window is not None:
            distance = self.positions[:, :, None] - self.key_positions[:, None, :]
            allowed = allowed & (distance < window)
        return layers.mask_bias(allowed)


def embedded_input(
    scope: nn.Module,
    x: Float[Array, "batch source embed"],
    batch: Batch,
    pad_id: int,
    peft: Sequence[Peft],
) -> tuple[Float[Array, "batch input embed"], Bool[Array, "batch input"]]:
    """Returns what comes before the target, soft prompts included, and which of it is no padding.

    Args:
        scope: The module that gets the prompts' parameters, in a compact method.
        x: The embedded `encoder_input_tokens`; learned positions are added later.
        batch: Where they come from.
        pad_id: The token that is padding.
        peft: The methods whose `embed` is called.
    """
    valid = batch["encoder_input_tokens"] != pad_id
    for method in peft:
        x, valid = method.embed(scope, x, valid, batch)
    return x, valid


def layout(valid: Bool[Array, "batch input"], batch: Batch | None = None) -> Layout:
    """Returns the layout of the input alone or, with a batch, of input and target.

    Examples of a packed row see only themselves, and their positions start at 0.
    """
    segments = None
    if batch is not None:
        target = jnp.ones(batch["decoder_input_tokens"].shape, bool)
        if "decoder_segment_ids" in batch:
            if batch["encoder_segment_ids"].shape != valid.shape:
                raise UserError("Packed batches cannot be combined with a soft prompt.")
            segments = jnp.concatenate(
                [batch["encoder_segment_ids"], batch["decoder_segment_ids"]], 1
            )
        valid = jnp.concatenate([valid, target], 1)
    slots = jnp.arange(valid.shape[1])
    allowed = (slots[:, None] >= slots[None, :]) & valid[:, None, :]  # [batch, length, length]
    if segments is not None:
        allowed &= layers.same_segment(segments, segments)
    # A token sees itself and what is before it: their number tells where it stands.
    positions = jnp.maximum(jnp.sum(allowed, -1) - 1, 0)
    return Layout(positions, positions, allowed)


def new_cache(
    valid: Bool[Array, "batch input"], inputs: Layout, keys: Sequence[Keys], max_length: int
) -> Cache:
    """Returns the cache of a read input, with room for `max_length` tokens of the target.

    Args:
        valid: Which of the input is no padding.
        inputs: The input's layout.
        keys: Each layer's keys and values of the input. Kept apart from the target's, because they
            never change: decoding need not reorder them.
        max_length: Most tokens that will be read.
    """

    def empty(x: jax.Array) -> jax.Array:
        return jnp.zeros((x.shape[0], max_length, *x.shape[2:]), x.dtype)

    return {
        "position": jnp.sum(valid, -1),  # [batch], of the next token
        "length": jnp.zeros(valid.shape[0], jnp.int32),  # [batch], of the target so far
        "input_valid": valid,
        "input_positions": inputs.positions,
        "layers": [{"input": each, "target": jax.tree.map(empty, each)} for each in keys],
    }


def step_layout(cache: Cache) -> Layout:
    """Returns the layout of the next token, which sees the input, earlier targets and itself."""
    position, length = cache["position"][:, None], cache["length"][:, None]  # [batch, 1]
    slots = jnp.arange(cache["layers"][0]["target"]["key"].shape[1])[None]  # [1, max_length]
    return Layout(
        position,
        jnp.concatenate([cache["input_positions"], position - length + slots], 1),
        jnp.concatenate([cache["input_valid"], slots <= length], 1)[:, None],
    )


def remember(layer: Cache, new: Keys, length: Int[Array, "batch"]) -> Cache:
    """Returns a layer's cache with the keys and values of one more token of the target."""
    rows = jnp.arange(length.shape[0])
    target = {
        name: kept.at[rows, length].set(new[name][:, 0]) for name, kept in layer["target"].items()
    }
    return {"input": layer["input"], "target": target}


def advance(cache: Cache, new_layers: Sequence[Cache]) -> Cache:
    """Returns the cache after a step that has left the layers' caches like this."""
    moved = {name: cache[name] + 1 for name in ("position", "length")}
    return cache | moved | {"layers": list(new_layers)}
