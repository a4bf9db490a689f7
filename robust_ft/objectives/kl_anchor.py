"""Cross-entropy anchored to the pretrained model."""

import dataclasses
from typing import ClassVar

import jax

from robust_ft.errors import UserError
from robust_ft.models.model import Model
from robust_ft.objectives.base import LossSums, Teacher
from robust_ft.objectives.cross_entropy import CrossEntropy
from robust_ft.ranges import NonNegative, check_ranges
from robust_ft.types import Batch, Params


@dataclasses.dataclass(frozen=True)
class KlAnchor:
    """Cross-entropy + weight * KL(teacher || student) at each target position of the target's data.

    The teacher is the pretrained model, `Stage.teacher='pretrained'`. With `token_weights=Dft()` in
    the cross-entropy this is ASFT (Zhu et al., 2025, arXiv:2509.23753).

    Attributes:
        weight: Of the divergence. At 0 this is `cross_entropy`, and the divergence is not computed.
        cross_entropy: Its label smoothing, z-loss and token weights, which the divergence has not.
    """

    weight: NonNegative = 0.1
    cross_entropy: CrossEntropy = CrossEntropy()

    takes_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def needs_teacher(self) -> bool:
        return self.weight > 0 or self.cross_entropy.needs_teacher

    def __call__(
        self,
        model: Model,
        params: Params,
        batch: Batch,
        rng: jax.Array | None,
        teacher: Teacher | None = None,
    ) -> LossSums:
        if not self.weight:
            return self.cross_entropy(model, params, batch, rng, teacher)
        if teacher is None:
            raise UserError("KlAnchor needs a teacher; set Stage.teacher='pretrained'.")
        return self.cross_entropy.with_divergence(
            model, params, batch, rng, teacher, own_share=1.0, divergence_share=self.weight
        )
