"""Prefixes: trainable keys and values that attention sees at every layer (prefix-tuning).

Li and Liang, 2021, section 4, with keys and values themselves as parameters.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from robust_ft.errors import UserError
from robust_ft.models.axes import with_axes
from robust_ft.models.peft.base import Keys, Peft

# A switch of `Prefix` -> what its attention is called in the models.
SITES = {
    "encoder": "attention",
    "decoder": "self_attention",
    "cross": "encoder_decoder_attention",
}


@dataclasses.dataclass(frozen=True)
class Prefix(Peft):
    """Slots before what attention sees: `<attention>/prefix/key` and `value`.

    Each is [length, heads, head_dim], with the heads that keys have. All tokens see all slots, in a
    packed row and with a sliding window too. Decoder-only models have "decoder" attention alone.

    Attributes:
        length: Slots of each attention.
        encoder: Whether the encoder's self-attention gets a prefix.
        decoder: Whether the decoder's self-attention gets one.
        cross: Whether the decoder's attention to the encoder's output gets one.
        counted: Whether the decoder's slots take the first positions, as in PEFT: targets (in
            decoder-only models, inputs) then start at position `length`, and T5's relative position
            bias reaches the slots. Otherwise slots have no position, and no bias.
    """

    name: str = "prefix"
    length: int = 20
    encoder: bool = True
    decoder: bool = True
    cross: bool = True
    counted: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 1:
            raise UserError(f"Prefix.length={self.length} must be at least 1.")
        if not any(getattr(self, switch) for switch in SITES):
            raise UserError(f"Prefix needs one of {', '.join(SITES)} to be True.")
        if self.counted and not self.decoder:
            raise UserError("Prefix.counted needs Prefix.decoder: only its slots have positions.")

    def kv(
        self,
        scope: nn.Module,
        blocks: Sequence[Keys],
        bias: Float[Array, "#batch #heads query key"],
    ) -> tuple[Sequence[Keys], Float[Array, "#batch #heads query longer"]]:
        sites = {site for switch, site in SITES.items() if getattr(self, switch)}
        if scope.path[-1] not in sites:
            return blocks, bias
        like = blocks[0]["key"]  # [batch, part, heads, head_dim]
        slots = _Slots((self.length, *like.shape[2:]), name=self.name)()
        mine = {
            part: jnp.broadcast_to(leaf.astype(like.dtype), (like.shape[0], *leaf.shape))
            for part, leaf in slots.items()
        }
        blocks, missing = [mine, *blocks], self.length
        if self.counted and scope.path[-1] == SITES["decoder"]:
            # Relative positions give the slots a bias of their own.
            missing = max(0, sum(block["key"].shape[1] for block in blocks) - bias.shape[-1])
        return blocks, jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (missing, 0)))

    def decoder_slots(self) -> int:
        return self.length if self.counted else 0


class _Slots(nn.Module):
    """The parameters of one attention's prefix, drawn as PEFT draws them."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        init: Any = with_axes(nn.initializers.normal(1.0), "prompt", "heads", "kv")
        return {name: self.param(name, init, self.shape, jnp.float32) for name in ("key", "value")}
