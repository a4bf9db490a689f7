"""Norm. Avg.: one number for many tasks (ProMoT, section 5.1)."""

from collections.abc import Sequence

import numpy as np

from robust_ft.errors import UserError


def norm_avg(scores: Sequence[float]) -> float:
    """Mean of the preferred metric of each task, each on a scale of 0 to 100.

    The paper normalises to [0, 100] by scale alone: no random baseline is subtracted, and its
    tables are the plain mean of their columns.

    Raises:
        UserError: No scores, or a score that is not a number from 0 to 100.
    """
    if len(scores) == 0:
        raise UserError("norm_avg: there are no scores to average.")
    for score in scores:
        if not 0 <= score <= 100:  # also false for NaN
            raise UserError(f"norm_avg: scores must be from 0 to 100, not {score}.")
    return float(np.mean(scores))
