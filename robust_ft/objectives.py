"""Objectives: rules from logits to loss, as sums over the positions that count."""

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robust_ft.blocked_loss import Statistics, statistics
from robust_ft.errors import UserError
from robust_ft.models.model import Model
from robust_ft.types import Batch, Params, Sums


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Teacher:
    """A model that another one learns from.

    A pytree of its parameters, so that it goes into a jitted step as one argument.

    Attributes:
        model: The model with its PEFT methods, as after training.
        params: All of its parameters.
    """

    model: Model = dataclasses.field(metadata={"static": True})
    params: Params


class Objective(Protocol):
    """A frozen dataclass of the loss's settings."""

    def __call__(
        self,
        model: Model,
        params: Params,
        batch: Batch,
        rng: jax.Array | None,
        teacher: Teacher | None = None,
    ) -> tuple[Float[Array, ""], Float[Array, ""], Sums]:
        """Returns the loss summed over target positions, their summed weights, and other sums.

        Args:
            model: What turns parameters and a batch into logits.
            params: All parameters.
            batch: `decoder_loss_weights` says which target positions count.
            rng: A key for dropout, or None for none.
            teacher: Whom the model learns from, for objectives that have one.
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
        teacher: Teacher | None = None,
    ) -> tuple[Float[Array, ""], Float[Array, ""], Sums]:
        del teacher
        found = statistics(model, params, batch, rng)
        loss, z_loss = self.losses(found, model.config.vocab_size)
        weights = batch["decoder_loss_weights"]
        sums = _sums(batch, z_loss=z_loss, token_accuracy=_correct(found, batch))
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


@dataclasses.dataclass(frozen=True)
class Cocktail:
    """Cross entropy mixed with distillation from a teacher (Ensembles and Cocktails, section 7.1).

    At each target position, weight * KL(teacher || student) + (1 - weight) * cross entropy (eq. 6).

    Attributes:
        teacher_weight: The paper's lambda. At 0 this is `cross_entropy`, and no teacher runs; at 1
            the targets only say which positions count.
        temperature: What both models' logits are divided by before the divergence is taken; 1 in
            the paper. The loss has the divergence times its square, because its gradient shrinks
            by as much (Hinton et al., 2015, section 2).
        cross_entropy: Its label smoothing goes into the cross entropy, its z-loss is added.
    """

    teacher_weight: float = 0.5
    temperature: float = 1.0
    cross_entropy: CrossEntropy = CrossEntropy()

    def __post_init__(self) -> None:
        if not 0 <= self.teacher_weight <= 1:
            raise UserError(
                f"Cocktail.teacher_weight={self.teacher_weight} must be from 0 (only cross "
                "entropy) to 1 (only the teacher)."
            )
        if not self.temperature > 0:
            raise UserError(f"Cocktail.temperature={self.temperature} must be above 0.")

    def __call__(
        self,
        model: Model,
        params: Params,
        batch: Batch,
        rng: jax.Array | None,
        teacher: Teacher | None = None,
    ) -> tuple[Float[Array, ""], Float[Array, ""], Sums]:
        if not self.teacher_weight:
            return self.cross_entropy(model, params, batch, rng)
        if teacher is None:
            raise UserError("Cocktail needs a teacher; set Stage.teacher='stage:NAME'.")
        pair = (teacher.model, teacher.params)
        found = statistics(model, params, batch, rng, pair, self.temperature)
        hard, z_loss = self.cross_entropy.losses(found, model.config.vocab_size)
        soft = found.divergence * self.temperature**2
        loss = self.teacher_weight * soft + (1 - self.teacher_weight) * hard + z_loss
        weights = batch["decoder_loss_weights"]
        sums = _sums(
            batch,
            kl=found.divergence,
            cross_entropy=hard,
            z_loss=z_loss,
            token_accuracy=_correct(found, batch),
        )
        return jnp.sum(loss * weights), jnp.sum(weights), sums


def _correct(found: Statistics, batch: Batch) -> Float[Array, "batch target"]:
    return (found.target >= found.top).astype(jnp.float32)


def _sums(batch: Batch, **values: Float[Array, "batch target"]) -> Sums:
    """Returns the sums of what is at each target position, as these are weighted."""
    weights = batch["decoder_loss_weights"]
    return {name: jnp.sum(value * weights) for name, value in values.items()}


def _entropy_of_smoothed(label_smoothing: float, others: int) -> float:
    kept = 1.0 - label_smoothing
    each = math.log(label_smoothing) - math.log(others)
    return -kept * math.log(kept) - label_smoothing * each
