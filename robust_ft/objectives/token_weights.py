"""Weights of target tokens in the cross-entropy: rules by which some tokens count less.

Each is a way to forget less: what the model finds unlikely moves it furthest. A weight has no
gradient.
"""

import dataclasses
import math
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robust_ft.errors import UserError
from robust_ft.objectives.chunked_loss import LogitStatistics
from robust_ft.ranges import Count, Positive, check_ranges
from robust_ft.types import Batch

Weights = Float[Array, "batch target"]


@runtime_checkable
class TokenWeights(Protocol):
    """A rule for the weights of target tokens: a frozen dataclass of its settings.

    Attributes:
        takes_teacher: Whether it reads the losses of the stage's teacher, the pretrained model.
        top: The number of largest logits whose entropy it reads, 0 for none.
        masks: Whether its weights go into those of the batch, so that a token of weight 0 does not
            count in the mean. Otherwise they only scale the loss: a mean is over all tokens.
    """

    @property
    def takes_teacher(self) -> bool: ...
    @property
    def top(self) -> int: ...
    @property
    def masks(self) -> bool: ...

    def __call__(
        self, batch: Batch, student: LogitStatistics, teacher: LogitStatistics | None
    ) -> Weights:
        """Returns the weight of each target position.

        Args:
            batch: The batch.
            student: What the model's logits are.
            teacher: Those of the teacher, if `takes_teacher`.
        """
        ...


@dataclasses.dataclass(frozen=True)
class _Rule:
    """What rules are unless they say otherwise."""

    takes_teacher: ClassVar[bool] = False
    top: ClassVar[int] = 0
    masks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True)
class Dft(_Rule):
    """The target's probability (DFT, Wu et al., 2025, arXiv:2508.05629).

    The loss is -sg(p) log p, whose gradient is that of -p.
    """

    def __call__(
        self, batch: Batch, student: LogitStatistics, teacher: LogitStatistics | None
    ) -> Weights:
        del batch, teacher
        return jnp.exp(-_losses(student))


@dataclasses.dataclass(frozen=True)
class Eaft(_Rule):
    """The entropy of the likeliest tokens (EAFT, Diao et al., 2026, arXiv:2601.02151).

    Where the model is sure of another token than the target, it learns little. The entropy is that
    of the softmax over the likeliest tokens alone, in nats, divided by `scale`, and at most 1.

    Attributes:
        top: Number of likeliest tokens.
        scale: About the largest entropy that they can have, which is log(top).
    """

    top: Count = 20  # type: ignore[misc]  # a setting here, a constant of other rules
    scale: Positive = 3.0

    def __call__(
        self, batch: Batch, student: LogitStatistics, teacher: LogitStatistics | None
    ) -> Weights:
        del batch, teacher
        return jnp.minimum(student.top_entropy / self.scale, 1.0)


@dataclasses.dataclass(frozen=True)
class Flow(_Rule):
    """exp(-l / tau), where l is the pretrained model's loss on the example (FLOW).

    Sanyal et al., 2025, arXiv:2502.02797: examples that are easy for the pretrained model count
    more. An example's loss is the mean over its target tokens, all of which get its weight.

    Attributes:
        tau: The scale of losses; None for their median, which is measured before the first step.
        examples: How many of the stage's examples the median is of, from the first one on.
    """

    tau: Positive | None = None
    examples: Count = 1024

    takes_teacher: ClassVar[bool] = True

    def __call__(
        self, batch: Batch, student: LogitStatistics, teacher: LogitStatistics | None
    ) -> Weights:
        del student
        if self.tau is None:
            raise UserError("Flow.tau=None is measured in a run only; set it to a loss.")
        assert teacher is not None
        return jnp.exp(-example_losses(batch, teacher) / self.tau)


@dataclasses.dataclass(frozen=True)
class Stm(_Rule):
    """1 where the pretrained model's perplexity is at most a threshold, else 0.

    Selective token masking (Wu et al., 2025, arXiv:2501.14315): tokens that the pretrained model
    finds unlikely are left out of the loss.

    Attributes:
        perplexity: The threshold of a token's perplexity, 1 / p; the default is this project's.
    """

    perplexity: Positive = 2.5

    takes_teacher: ClassVar[bool] = True
    masks: ClassVar[bool] = True

    def __call__(
        self, batch: Batch, student: LogitStatistics, teacher: LogitStatistics | None
    ) -> Weights:
        del batch, student
        assert teacher is not None
        return (_losses(teacher) <= math.log(self.perplexity)).astype(jnp.float32)


def example_losses(batch: Batch, statistics: LogitStatistics) -> Weights:
    """Returns each position's example's loss, the mean over its target tokens.

    In a packed row, segments are examples.
    """
    counts = jnp.asarray(batch["decoder_loss_weights"])  # [batch, target]
    segments = jnp.asarray(batch.get("decoder_segment_ids", jnp.ones_like(counts)))
    same = (segments[:, :, None] == segments[:, None]).astype(
        jnp.float32
    )  # [batch, target, target]
    sums, weights = (
        jnp.einsum("bts,bs->bt", same, values, precision=jax.lax.Precision.HIGHEST)
        for values in (_losses(statistics) * counts, counts)
    )
    return sums / jnp.where(weights > 0, weights, 1.0)


def _losses(statistics: LogitStatistics) -> Weights:
    return statistics.log_z - statistics.target_logit
