"""Cross-entropy mixed with distillation from a teacher."""

import dataclasses
from typing import ClassVar

import jax

from robust_ft.errors import UserError
from robust_ft.models.model import Model
from robust_ft.objectives.base import LossSums, Teacher
from robust_ft.objectives.cross_entropy import CrossEntropy
from robust_ft.ranges import Positive, Share, check_ranges
from robust_ft.types import Batch, Params


@dataclasses.dataclass(frozen=True)
class Cocktail:
    """Cross-entropy mixed with distillation from a teacher (Ensembles and Cocktails, section 7.1).

    At each target position, weight * KL(teacher || student) + (1 - weight) * cross-entropy (eq. 6).

    Attributes:
        teacher_weight: The paper's lambda. At 0 this is `cross_entropy`, and no teacher runs; at 1
            the targets only say which positions count.
        temperature: Divides the logits of both models in the KL divergence; 1 in the paper. The
            divergence is multiplied by its square, since its gradient shrinks by as much (Hinton
            et al., 2015, section 2).
        cross_entropy: Its label smoothing and token weights go into the cross-entropy, its z-loss
            is added.
    """

    teacher_weight: Share = 0.5
    temperature: Positive = 1.0
    cross_entropy: CrossEntropy = CrossEntropy()

    takes_teacher: ClassVar[bool] = True

    @property
    def needs_teacher(self) -> bool:
        return self.teacher_weight > 0 or self.cross_entropy.needs_teacher

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
        if not self.teacher_weight:
            return self.cross_entropy(model, params, batch, rng, teacher)
        if teacher is None:
            raise UserError("Cocktail needs a teacher; set Stage.teacher='stage:NAME'.")
        return self.cross_entropy.with_divergence(
            model,
            params,
            batch,
            rng,
            teacher,
            own_share=1 - self.teacher_weight,
            divergence_share=self.teacher_weight,
            temperature=self.temperature,
        )
