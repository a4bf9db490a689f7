"""Replay: a share of other examples among a stage's own."""

import dataclasses
from fractions import Fraction
from typing import Annotated

from robust_ft.data.cache import TaskData
from robust_ft.ranges import Range, check_ranges


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay:
    """Other examples that are mixed into a stage's, so that what they are about is not forgotten.

    A little of what the model was pretrained on is enough (Bethune et al., 2025, arXiv:2502.06042);
    text that it has written itself serves as well (Marek et al., 2026, arXiv:2605.26097).

    Attributes:
        data: Where they come from: a task, a mixture, or a task in files.
        share: Their share of all examples, which is exact: of 0.05 every 20th example is one.
        prompts: Whether their rows keep the model's soft prompts, which belong to the stage's task.
    """

    data: TaskData
    share: Annotated[float, Range(above=0, below=1)] = 0.05
    prompts: bool = False

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def rates(self) -> tuple[int, int]:
        """How many of how many examples they are, and all others: (1, 19) for a share of 0.05."""
        share = Fraction(repr(float(self.share)))
        return share.numerator, share.denominator - share.numerator

    def widened(self, data: TaskData) -> TaskData:
        """Returns a stage's data with the lengths that its rows need to hold both."""
        return dataclasses.replace(
            data,
            inputs_length=max(data.inputs_length, self.data.inputs_length),
            targets_length=max(data.targets_length, self.data.targets_length),
        )
