"""Cross-entropy of the target tokens."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robust_ft.models.model import Model
from robust_ft.objectives.base import LossSums, Teacher, weighted_sums
from robust_ft.objectives.chunked_loss import LogitStatistics, logit_statistics
from robust_ft.ranges import NonNegative, Rate, check_ranges
from robust_ft.types import Batch, Params


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of the target tokens, with label smoothing and z-loss as in T5.

    Attributes:
        label_smoothing: The probability s that is taken from the target token and spread over
            the other V - 1. The smoothed distribution's entropy is subtracted, so that the
            optimum stays 0.
        z_loss: Weight of log(Z)^2 at each position, which keeps the logits' scale near 0.
    """

    label_smoothing: Rate = 0.0
    z_loss: NonNegative = 0.0

    takes_teacher: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_ranges(self)

    def __call__(
        self,
        model: Model,
        params: Params,
        batch: Batch,
        rng: jax.Array | None,
        teacher: Teacher | None = None,
    ) -> LossSums:
        del teacher
        statistics = logit_statistics(model, params, batch, rng)
        loss, z_loss = self.losses(statistics, model.config.vocab_size)
        return weighted_sums(
            batch, loss + z_loss, z_loss=z_loss, token_accuracy=token_accuracy(statistics)
        )

    def losses(
        self, statistics: LogitStatistics, vocab_size: int
    ) -> tuple[Float[Array, "*positions"], Float[Array, "*positions"]]:
        """Returns (cross-entropy, z-loss) at each position."""
        log_z, target_logit = statistics.log_z, statistics.target_logit
        loss = log_z - target_logit
        if self.label_smoothing:
            others = vocab_size - 1
            low = self.label_smoothing / others
            # -sum_v q_v log p_v with q = 1 - s at the target and s / (V - 1) elsewhere.
            high = 1.0 - self.label_smoothing - low
            loss = log_z - high * target_logit - low * statistics.logit_sum
            loss -= _entropy_of_smoothed(self.label_smoothing, others)
        return loss, self.z_loss * jnp.square(log_z)


def token_accuracy(statistics: LogitStatistics) -> Float[Array, "*positions"]:
    """Returns 1 where the target has the largest logit, else 0."""
    return (statistics.target_logit >= statistics.max_logit).astype(jnp.float32)


def _entropy_of_smoothed(label_smoothing: float, others: int) -> float:
    target_prob = 1.0 - label_smoothing
    other_log_prob = math.log(label_smoothing) - math.log(others)
    return -target_prob * math.log(target_prob) - label_smoothing * other_log_prob
