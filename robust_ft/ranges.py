"""Ranges of numbers: they stand in a setting's annotation, and are checked before anything runs.

```python
@dataclasses.dataclass(frozen=True)
class Settings:
    steps: Count
    dropout_rate: Rate = 0.1

    def __post_init__(self) -> None:
        check_ranges(self)
```
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from robust_ft.errors import UserError


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a setting may be, which are never NaN nor infinite.

    Attributes:
        least: The smallest one.
        most: The largest one.
        above: All are larger.
        below: All are smaller.
    """

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, number: float) -> bool:
        inside = self.least <= number <= self.most and self.above < number < self.below
        return inside and math.isfinite(number)

    def __str__(self) -> str:
        if math.isfinite(self.least) and math.isfinite(self.most):
            return f"from {self.least:g} to {self.most:g}"
        limits = {
            "at least": self.least,
            "above": self.above,
            "at most": self.most,
            "below": self.below,
        }
        words = [f"{word} {limit:g}" for word, limit in limits.items() if math.isfinite(limit)]
        return " and ".join(words) or "a finite number"


Integer = Annotated[int, Range()]
Whole = Annotated[int, Range(least=0)]
Count = Annotated[int, Range(least=1)]
Real = Annotated[float, Range()]
NonNegative = Annotated[float, Range(least=0)]
Positive = Annotated[float, Range(above=0)]
Share = Annotated[float, Range(least=0, most=1)]
# Of dropout, of decay: 1 would leave nothing.
Rate = Annotated[float, Range(least=0, below=1)]


def check_ranges(settings: object, of: str = "") -> None:
    """Raises a UserError if a number of a dataclass is outside of its range.

    Args:
        settings: A dataclass; numbers in its sequences count too.
        of: What it belongs to, for the error message, such as " of stage 'prompt'".
    """
    owner: type = type(settings)
    for field, (numbers, words) in _ranges(owner).items():
        check(f"{owner.__name__}.{field}", getattr(settings, field), numbers, words, of)


def check(name: str, value: Any, numbers: Range, words: str = "", of: str = "") -> None:
    """Raises a UserError if a number, or one of several, is outside of a range.

    Args:
        name: The setting's, such as "Stage.steps".
        value: A number, a sequence of numbers, or anything else, which passes.
        numbers: Its range.
        words: The range in words; by default as it prints.
        of: As for `check_ranges`.
    """
    for number in value if isinstance(value, Sequence) else [value]:
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if is_number and number not in numbers:
            raise UserError(f"{name}={number!r}{of} must be {words or numbers}.")


@functools.cache
def _ranges(owner: Any) -> Mapping[str, tuple[Range, str]]:
    """Returns each field's range, and the range in words."""
    return {
        field.name: (found, in_words(field.type))
        for field in dataclasses.fields(owner)
        if (found := range_of(field.type)) is not None
    }


def range_of(annotation: Any) -> Range | None:
    """Returns the range that an annotation holds, such as `Count | None` or `Sequence[Share]`."""
    if typing.get_origin(annotation) is Annotated:
        return next((each for each in annotation.__metadata__ if isinstance(each, Range)), None)
    found = map(range_of, typing.get_args(annotation))
    return next((each for each in found if each is not None), None)


def in_words(annotation: Any) -> str:
    """Returns the values of an annotation with a range in words, "" without one."""
    numbers = range_of(annotation)
    if numbers is None:
        return ""
    is_optional = types.NoneType in typing.get_args(annotation)
    return f"{numbers}, or None" if is_optional else str(numbers)
