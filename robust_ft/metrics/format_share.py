"""The share of outputs in the finetuned task's format: the measure of format specialization."""

import re
from collections.abc import Sequence

from robust_ft.errors import UserError


def format_share(outputs: Sequence[str], pattern: str) -> float:
    """Share of outputs that match the finetuned task's output format (ProMoT, section 3).

    Args:
        outputs: A model's outputs on any task.
        pattern: A regular expression for a whole output, space at its ends apart; for RTE
            "True|False".

    Returns:
        The share, 0..1.

    Raises:
        UserError: No outputs, or a pattern that is not a regular expression.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"format_share: '{pattern}' is not a regular expression ({error})."
        ) from None
    if len(outputs) == 0:
        raise UserError("format_share: there are no outputs to look at.")
    matches = sum(compiled.fullmatch(output.strip()) is not None for output in outputs)
    return matches / len(outputs)
