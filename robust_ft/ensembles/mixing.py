"""The mixing step of an ensemble: a weighted mean of probabilities at every token."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from robust_ft.decoding.types import Cache, StepFn
from robust_ft.errors import UserError

# Rounding error allowed in a sum of weights that must be 1.
TOLERANCE = 1e-6


def mixed(
    log_probs: Sequence[Float[Array, "*rest vocab"]], weights: Float[Array, "members"]
) -> Float[Array, "*rest vocab"]:
    """Returns log(sum_i w_i p_i) ("Ensembles and Cocktails", section 6, eq. 4).

    Args:
        log_probs: log p_i of each member.
        weights: w_i, from 0 to 1, with the sum 1. An array, so that one compiled program serves
            all weights.
    """
    # log 0 = -inf: a member of weight 0 adds exp(-inf) = 0, and the others stay as they are.
    weighted = [log_p + log_w for log_p, log_w in zip(log_probs, jnp.log(weights), strict=True)]
    return jax.nn.logsumexp(jnp.stack(weighted), axis=0)  # [members, ..., vocab] -> [..., vocab]


def ensemble(step_fns: Sequence[StepFn], weights: Float[Array, "members"]) -> StepFn:
    """Returns the decode step of an ensemble, over the tuple of its members' caches.

    All members read the token that the ensemble has chosen, so greedy decoding, sampling and beam
    search need not know that there are several models.

    Args:
        step_fns: Each member's decode step.
        weights: As for `mixed`.
    """

    def step(
        caches: tuple[Cache, ...], tokens: Int[Array, "batch"]
    ) -> tuple[Float[Array, "batch vocab"], tuple[Cache, ...]]:
        steps = [step_fn(cache, tokens) for step_fn, cache in zip(step_fns, caches, strict=True)]
        log_probs, caches = zip(*steps, strict=True)
        return mixed(log_probs, weights), caches

    return step


def check_weights(weights: Sequence[float], members: int) -> tuple[float, ...]:
    """Returns the weights of an ensemble's members as floats.

    Raises:
        UserError: There are no members, not one weight for each of them, a weight is not from 0 to
            1, or their sum is not 1.
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
