"""Objectives: rules from logits to loss, as sums over the positions that count."""

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from robust_ft.errors import UserError
from robust_ft.models.model import Model
from robust_ft.types import Batch, Params, Sums


class Objective(Protocol):
    """A frozen dataclass of the loss's settings."""

    def __call__(
        self,
        model: Model,
        params: Params,
        batch: Batch,
        rng: jax.Array | None,
        teacher: Params | None = None,
    ) -> tuple[Float[Array, ""], Float[Array, ""], Sums]:
        """Returns the loss summed over target positions, their summed weights, and other sums.

        Args:
            model: What turns parameters and a batch into logits.
            params: All parameters.
            batch: `decoder_loss_weights` says which target positions count.
            rng: A key for dropout, or None for none.
            teacher: All parameters of a teacher, for objectives that have one.
        """
        ...


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Cross entropy of the target tokens, with label smoothing and z-loss as in T5.

    Attributes:
        label_smoothing: The probability s that is taken from the target token and spread over
            the other V - 1. The smallest value that this loss can reach is subtracted, so that
            0 stays the optimum.
        z_loss: Weight of log(Z)^2 at each position, which keeps the logits' scale near 0.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"CrossEntropy.label_smoothing={self.label_smoothing} must be from 0 to below 1."
            )
        if self.z_loss < 0:
            raise UserError(f"CrossEntropy.z_loss={self.z_loss} must not be negative.")

    def __call__(
        self,
        model: Model,
        params: Params,
        batch: Batch,
        rng: jax.Array | None,
        teacher: Params | None = None,
    ) -> tuple[Float[Array, ""], Float[Array, ""], Sums]:
        del teacher
        logits = model.logits(params, batch, rng)
        targets, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
        loss, z_loss = smoothed_cross_entropy(logits, targets, self.label_smoothing, self.z_loss)
        correct = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
        sums = {"z_loss": jnp.sum(z_loss * weights), "token_accuracy": jnp.sum(correct * weights)}
        return jnp.sum((loss + z_loss) * weights), jnp.sum(weights), sums


def smoothed_cross_entropy(
    logits: Float[Array, "*rest vocab"],
    targets: Int[Array, "*rest"],
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Float[Array, "*rest"], Float[Array, "*rest"]]:
    """Returns (cross entropy, z-loss) at each position, both float32."""
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = log_z - target_logits
    if label_smoothing:
        others = logits.shape[-1] - 1
        low = label_smoothing / others
        # -sum_v q_v log p_v with q = 1 - s at the target and s / (V - 1) elsewhere.
        loss = (
            log_z - (1.0 - label_smoothing - low) * target_logits - low * jnp.sum(logits, axis=-1)
        )
        loss -= _entropy_of_smoothed(label_smoothing, others)
    return loss, z_loss * jnp.square(log_z)


def _entropy_of_smoothed(label_smoothing: float, others: int) -> float:
    kept = 1.0 - label_smoothing
    return -kept * math.log(kept) - label_smoothing * math.log(label_smoothing / others)
