"""A task's examples as a run would read them, with their lengths before they are cut."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64

from robust_ft.data import build, columns, task_rows
from robust_ft.data.cache import TaskData


@dataclass(frozen=True)
class Preview:
    """One example.

    Attributes:
        texts: What the cache would keep of an evaluation split: inputs, targets, references, ...
        tokens: Ids by feature, cut to its length.
        lengths: Tokens by feature before cutting.
        num_dropped_exemplars: Exemplars that did not fit.
    """

    texts: dict[str, Any]
    tokens: dict[str, Int64[np.ndarray, " tokens"]]
    lengths: dict[str, int]
    num_dropped_exemplars: int


def previews(data: TaskData) -> Iterator[Preview]:
    """Yields the examples of one task in the order of its split, from its source and not its cache.

    Raises:
        UserError: As `build.find_task`; or the task does not suit the vocabulary.
    """
    task = build.find_task(data)
    made = {feature: columns.Column(task, feature, data) for feature in task_rows.FEATURES}
    lengths = {"inputs": data.inputs_length, "targets": data.targets_length}
    for row in task_rows.rows(task_rows.dataset(task, data.split, lengths)):
        dropped = build.fit_exemplars(row, made["inputs"]) if "exemplars" in row else 0
        tokens, before = {}, {}
        for feature, column in made.items():
            tokens[feature] = column.tokens(row)
            before[feature] = column.length
        yield Preview(columns.texts(row, tokens, data.vocabulary), tokens, before, dropped)
