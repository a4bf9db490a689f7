"""Ensembles: the probabilities of several models mixed at every token."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from robust_ft.decoding.types import Cache, StepFn
from robust_ft.errors import UserError

# How far float sums of weights may be from 1.
TOLERANCE = 1e-6


def mixed(
    log_probs: Sequence[Float[Array, "*rest vocab"]], weights: Float[Array, " members"]
) -> Float[Array, "*rest vocab"]:
    """Returns log(sum_i w_i p_i), the ensemble of "Ensembles and Cocktails", section 6.

    Args:
      log_probs: log p_i of each member.
      weights: w_i, from 0 to 1, with the sum 1. A traced array, so that one compiled program serves
        all of them. A member of weight 0 changes nothing, and with weight 1 is alone.
    """
    weighted = [each + log for each, log in zip(log_probs, jnp.log(weights), strict=True)]
    return jax.nn.logsumexp(jnp.stack(weighted), axis=0)


def ensemble(step_fns: Sequence[StepFn], weights: Float[Array, " members"]) -> StepFn:
    """Returns the step of an ensemble over the tuple of its members' caches.

    All members read the same tokens, those that the ensemble has chosen, so that decoding need not
    know that there are several. Arguments as for `mixed`.
    """

    def step(cache: Cache, tokens: Int[Array, " batch"]) -> tuple[Array, Cache]:
        found = [fn(each, tokens) for fn, each in zip(step_fns, cache, strict=True)]
        return mixed([log_probs for log_probs, _ in found], weights), tuple(c for _, c in found)

    return step


def check_weights(weights: Sequence[float], members: int) -> tuple[float, ...]:
    """Returns the weights of an ensemble's members.

    Raises:
        UserError: There are none, more or fewer than members, one is not from 0 to 1, or their sum
            is not 1.
    """
    if not members:
        raise UserError("An ensemble needs at least one member.")
    if len(weights) != members:
        raise UserError(f"An ensemble of {members} members needs {members} weights, not {weights}.")
    for weight in weights:
        if not 0 <= weight <= 1:
            raise UserError(f"Weights of an ensemble must be from 0 to 1, not {weight}.")
    if abs(sum(weights) - 1) > TOLERANCE:
        raise UserError(f"Weights of an ensemble must sum to 1, not {sum(weights):g}.")
    return tuple(float(weight) for weight in weights)
