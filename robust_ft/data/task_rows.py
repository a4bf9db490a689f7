"""Reads a seqio task's examples into Python, in the order of its source and not trimmed."""

import contextlib
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from robust_ft import metrics
from robust_ft.data import records
from robust_ft.data.task_functions import metric_fns
from robust_ft.errors import UserError

FEATURES = ("inputs", "targets")
LISTS = ("references", "choices", "answer_choices")
_EXEMPLARS = ("query", "exemplars")  # of k-shot tasks, see `derived`
_FIELDS = (*FEATURES, "inputs_pretokenized", "targets_pretokenized", *LISTS, "id", *_EXEMPLARS)
WHOLE = "whole"  # what of an example a postprocessor may ask for (`records.pack`)
_CHUNK = 256


def dataset(
    task: seqio.Task, split: str, lengths: Mapping[str, int] | None = None, seed: int = 0
) -> tf.data.Dataset:
    """Returns the split of a task: the two features and the fields that caches keep beside them.

    For a task whose postprocessor may ask for more (`keeps_examples`), that is all fields.

    `Task.get_dataset` would also trim, without counting, and reject the text features of our tasks.
    The fixed seed makes preprocessors that draw random numbers repeatable.

    Args:
        task: The task.
        split: One of its splits.
        lengths: Given to preprocessors that ask for them.
        seed: Of preprocessors that draw random numbers.

    Raises:
        UserError: The task makes no inputs or no targets.
    """
    with explained():
        tf.random.set_seed(seed)  # for those that take no seed from seqio
        examples = task.source.get_dataset(split=split, shuffle=False, seed=None)
        examples = task.preprocess_precache(examples, seed=seed)
        examples = task.preprocess_postcache(examples, sequence_length=lengths, seed=seed)
    missing = [f"'{feature}'" for feature in FEATURES if feature not in examples.element_spec]
    if missing:
        raise UserError(f"Task '{task.name}' makes no feature {' and '.join(missing)}.")
    fields = [name for name in _FIELDS if name in examples.element_spec]
    keeps_all = keeps_examples(task)

    def kept(example: dict[str, Any]) -> dict[str, Any]:
        row = {name: _ranked(name, example[name]) for name in fields}
        # A derived task has it from its base.
        whole = {name: value for name, value in example.items() if _is_dense(value)}
        return {**row, WHOLE: example.get(WHOLE, whole)} if keeps_all else row

    return examples.map(kept)


def keeps_examples(task: seqio.Task) -> bool:
    """Whether a task is evaluated with a postprocessor that may read fields of its examples."""
    postprocessor = task.postprocessor
    while isinstance(postprocessor, functools.partial):
        postprocessor = postprocessor.func
    is_own = postprocessor in metrics.POSTPROCESSORS.values()
    return bool(metric_fns(task)) and postprocessor is not None and not is_own


def rows(examples: tf.data.Dataset) -> Iterator[dict[str, Any]]:
    """Yields the examples of `dataset`: bytes, numbers, or arrays of them by name.

    Fields that are ragged or sparse are left out of what a postprocessor may ask for.

    Raises:
        UserError: One that Python code inside the task raised.
    """
    with explained():
        if isinstance(examples.element_spec.get(WHOLE), dict):
            # One by one, as seqio's Evaluator reads them: fields may be of any type.
            for row in examples.prefetch(_CHUNK).as_numpy_iterator():
                yield {**row, WHOLE: _packed(row[WHOLE])}
            return
        # In batches: tensorflow takes as long to hand out one example as a batch of them.
        for batch in examples.ragged_batch(_CHUNK).prefetch(1):
            columns = {name: _split(column) for name, column in batch.items()}
            for row in zip(*columns.values(), strict=True):
                yield dict(zip(columns, row, strict=True))


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Raises a UserError from Python code inside tensorflow again as itself.

    tensorflow passes it on as an error of its own, with the sentence and a traceback as text.
    """
    try:
        yield
    except tf.errors.OpError as error:
        sentence = re.search(r"UserError: (.+)", str(error))
        if sentence:
            raise UserError(sentence[1].strip()) from None
        raise


def _is_dense(value: Any) -> bool:
    """Whether a field is a tensor, or a dict of tensors, that numpy has a form for."""
    return all(isinstance(part, tf.Tensor) for part in tf.nest.flatten(value))


def _packed(example: Mapping[str, Any]) -> bytes:
    return records.pack({name: value for name, value in example.items() if name not in FEATURES})


def _ranked(name: str, value: tf.Tensor) -> tf.Tensor:
    """Sets the rank of a value, which a task's Python code may leave open; batching needs it."""
    if value.shape.rank is not None:
        return value
    is_list = name in (*LISTS, "exemplars") or (name in FEATURES and value.dtype != tf.string)
    return tf.ensure_shape(value, [None] if is_list else [])


def _split(column: tf.Tensor | tf.RaggedTensor) -> Iterable[Any]:
    """Returns the values of a batch, one for each example."""
    if isinstance(column, tf.RaggedTensor):
        splits = column.row_splits.numpy()[1:-1]
        return np.split(column.values.numpy(), splits)
    values: np.ndarray = column.numpy()
    return values
