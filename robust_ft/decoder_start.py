"""Where a target begins: the decoder's first input token, for every family.

An encoder-decoder's decoder starts with a token of its own. A decoder-only model reads [input;
target] and nothing between, so its first "decoder input" is the input's last token: it predicts the
target's first. A separator between the two is a decoder's own first token again. All batches, of
training, evaluation and decoding, get theirs from here.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from robust_ft.types import AnyArray


@dataclasses.dataclass(frozen=True)
class DecoderStart:
    """How the decoder's first input token is found.

    Attributes:
        token: The first token; if `continues`, only where the input has none.
        continues: Whether it is the input's last token, which is then not read with the input.
    """

    token: int = 0
    continues: bool = False

    def split(self, inputs: Int[np.ndarray, " inputs"]) -> tuple[Int[np.ndarray, " read"], int]:
        """Returns what of an input is read before the decoder's first token, and that token."""
        if self.continues and len(inputs):
            return inputs[:-1], int(inputs[-1])
        return inputs, self.token

    def split_rows(
        self, tokens: Int[AnyArray, "batch source"], mask: Bool[AnyArray, "batch source"]
    ) -> tuple[Bool[AnyArray, "batch source"], Int[Array, "batch"]]:
        """Does the same for padded inputs, on devices: what is not read leaves the mask.

        Args:
            tokens: The inputs.
            mask: Which of them are tokens, and not padding.

        Returns:
            The mask of what is read before the decoder's first token, and that token of each row.
        """
        if not self.continues:
            return mask, jnp.full(tokens.shape[0], self.token, jnp.int32)
        numbers = jnp.arange(1, tokens.shape[1] + 1)[None]  # [1, source], from 1
        # [batch, 1], 0 if there is none
        last = jnp.max(jnp.where(mask, numbers, 0), axis=1, keepdims=True, initial=0)
        is_last = numbers == last  # [batch, source]
        first = jnp.sum(jnp.where(is_last, tokens, 0), axis=1).astype(jnp.int32)
        return mask & ~is_last, jnp.where(last[:, 0] > 0, first, self.token)
