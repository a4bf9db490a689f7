"""Counts the examples of an evaluation that are among the training examples too.

Examples are compared by their text as a model reads it: decoded from the tokens of the caches, cut
to the shorter of both lengths, without differences of case and spacing. Of k-shot tasks the plain
task is compared, where it has a cache: the exemplars in front of an input say nothing about it.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from robust_ft import task_names
from robust_ft.data import cache, records
from robust_ft.data.batching import ExampleReader
from robust_ft.data.cache import CachedTask, TaskData

_BLOCK = 4096  # examples read at once
# Training examples that are compared at most, spread evenly: minutes, whatever the size of a cache.
LIMIT = 2_000_000


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """What an evaluation reads: its data and the number of examples, None for all."""

    data: TaskData
    limit: int | None = None


@dataclasses.dataclass(frozen=True)
class Overlap:
    """How many examples of a split are in the training data.

    Attributes:
        task: The evaluated task.
        split: Its split.
        num_examples: Examples of it that are evaluated.
        same_input: How many of them have an input of the training data.
        same_example: How many have input and target of one training example.
    """

    task: str
    split: str
    num_examples: int
    same_input: int
    same_example: int


@dataclasses.dataclass(frozen=True)
class Counted:
    """The overlaps of some training data, with the number of its examples and of those compared."""

    overlaps: tuple[Overlap, ...]
    num_train: int
    num_compared: int

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Counted":
        """Returns what `dataclasses.asdict` has made a JSON object of."""
        overlaps = tuple(Overlap(**each) for each in fields["overlaps"])
        return cls(overlaps, fields["num_train"], fields["num_compared"])


def count(train: TaskData, evaluated: tuple[Evaluated, ...]) -> Counted:
    """Counts the overlaps of training data with what is evaluated, from their caches.

    The training data are read once, in blocks; only the evaluations' examples are held.
    """
    train = _plain(train)
    datas = [train, *(_plain(each.data) for each in evaluated)]
    contents = tuple(task.info.content for data in datas for task in cache.ensure(data))
    return _count(train, evaluated, contents)


@functools.lru_cache(maxsize=8)  # the stages of a recipe mostly read the same data
def _count(train: TaskData, evaluated: tuple[Evaluated, ...], contents: tuple[str, ...]) -> Counted:
    del contents  # of the examples: files may change while a program runs
    tasks = cache.ensure(train)
    num_train = sum(task.info.num_examples for task in tasks)
    numbers = _spread(num_train, LIMIT)
    found = [_Found(train, each) for each in evaluated]
    lengths = list(dict.fromkeys(one.lengths for one in found))
    for inputs, targets in _tokens(tasks, numbers):
        for length in lengths:
            text = _texts(train, inputs, targets, length)
            for one in found:
                if one.lengths == length:
                    one.see(*text)
    return Counted(tuple(one.overlap() for one in found), num_train, len(numbers))


class _Found:
    """Which examples of an evaluation have been seen in the training data."""

    def __init__(self, train: TaskData, evaluated: Evaluated):
        self._evaluated = evaluated
        data = _plain(evaluated.data)
        self.lengths = (
            min(train.inputs_length, data.inputs_length) - 1,
            min(train.targets_length, data.targets_length) - 1,
        )
        tasks = cache.ensure(data)
        numbers = _spread(sum(task.info.num_examples for task in tasks), evaluated.limit)
        self._texts = [_texts(data, *each, self.lengths) for each in _tokens(tasks, numbers)]
        self._inputs = dict.fromkeys((text for text, _ in self._texts), False)
        self._examples = dict.fromkeys(self._texts, False)

    def see(self, inputs: str, targets: str) -> None:
        if inputs in self._inputs:
            self._inputs[inputs] = True
            if (inputs, targets) in self._examples:
                self._examples[inputs, targets] = True

    def overlap(self) -> Overlap:
        data = self._evaluated.data
        same_input = sum(self._inputs[text] for text, _ in self._texts)
        same_example = sum(self._examples[each] for each in self._texts)
        return Overlap(data.task, data.split, len(self._texts), same_input, same_example)


def _plain(data: TaskData) -> TaskData:
    """Returns a k-shot task's data without exemplars, if there is a cache of it."""
    derived = task_names.parse(data.task)
    if derived is None or not derived.shots:
        return data
    plain = _plain(dataclasses.replace(data, task=derived.base))
    return plain if cache.load(plain) is not None else data


def _spread(size: int, limit: int | None) -> np.ndarray:
    """Returns the numbers of the examples that are read, as `loader.eval_examples` takes them."""
    if limit is None or limit >= size:
        return np.arange(size)
    return np.arange(limit) * size // limit


def _tokens(
    tasks: Sequence[CachedTask], numbers: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    reader = ExampleReader(tasks)
    dtype = tasks[0].info.token_dtype
    for start in range(0, len(numbers), _BLOCK):
        for record in reader.read(numbers[start : start + _BLOCK]):
            yield records.decode(record, dtype)


def _texts(
    data: TaskData, inputs: np.ndarray, targets: np.ndarray, lengths: tuple[int, int]
) -> tuple[str, str]:
    vocabulary = data.vocabulary
    return (
        normalized(vocabulary.decode(inputs[: lengths[0]])),
        normalized(vocabulary.decode(targets[: lengths[1]])),
    )


def normalized(text: str) -> str:
    """Returns a text without differences of case and spacing."""
    return " ".join(text.casefold().split())


def sentences(counted: Counted) -> Iterable[str]:
    """Yields what there is to say of each overlap, without a full stop."""
    share = ""
    if counted.num_compared < counted.num_train:
        share = f" (of which {counted.num_compared:,} were compared)"
    for each in counted.overlaps:
        if each.same_input:
            yield (
                f"{each.same_input} of {each.num_examples} examples of {each.task}, split "
                f"{each.split}, have an input of the {counted.num_train:,} training examples"
                f"{share}, {each.same_example} of them with the same target"
            )
