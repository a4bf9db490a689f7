"""The mixture weight lambda of ensembles and cocktails, and the selection of it.

The selection sees in-distribution validation scores and nothing else: data from elsewhere is not to
be had when a model is selected (Ensembles and Cocktails, section 6.1).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from robust_ft.errors import UserError
from robust_ft.files import read_json

GRID = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
FILE = "selection.json"
_EARLIER_FILE = "choice.json"  # of runs before version 0.2


def select(validation_scores: Mapping[float, float]) -> float:
    """Returns the weight with the best in-distribution validation score.

    Of equal scores the one nearest to 1/2 wins: where the models disagree, a mean of both errs less
    than either, so one of them alone has to be strictly better. Of two equally near the larger one
    wins, which leans on the lightweight model: it has moved least from the pretrained one.

    Args:
        validation_scores: For each weight lambda, from 0 (the full model) to 1 (the lightweight
            one), the score on in-distribution validation data; more is better.

    Raises:
        UserError: There are no scores, a weight is not in [0, 1], or a score is not a number.
    """
    check_weights("select", tuple(validation_scores))
    for weight, score in validation_scores.items():
        if math.isnan(score):
            raise UserError(f"select: lambda {weight:g} has no validation score (it is NaN).")
    return max(validation_scores, key=lambda w: (validation_scores[w], -abs(w - 0.5), w))


def check_weights(place: str, weights: Sequence[float]) -> None:
    """Raises a UserError unless there are weights, all of them in [0, 1] and different."""
    if not weights:
        raise UserError(f"{place} needs at least one lambda, such as {GRID}.")
    for weight in weights:
        if not 0 <= weight <= 1:
            raise UserError(
                f"{place}: lambda={weight:g} must be from 0 (the full model alone) to 1 (the "
                "lightweight one alone)."
            )
    if len(set(weights)) < len(weights):
        raise UserError(f"{place} has a lambda twice: {', '.join(f'{w:g}' for w in weights)}.")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One weight, and what is known of its model.

    Attributes:
        weight: lambda.
        score: On the in-distribution validation split.
        folder: Where its outputs are (`inference_eval`), below MODEL_DIR.
        step: Of its checkpoint; of an ensemble's, that of the full model.
    """

    weight: float
    score: float
    folder: str
    step: int


@dataclasses.dataclass(frozen=True)
class SelectedWeight:
    """What `<name>/selection.json` holds.

    Attributes:
        weight: The chosen lambda.
        candidates: One for each weight.
    """

    weight: float
    candidates: tuple[Candidate, ...]

    @classmethod
    def of(cls, candidates: Sequence[Candidate]) -> "SelectedWeight":
        return cls(select({c.weight: c.score for c in candidates}), tuple(candidates))

    @property
    def selected(self) -> Candidate:
        return next(c for c in self.candidates if c.weight == self.weight)

    @classmethod
    def read(cls, directory: Path) -> "SelectedWeight | None":
        """Returns the selection in a folder, None if there is none yet."""
        for file in (directory / FILE, directory / _EARLIER_FILE):
            if (fields := read_json(file, default=None)) is not None:
                return cls(fields["weight"], tuple(Candidate(**c) for c in fields["candidates"]))
        return None
