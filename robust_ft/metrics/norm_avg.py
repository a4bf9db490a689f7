"""Norm. Avg.: one number for many tasks (ProMoT, section 5.1)."""

from collections.abc import Sequence

import numpy as np

from robust_ft.errors import UserError


def norm_avg(scores: Sequence[float]) -> float:
    """Mean of the preferred metric of each task, each on a scale of 0 to 100.

    The paper normalises to [0, 100] by scale alone: no random baseline is subtracted, and its
    tables are the plain mean of their columns. Scores on other scales are taken as they are, such
    as a correlation below 0; with one that is NaN, the mean is NaN.

    Raises:
        UserError: No scores.
    """
    if len(scores) == 0:
        raise UserError("norm_avg: there are no scores to average.")
    return float(np.mean(scores))
