"""The mixture weight lambda of ensembles and cocktails, and the selection of it.

Only in-distribution validation scores are used: out-of-distribution data are unknown when a model
is selected (Ensembles and Cocktails, section 6.1).
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

    Ties go to the weight nearest to 1/2: where the models disagree, their mean errs less than
    either, so one model alone has to be strictly better. Of two weights equally near, the larger
    wins: it favours the lightweight model, which is closest to the pretrained one. NaN is the worst
    score.

    Args:
        validation_scores: The score on in-distribution validation data, higher is better, of each
            lambda from 0 (the full model) to 1 (the lightweight model).

    Raises:
        UserError: There are no scores, or a weight is not in [0, 1].
    """
    check_weights("select", tuple(validation_scores))
    scores = {w: -math.inf if math.isnan(s) else s for w, s in validation_scores.items()}
    return max(scores, key=lambda w: (scores[w], -abs(w - 0.5), w))


def check_weights(place: str, weights: Sequence[float]) -> None:
    """Raises a UserError unless there are weights, all in [0, 1] and none twice.

    Args:
        place: What has the weights, for the error message.
        weights: The lambdas.
    """
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
    """One lambda and the result of its model.

    Attributes:
        weight: lambda.
        score: The score on the in-distribution validation split.
        folder: The folder of its outputs (`inference_eval`), relative to MODEL_DIR.
        step: The step of its checkpoint; of an ensemble, that of the full model's.
    """

    weight: float
    score: float
    folder: str
    step: int


@dataclasses.dataclass(frozen=True)
class SelectedWeight:
    """The result of a selection, as `<name>/selection.json` holds it.

    Attributes:
        weight: The selected lambda.
        candidates: One for each lambda that was tried.
        members: Of an ensemble, the stages that decode together; lambda is the first one's weight.
    """

    weight: float
    candidates: tuple[Candidate, ...]
    members: tuple[str, ...] = ()

    @classmethod
    def of(cls, candidates: Sequence[Candidate], members: Sequence[str] = ()) -> "SelectedWeight":
        weight = select({c.weight: c.score for c in candidates})
        return cls(weight, tuple(candidates), tuple(members))

    @property
    def selected(self) -> Candidate:
        return next(c for c in self.candidates if c.weight == self.weight)

    @classmethod
    def read(cls, directory: Path) -> "SelectedWeight | None":
        """Returns the selected weight that a folder holds, None if nothing was selected yet."""
        for file in (directory / FILE, directory / _EARLIER_FILE):
            if (fields := read_json(file, default=None)) is not None:
                candidates = tuple(Candidate(**c) for c in fields["candidates"])
                return cls(fields["weight"], candidates, tuple(fields.get("members", ())))
        return None
