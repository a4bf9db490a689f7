"""From the numbers of examples to padded batches: a block of records is read and padded at once.

Examples are numbered across the tasks of a mixture: the first task's come first, then the second's.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Int

from robust_ft.data import records
from robust_ft.data.cache import CachedTask, TaskData
from robust_ft.data.records import Arrays
from robust_ft.decoder_start import DecoderStart

# A length bucket is padded to the full lengths divided by one of these. Each is another shape, so
# the train step is compiled once for each.
_DIVISORS = (8, 4, 2, 1)


class ExampleReader:
    """Reads examples of one or several cached tasks by number."""

    def __init__(self, tasks: Sequence[CachedTask]):
        options = "readahead_buffer_size:0,max_parallelism:0"  # for random access
        # Opened now, not on first use: a cache may be rebuilt, and an open file stays what it was.
        self._files = [ArrayRecordReader(task.examples_file, options=options) for task in tasks]
        self._starts = np.cumsum([0] + [task.info.num_examples for task in tasks])  # [tasks + 1]
        self._dtypes = [task.info.token_dtype for task in tasks]

    def read(self, numbers: Int[np.ndarray, " examples"]) -> list[bytes]:
        """Returns the records of `numbers`, in their order."""
        examples: list[bytes] = [b""] * len(numbers)
        owners = self.task_of(numbers)
        # One call a task: each call of ArrayRecord's reader costs far more than a record.
        for owner in np.unique(owners):
            rows = np.flatnonzero(owners == owner)
            local = (numbers[rows] - self._starts[owner]).tolist()
            for row, record in zip(rows, self._files[owner].read(local), strict=True):
                examples[row] = record
        return examples

    def task_of(self, numbers: Int[np.ndarray, " examples"]) -> Int[np.ndarray, " examples"]:
        """Returns the index of the task that each example belongs to."""
        # side="right": an example with the number of a start is the first of that task.
        return np.searchsorted(self._starts, numbers, side="right") - 1

    def position_of(self, number: int) -> tuple[int, int]:
        """Returns the index of an example's task, and the example's position in its split."""
        owner = int(self.task_of(np.array([number]))[0])
        return owner, number - int(self._starts[owner])

    def examples(self, numbers: Int[np.ndarray, " examples"]) -> list[Arrays]:
        """Returns the token ids of each example by feature ('inputs', 'targets'), not padded."""
        # All tasks of a run share a vocabulary, and so the dtype of their ids.
        pairs = [records.decode(record, self._dtypes[0]) for record in self.read(numbers)]
        return [{"inputs": inputs, "targets": targets} for inputs, targets in pairs]


class Batcher:
    """Makes padded training batches out of the numbers of examples."""

    def __init__(
        self,
        reader: ExampleReader,
        data: TaskData,
        start: DecoderStart,
        features: Mapping[str, np.ndarray],
    ):
        """Keeps what all batches share.

        Args:
            reader: Reads the examples.
            data: Has the lengths and the vocabulary.
            start: Gives the decoder's first input token.
            features: Arrays [tasks], by their names in the batches: what rows of each task have.
        """
        self._reader, self._data = reader, data
        self._start, self._features = start, features

    def padded(self, numbers: Int[np.ndarray, " rows"]) -> Arrays:
        """Returns one batch, padded to the full lengths."""
        return self._batch(numbers, self._reader.examples(numbers), 1)

    def length_buckets(
        self,
        numbers: Int[np.ndarray, " window"],
        batch_size: int,
        rows: slice,
        generator: np.random.Generator,
    ) -> list[Arrays]:
        """Re-sorts the examples of a window into batches of like lengths.

        Args:
            numbers: The examples of a whole number of global batches.
            batch_size: Rows of the global batch.
            rows: This shard's rows of each global batch.
            generator: Draws the order of the batches, so that short ones do not come first.
        """
        examples = self._reader.examples(numbers)
        # max(1, ...): an example without tokens fits everywhere, and must not divide by zero.
        inputs = np.array([max(1, len(example["inputs"])) for example in examples])
        targets = np.array([max(1, len(example["targets"])) for example in examples])
        # [window]: the largest divisor of the lengths, as a real number, that cuts no token.
        slack = np.minimum(self._data.inputs_length / inputs, self._data.targets_length / targets)
        buckets = np.argsort(slack, kind="stable").reshape(-1, batch_size)  # [batches, batch_size]
        batches = []
        for bucket in buckets[generator.permutation(len(buckets))]:
            # Of the global batch, not of this shard's rows: all shards must have one shape.
            divisor = next(d for d in _DIVISORS if d <= slack[bucket].min())
            own = bucket[rows]
            batches.append(self._batch(numbers[own], [examples[row] for row in own], divisor))
        return batches

    def _batch(
        self, numbers: Int[np.ndarray, " rows"], examples: Sequence[Arrays], divisor: int
    ) -> Arrays:
        batch = records.model_batch(
            [e["inputs"] for e in examples],
            [e["targets"] for e in examples],
            -(-self._data.inputs_length // divisor),  # rounded up
            -(-self._data.targets_length // divisor),
            pad_id=self._data.vocabulary.pad_id,
            start=self._start,
        )
        batch[records.EXAMPLES] = np.asarray(numbers, np.int64)
        owners = self._reader.task_of(np.asarray(numbers))
        return batch | {name: values[owners] for name, values in self._features.items()}


def features_of(
    names: Sequence[str], own: int, task_index: Callable[[str], int] | None, marks_replay: bool
) -> dict[str, np.ndarray]:
    """Returns arrays [tasks], what rows of each task have; all but the first `own` are replayed."""
    features = {"without_prompt": np.arange(len(names)) >= own} if marks_replay else {}
    if task_index is not None:
        # Rows without a prompt have none of their task's; 0 is as good as any.
        with_prompt = names[:own] if marks_replay else names
        indices = [task_index(name) if name in with_prompt else 0 for name in names]
        features["task_index"] = np.array(indices, np.int32)
    return features
