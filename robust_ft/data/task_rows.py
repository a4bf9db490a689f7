"""Reads a seqio task's examples into Python, in the order of its source and not trimmed."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from robust_ft.errors import UserError

FEATURES = ("inputs", "targets")
_TEXTS = (
    "inputs_pretokenized",
    "targets_pretokenized",
    "references",
    "choices",
    "answer_choices",
    "id",
)
_EXEMPLARS = ("query", "exemplars")  # of k-shot tasks, see `derived`
_LISTS = ("references", "choices", "answer_choices", "exemplars")
_CHUNK = 256


def dataset(
    task: seqio.Task, split: str, lengths: Mapping[str, int] | None = None
) -> tf.data.Dataset:
    """Returns the split of a task: the two features and what is kept beside them.

    `Task.get_dataset` would also trim, uncounted, and reject the text features of our tasks. The
    seed makes preprocessors that draw random numbers repeatable.

    Args:
        task: The task.
        split: One of its splits.
        lengths: Given to preprocessors that ask for them.

    Raises:
        UserError: The task makes no inputs or no targets.
    """
    with explained():
        found = task.source.get_dataset(split=split, shuffle=False, seed=None)
        found = task.preprocess_precache(found, seed=0)
        found = task.preprocess_postcache(found, sequence_length=lengths, seed=0)
    missing = [f"'{feature}'" for feature in FEATURES if feature not in found.element_spec]
    if missing:
        raise UserError(f"Task '{task.name}' makes no feature {' and '.join(missing)}.")
    kept = [name for name in (*FEATURES, *_TEXTS, *_EXEMPLARS) if name in found.element_spec]
    return found.map(lambda example: {name: _ranked(name, example[name]) for name in kept})


def rows(found: tf.data.Dataset) -> Iterator[dict[str, Any]]:
    """Yields the examples of `dataset`: bytes, numbers, or arrays of them by name.

    Raises:
        UserError: One that Python code inside the task raised.
    """
    with explained():
        # Many at once: tensorflow takes as long to hand out one example as a batch of them.
        for batch in found.ragged_batch(_CHUNK).prefetch(1):
            columns = {name: _split(column) for name, column in batch.items()}
            for row in zip(*columns.values(), strict=True):
                yield dict(zip(columns, row, strict=True))


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Lets a UserError from Python code inside tensorflow come out as itself.

    tensorflow passes it on as text, with its traceback.
    """
    try:
        yield
    except tf.errors.OpError as error:
        sentence = re.search(r"UserError: (.+)", str(error))
        if sentence:
            raise UserError(sentence[1].strip()) from None
        raise


def _ranked(name: str, value: tf.Tensor) -> tf.Tensor:
    """Says how many axes a value has where Python code inside the task left that open."""
    if value.shape.rank is not None:
        return value
    is_list = name in _LISTS or (name in FEATURES and value.dtype != tf.string)
    return tf.ensure_shape(value, [None] if is_list else [])


def _split(column: tf.Tensor | tf.RaggedTensor) -> Sequence[Any]:
    """Returns a batch's values one by one."""
    if isinstance(column, tf.RaggedTensor):
        splits = column.row_splits.numpy()[1:-1]
        return np.split(column.values.numpy(), splits)
    return column.numpy()
