"""References and predictions of each example, checked and in one form."""

from collections.abc import Sequence
from typing import Any

from robust_ft.errors import UserError

References = Sequence[str] | Sequence[Sequence[str]]
"""One reference for each prediction, or several."""


def pairs(
    name: str, targets: References, predictions: Sequence[str]
) -> list[tuple[tuple[str, ...], str]]:
    """Returns (references, prediction) for each example.

    Args:
        name: The metric, named in errors.
        targets: A string or a non-empty sequence of strings for each example.
        predictions: A string for each example.

    Raises:
        UserError: No examples, different numbers of them, or an example without a reference.
    """
    if len(targets) != len(predictions):
        raise UserError(
            f"{name}: {len(predictions)} predictions cannot be compared with "
            f"{len(targets)} targets."
        )
    if not predictions:
        raise UserError(f"{name}: there are no predictions to score.")
    result = []
    for index, (target, prediction) in enumerate(zip(targets, predictions, strict=True)):
        references = (target,) if isinstance(target, str) else tuple(target)
        if not references:
            raise UserError(f"{name}: example {index} has no reference.")
        result.append((references, prediction))
    return result


def streams(examples: Sequence[tuple[tuple[str, ...], str]]) -> list[list[Any]]:
    """Returns references as sacrebleu takes them: first ones, second ones, ...; None for none.

    (Its annotations know of no None, its documentation does.)
    """
    width = max(len(references) for references, _ in examples)
    return [
        [references[i] if i < len(references) else None for references, _ in examples]
        for i in range(width)
    ]
