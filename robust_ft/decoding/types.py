"""The types of decoding: a model's decode step, logits processors and decoded sequences."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from robust_ft.errors import Diverged

# A KV cache: a pytree of arrays, all [batch, ...].
Cache = Any

# A decode step: (cache, last token of each sequence) -> (log-probabilities of the next, cache).
# The returned cache has the structure, shapes and dtypes of the one that went in; positions are
# part of it. A leaf that does not change (encoder keys and values) is returned as it came in: beam
# search then does not reorder it.
StepFn = Callable[[Cache, Int[Array, "batch"]], tuple[Float[Array, "batch vocab"], Cache]]

# The id that ends a sequence, or several.
EosIds = int | Sequence[int]

# A logits processor: (log_probs, tokens generated so far, their number) -> log_probs, called at
# every step. `tokens` is padded to the maximum length; only the first `number` columns count. It
# may lower log-probabilities (to -inf to ban a token) but not raise one above 0. In beam search the
# batch is batch * beam: the beams of an example are consecutive rows.
ProcessFn = Callable[
    [Float[Array, "batch vocab"], Int[Array, "batch length"], Int[Array, ""]],
    Float[Array, "batch vocab"],
]


class NotANumber(Diverged):
    """A model gives NaN in place of probabilities.

    Attributes:
        row: The first row of the batch, or input, for which it does.
    """

    def __init__(self, row: int, what: str):
        super().__init__(
            f"The model gives NaN in place of probabilities for {what}: its parameters are broken, "
            "as after a training that diverged, or overflow its dtype; take another checkpoint, or "
            "dtype='float32'."
        )
        self.row = row


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoded:
    """Decoded sequences, the best first.

    Attributes:
        tokens: Generated tokens with the token that ended them, then padding; no start token.
        scores: Sums of log-probabilities, in beam search divided by the length penalty; -inf, with
            tokens that are all padding, if there are fewer than num_return sequences; NaN if the
            model's log-probabilities were NaN at any step, whatever the tokens.
    """

    tokens: Int[Array, "batch num_return length"]
    scores: Float[Array, "batch num_return"]


def is_nan(log_probs: Float[Array, "*rest vocab"]) -> Bool[Array, "*rest"]:
    """Returns where a model's log-probabilities are NaN.

    They are normalized, so all of a position are NaN or none is. -inf is no NaN: a token may have
    no probability, as processors want it for some.
    """
    return jnp.isnan(log_probs[..., 0])


def ends(tokens: Int[Array, "*rest"], eos_id: EosIds) -> Bool[Array, "*rest"]:
    """Returns which tokens end a sequence."""
    return jnp.isin(tokens, jnp.atleast_1d(jnp.asarray(eos_id, tokens.dtype)))


def repeat_rows(tree: Any, times: int) -> Any:
    """Returns `tree` with each row of every leaf repeated: [batch, ...] -> [batch * times, ...]."""
    if times == 1:
        return tree
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, times, axis=0), tree)
