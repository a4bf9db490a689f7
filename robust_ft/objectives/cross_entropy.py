"""Cross-entropy of the target tokens."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robust_ft.errors import UserError
from robust_ft.models.model import Model
from robust_ft.objectives.base import LossSums, Objective, Teacher, weighted_sums
from robust_ft.objectives.chunked_loss import LogitStatistics, logit_statistics
from robust_ft.objectives.token_weights import TokenWeights
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
        token_weights: A rule by which some target tokens count less; None counts all.
    """

    label_smoothing: Rate = 0.0
    z_loss: NonNegative = 0.0
    token_weights: TokenWeights | None = None

    @property
    def takes_teacher(self) -> bool:
        return self.token_weights is not None and self.token_weights.takes_teacher

    @property
    def needs_teacher(self) -> bool:
        return self.takes_teacher

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
        statistics = logit_statistics(model, params, batch, rng, top=self._top)
        batch, loss, z_loss, metrics = self._weighted(model, batch, statistics, teacher)
        return weighted_sums(batch, loss + z_loss, z_loss=z_loss, **metrics)

    def with_divergence(
        self,
        model: Model,
        params: Params,
        batch: Batch,
        rng: jax.Array | None,
        teacher: Teacher,
        own_share: float,
        divergence_share: float,
        temperature: float = 1.0,
    ) -> LossSums:
        """Returns the sums of a mixture with KL(teacher || student), as an objective does.

        Args:
            model: The student.
            params: All of its parameters.
            batch: The batch.
            rng: A key for dropout, or None for none.
            teacher: The teacher.
            own_share: What the cross-entropy is multiplied by.
            divergence_share: What the divergence is multiplied by, beside the square of the
                temperature.
            temperature: Divides the logits of both models in the divergence.
        """
        statistics = logit_statistics(
            model, params, batch, rng, teacher, temperature, top=self._top
        )
        batch, loss, z_loss, metrics = self._weighted(model, batch, statistics, teacher)
        soft = statistics.kl * temperature**2
        return weighted_sums(
            batch,
            divergence_share * soft + own_share * loss + z_loss,
            **{"kl": statistics.kl, "cross_entropy": loss, "z_loss": z_loss} | metrics,
        )

    @property
    def _top(self) -> int:
        return 0 if self.token_weights is None else self.token_weights.top

    def _weighted(
        self, model: Model, batch: Batch, statistics: LogitStatistics, teacher: Teacher | None
    ) -> tuple[Batch, Float[Array, "*positions"], Float[Array, "*positions"], dict[str, jax.Array]]:
        """Returns (batch, cross-entropy, z-loss, metrics) under the rule of `token_weights`."""
        loss, z_loss = self.losses(statistics, model.config.vocab_size)
        metrics = {"token_accuracy": token_accuracy(statistics)}
        if self.token_weights is None:
            return batch, loss, z_loss, metrics
        of_teacher = None
        if self.token_weights.takes_teacher:
            if teacher is None:
                rule = type(self.token_weights).__name__
                raise UserError(f"{rule} needs a teacher; set Stage.teacher='pretrained'.")
            of_teacher = logit_statistics(teacher.model, teacher.params, batch, None)
        weights = self.token_weights(batch, statistics, of_teacher)
        weights = jax.lax.stop_gradient(weights)  # [batch, target]
        metrics["cross_entropy"] = loss
        if self.token_weights.masks:
            counted = batch["decoder_loss_weights"] * weights
            return {**batch, "decoder_loss_weights": counted}, loss, z_loss, metrics
        return batch, weights * loss, z_loss, metrics | {"token_weight": weights}

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


def cross_entropy_of(objective: Objective) -> CrossEntropy | None:
    """Returns the cross-entropy that an objective is, or that is a part of it; else None."""
    part = getattr(objective, "cross_entropy", objective)
    return part if isinstance(part, CrossEntropy) else None


def token_accuracy(statistics: LogitStatistics) -> Float[Array, "*positions"]:
    """Returns 1 where the target has the largest logit, else 0."""
    return (statistics.target_logit >= statistics.max_logit).astype(jnp.float32)


def _entropy_of_smoothed(label_smoothing: float, others: int) -> float:
    target_prob = 1.0 - label_smoothing
    other_log_prob = math.log(label_smoothing) - math.log(others)
    return -target_prob * math.log(target_prob) - label_smoothing * other_log_prob
