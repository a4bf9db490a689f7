"""Cross entropy of the target tokens."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robust_ft.errors import UserError
from robust_ft.models.model import Model
from robust_ft.objectives.base import Teacher
from robust_ft.objectives.chunked_loss import Statistics, statistics
from robust_ft.types import Batch, Params, Sums


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

    takes_teacher: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = False

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
        teacher: Teacher | None = None,
    ) -> tuple[Float[Array, ""], Float[Array, ""], Sums]:
        del teacher
        found = statistics(model, params, batch, rng)
        loss, z_loss = self.losses(found, model.config.vocab_size)
        weights = batch["decoder_loss_weights"]
        sums = weighted_sums(batch, z_loss=z_loss, token_accuracy=correct(found, batch))
        return jnp.sum((loss + z_loss) * weights), jnp.sum(weights), sums

    def losses(
        self, found: Statistics, vocab_size: int
    ) -> tuple[Float[Array, "*rest"], Float[Array, "*rest"]]:
        """Returns (cross entropy, z-loss) at each position."""
        loss = found.log_z - found.target
        if self.label_smoothing:
            others = vocab_size - 1
            low = self.label_smoothing / others
            # -sum_v q_v log p_v with q = 1 - s at the target and s / (V - 1) elsewhere.
            loss = (
                found.log_z - (1.0 - self.label_smoothing - low) * found.target - low * found.total
            )
            loss -= _entropy_of_smoothed(self.label_smoothing, others)
        return loss, self.z_loss * jnp.square(found.log_z)


def correct(found: Statistics, batch: Batch) -> Float[Array, "batch target"]:
    return (found.target >= found.top).astype(jnp.float32)


def weighted_sums(batch: Batch, **values: Float[Array, "batch target"]) -> Sums:
    """Returns the sums of what is at each target position, as these are weighted."""
    weights = batch["decoder_loss_weights"]
    return {name: jnp.sum(value * weights) for name, value in values.items()}


def _entropy_of_smoothed(label_smoothing: float, others: int) -> float:
    kept = 1.0 - label_smoothing
    each = math.log(label_smoothing) - math.log(others)
    return -kept * math.log(kept) - label_smoothing * each
