"""A task's examples as a run would read them, with their lengths before truncation."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from robust_ft.data import build, task_rows, tokenization
from robust_ft.data.cache import TaskData
from robust_ft.data.tokenization import FeatureTokenizer, Tokenized


@dataclass(frozen=True)
class Preview:
    """One example.

    Attributes:
        texts: What the cache would keep of an evaluation split: inputs, targets, references, ...
        features: Token ids of 'inputs' and 'targets', and their lengths before truncation.
        num_dropped_exemplars: Exemplars that did not fit.
    """

    texts: dict[str, Any]
    features: dict[str, Tokenized]
    num_dropped_exemplars: int


def previews(data: TaskData) -> Iterator[Preview]:
    """Yields the examples of one task in the order of its split, from its source and not its cache.

    Raises:
        UserError: As `build.find_task`; or the task does not suit the vocabulary.
    """
    task = build.find_task(data)
    tokenizers = {name: FeatureTokenizer(task, name, data) for name in task_rows.FEATURES}
    for row in task_rows.rows(task_rows.dataset(task, data.split, data.lengths)):
        dropped = build.fit_exemplars(row, tokenizers["inputs"]) if "exemplars" in row else 0
        features = {name: tokenize(row) for name, tokenize in tokenizers.items()}
        texts = tokenization.texts(row, features, data.vocabulary, is_evaluated=True)
        yield Preview(texts, features, dropped)
