"""Batches from ready caches through Grain: order, mixing, sharding, lengths, exact resuming.

The order of the examples is a function of the seed alone. Grain shuffles *numbers* (task after
task, every epoch anew) and mixes them; whole blocks of numbers are then read and padded with numpy,
which costs far less than one step of Python an example. A state says how many blocks and rows have
been handed out, so resuming is exact and takes no time.
"""

import hashlib
import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Int32

from robust_ft.data import cache, mixing, records
from robust_ft.data.cache import CachedTask, TaskData
from robust_ft.data.records import Arrays
from robust_ft.errors import UserError

# One thread reads ahead: more would take the cores from the step without being needed.
_READ_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
# Examples that are read at once for packing, and packing rows that are open at once: more rows
# leave less padding (first-fit), and make a resume read more.
_PACKING_BLOCK = 64
_PACKING_ROWS = 64
# Batches of like lengths are padded to the full lengths over one of these: a compiled step each.
_DIVISORS = (8, 4, 2, 1)


@dataclass(frozen=True)
class EvalExample:
    """One example to evaluate on.

    Attributes:
        inputs: Token ids, EOS included, no padding.
        targets: Token ids, EOS included, no padding.
        inputs_text: The text before tokenization.
        targets_text: The text before tokenization.
        references: What counts as right; the targets' text alone where a task says nothing else.
        id: The task's own integer id, else the position in the split.
        choices: The possible answers of a classification task that names them.
        answer_choices: The answers that a model ranks, empty for a task that is decoded.
    """

    inputs: Int32[np.ndarray, " inputs"]
    targets: Int32[np.ndarray, " targets"]
    inputs_text: str
    targets_text: str
    references: tuple[str, ...]
    id: int
    choices: tuple[str, ...] = ()
    answer_choices: tuple[str, ...] = ()


class BatchSource:
    """Endless training batches (dicts of numpy arrays by t5x's feature names), with a position.

    `train_batches` makes one. Close it to stop its thread, or let it go.
    """

    def __init__(self, dataset: grain.IterDataset, identity: Mapping[str, Any]):
        """Takes batches and a description of all that a position depends on."""
        self._identity = dict(identity)
        # Grain's iterators complain when they are closed as late as Python's own shutdown.
        self._open = [iter(dataset)]
        self._finalizer = weakref.finalize(self, _close, self._open)

    def __iter__(self) -> "BatchSource":
        return self

    def __next__(self) -> Arrays:
        """Returns the next batch."""
        return next(self._open[0])

    def get_state(self) -> dict[str, Any]:
        """Returns the position behind the last batch, as JSON can hold it.

        Without packing it holds for any number of shards.
        """
        # Through JSON: a copy, and a proof that it is JSON.
        return json.loads(json.dumps({**self._identity, "position": self._open[0].get_state()}))

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a position from `get_state`.

        Raises:
            UserError: If the position was taken with other data, seed, batch size or packing.
        """
        state = {"by_length": 0, **state}  # which earlier versions did not say
        differing = [name for name, value in self._identity.items() if state.get(name) != value]
        if differing:
            name = differing[0]
            raise UserError(
                f"The saved data position does not fit this run: its {name} is"
                f" {state.get(name)!r}, but this run's is {self._identity[name]!r}."
            )
        self._open[0].set_state(dict(state["position"]))

    def close(self) -> None:
        """Stops reading ahead; nothing can be read afterwards."""
        self._finalizer()


def train_batches(
    data: TaskData,
    batch_size: int,
    seed: int,
    packing: bool = False,
    shard: tuple[int, int] = (0, 1),
    start_id: int = 0,
    task_index: Callable[[str], int] | None = None,
    by_length: int = 0,
) -> BatchSource:
    """Returns endless training batches of a task or mixture, from its cache (built if missing).

    Every task goes through all its examples once an epoch, in another order each time; a mixture
    takes from its tasks at their rates.

    Args:
        data: What to read.
        batch_size: Rows of the global batch; each shard gives `batch_size / shard count` of them.
        seed: Of the order. The same whatever the shards: without packing, the shards' batches on
            top of each other are the batch of one shard; with packing, shards pack disjoint
            examples.
        packing: Whether to put several examples into one row, with segment ids and positions.
        shard: Index and count. All processes that hold a part of one model take the same.
        start_id: First token of all decoder inputs, the model's; padding is the vocabulary's.
        task_index: From a task's name to what "task_index" (int32[batch]) says for its examples,
            such as `Model.task_index`; by default batches do not have it.
        by_length: So many batches' examples are sorted by length and divided anew, so that those of
            like lengths come together, and are padded to a half, quarter or eighth of the lengths
            where that is enough; the batches' order stays random. Every shard reads all of them. 0
            for off.

    Raises:
        UserError: See `cache.ensure`; or if the batch cannot be divided by the shards, or rows that
            hold several tasks' examples are to have one index or one length.
    """
    index, count = shard
    _check(batch_size, index, count, by_length)
    if packing and task_index is not None:
        raise UserError("Packed rows hold examples of several tasks, so they have no task_index.")
    if packing and by_length:
        raise UserError("Packed rows have no padding to save: choose packing or by_length.")
    rows = batch_size // count
    tasks = cache.ensure(data)
    names = [task.task for task in tasks]
    indices = None if task_index is None else np.array([*map(task_index, names)], np.int32)
    reader = _Reader(tasks)
    block = _PACKING_BLOCK if packing else rows
    # Block by block, not example by example: two tasks at equal rates alternate, and two shards
    # that alternated too would see one task each.
    # (drop_remainder: Grain would round the endless length up, past the largest one it can hold.)
    numbers = _order(tasks, seed).batch(block, drop_remainder=True)[index::count]
    lengths = {"inputs": data.inputs_length, "targets": data.targets_length}
    pad_id = data.vocabulary.pad_id
    identity = {
        "task": data.task,
        "split": data.split,
        "examples": {task.task: [task.info.num_examples, task.rate] for task in tasks},
        "lengths": [data.inputs_length, data.targets_length],
        "seed": seed,
        "batch_size": batch_size,
        "packing": packing,
        "by_length": by_length,
    }
    made = _Batches(reader, data, start_id, indices)
    if by_length:
        windows = _order(tasks, seed).batch(batch_size * by_length, drop_remainder=True)
        ours = slice(index * rows, (index + 1) * rows)
        divided = windows.random_map(
            lambda window, generator: made.by_length(window, batch_size, ours, generator),
            seed=_seed(seed, "by_length"),
        )
        ahead = divided.to_iter_dataset(_READ_AHEAD)
        batches = grain.experimental.FlatMapIterDataset(ahead, _Unblock(by_length))
        return BatchSource(batches, identity)
    if not packing:
        return BatchSource(numbers.map(made.padded).to_iter_dataset(_READ_AHEAD), identity)
    examples = grain.experimental.FlatMapIterDataset(
        numbers.map(reader.examples).to_iter_dataset(_READ_AHEAD), _Unblock(_PACKING_BLOCK)
    )
    packed = grain.experimental.FirstFitPackIterDataset(
        examples,
        length_struct=lengths,
        num_packing_bins=max(_PACKING_ROWS, rows),
        seed=_seed(seed, "packing"),
    )
    batches = packed.batch(rows, drop_remainder=True).map(
        lambda batch: records.packed_batch(batch, pad_id, start_id)
    )
    ahead = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=4)
    return BatchSource(ahead, {**identity, "shard": [index, count]})


def _check(batch_size: int, index: int, count: int, by_length: int) -> None:
    if not 0 <= index < count:
        raise UserError(f"Shard {index} of {count} does not exist.")
    if batch_size <= 0 or batch_size % count:
        raise UserError(
            f"A batch of {batch_size} rows cannot be divided into {count} equal shards."
        )
    if by_length < 0:
        raise UserError(f"by_length={by_length} is not a number of batches, or 0.")


def eval_examples(data: TaskData, limit: int | None = None) -> list[EvalExample]:
    """Returns a task's examples in the order of its split, from its cache (built if missing).

    Args:
        data: What to read; one task, or a mixture of one.
        limit: At most so many examples, spread evenly over the split, since many test files are
            sorted. The same ones every time.

    Raises:
        UserError: See `cache.ensure`; or if `data` is a mixture of several tasks.
    """
    tasks = cache.ensure(data)
    if len(tasks) > 1:
        names = ", ".join(task.task for task in tasks)
        raise UserError(
            f"Mixture '{data.task}' cannot be evaluated as one; name its tasks: {names}."
        )
    info = tasks[0].info
    size = info.num_examples
    numbers = np.arange(size)
    if limit is not None and limit < size:
        numbers = np.arange(limit) * size // limit
    found = _Reader(tasks).read(numbers)
    return [
        _eval_example(data, info, int(n), record) for n, record in zip(numbers, found, strict=True)
    ]


def eval_batches(
    examples: Sequence[EvalExample],
    batch_size: int,
    inputs_length: int,
    targets_length: int,
    pad_id: int = 0,
    start_id: int = 0,
) -> list[Arrays]:
    """Returns padded batches of `examples` in their order, each of `batch_size` rows.

    The last batch is filled up with rows of padding (loss weights 0). `example_index`
    (int32[batch]) says which example a row is, -1 for those. `pad_id` is the vocabulary's,
    `start_id` (the first token of all decoder inputs) the model's.

    Raises:
        ValueError: If an example is longer than its length.
    """
    batches = []
    for start in range(0, len(examples), batch_size):
        chunk = examples[start : start + batch_size]
        batch = records.model_batch(
            [e.inputs for e in chunk],
            [e.targets for e in chunk],
            inputs_length,
            targets_length,
            rows=batch_size,
            pad_id=pad_id,
            start_id=start_id,
        )
        index = np.full(batch_size, -1, np.int32)
        index[: len(chunk)] = np.arange(start, start + len(chunk))
        batches.append({**batch, "example_index": index})
    return batches


def _close(iterators: list[grain.DatasetIterator]) -> None:
    while iterators:
        iterators.pop().close()


def _eval_example(data: TaskData, info: cache.CacheInfo, number: int, record: bytes) -> EvalExample:
    inputs, targets = records.decode(record, info.token_dtype)
    texts = records.decode_texts(record, info.token_dtype)
    # Training splits keep no texts; their ids still say what they were, up to normalization.
    targets_text = texts.get("targets", None)
    if targets_text is None:
        targets_text = data.vocabulary.decode(targets.tolist())
    inputs_text = texts.get("inputs", None)
    if inputs_text is None:
        inputs_text = data.vocabulary.decode(inputs.tolist())
    references = tuple(texts.get("references", ())) or (targets_text,)
    return EvalExample(
        inputs=inputs,
        targets=targets,
        inputs_text=inputs_text,
        targets_text=targets_text,
        references=references,
        id=texts.get("id", number),
        choices=tuple(texts.get("choices", ())),
        answer_choices=tuple(texts.get("answer_choices", ())),
    )


class _Reader:
    """Examples of several caches by number; the first task's come first, then the second's."""

    def __init__(self, tasks: Sequence[CachedTask]):
        options = "readahead_buffer_size:0,max_parallelism:0"  # for random access
        # Opened at once: a cache may be rebuilt, and an open file stays what it was.
        self._files = [ArrayRecordReader(task.examples_file, options=options) for task in tasks]
        self._starts = np.cumsum([0] + [task.info.num_examples for task in tasks])
        self._dtypes = [task.info.token_dtype for task in tasks]

    def read(self, numbers: Int32[np.ndarray, " examples"]) -> list[bytes]:
        """Returns the records of `numbers`, in their order."""
        found: list[bytes] = [b""] * len(numbers)
        owners = self.owners(numbers)
        for owner in np.unique(owners):
            places = np.flatnonzero(owners == owner)
            local = (np.asarray(numbers)[places] - self._starts[owner]).tolist()
            for place, record in zip(places, self._files[owner].read(local), strict=True):
                found[place] = record
        return found

    def owners(self, numbers: Int32[np.ndarray, " examples"]) -> Int32[np.ndarray, " examples"]:
        """Returns which task each of `numbers` is of."""
        return np.searchsorted(self._starts, numbers, side="right").astype(np.int32) - 1

    def examples(self, numbers: Int32[np.ndarray, " examples"]) -> list[Arrays]:
        """Returns token ids by feature for each of `numbers`, without padding."""
        # All tasks of one run share a vocabulary, so also the type of their ids.
        pairs = [records.decode(record, self._dtypes[0]) for record in self.read(numbers)]
        return [{"inputs": inputs, "targets": targets} for inputs, targets in pairs]


class _Unblock(grain.experimental.FlatMapTransform):
    """Blocks of what was read at once, back to its elements."""

    def __init__(self, size: int):
        """Takes the most elements that a block has."""
        super().__init__()
        self.max_fan_out = size

    def flat_map(self, element: list[Arrays]) -> list[Arrays]:
        """Returns the block itself, a list."""
        return element


def _order(tasks: Sequence[CachedTask], seed: int) -> grain.MapDataset:
    """Returns the endless order of the examples' numbers (those of `_Reader`)."""
    parts, start = [], 0
    for task in tasks:
        stop = start + task.info.num_examples
        # Grain's next epoch takes the next seed, so seeds must not be neighbours: run 1 would
        # otherwise begin with run 0's second epoch, and all tasks of a size share one order.
        part = grain.MapDataset.range(start, stop).shuffle(_seed(seed, task.task)).repeat()
        parts.append(part)
        start = stop
    if len(parts) == 1:
        return parts[0]
    order = mixing.MixedOrder([task.rate for task in tasks])
    return grain.MapDataset.select_from_datasets(parts, order)


class _Batches:
    """Batches from the numbers of examples."""

    def __init__(
        self,
        reader: _Reader,
        data: TaskData,
        start_id: int,
        indices: Int32[np.ndarray, " tasks"] | None,
    ):
        self._reader, self._data = reader, data
        self._start_id, self._indices = start_id, indices

    def padded(self, numbers: Int32[np.ndarray, " rows"]) -> Arrays:
        """Returns a batch with the full lengths."""
        return self._batch(numbers, self._reader.examples(numbers), 1)

    def by_length(
        self,
        numbers: Int32[np.ndarray, " window"],
        batch_size: int,
        ours: slice,
        generator: np.random.Generator,
    ) -> list[Arrays]:
        """Returns the batches of a window; of the `batch_size` rows of each those in `ours`."""
        examples = self._reader.examples(numbers)
        inputs = np.array([max(1, len(example["inputs"])) for example in examples])
        targets = np.array([max(1, len(example["targets"])) for example in examples])
        # The divisors that would leave an example whole, as real numbers.
        slack = np.minimum(self._data.inputs_length / inputs, self._data.targets_length / targets)
        groups = np.argsort(slack, kind="stable").reshape(-1, batch_size)
        batches = []
        for group in groups[generator.permutation(len(groups))]:
            # The same on every shard, whose own rows might do with less.
            divisor = next(d for d in _DIVISORS if d <= slack[group].min())
            rows = group[ours]
            batches.append(self._batch(numbers[rows], [examples[row] for row in rows], divisor))
        return batches

    def _batch(
        self, numbers: Int32[np.ndarray, " rows"], examples: Sequence[Arrays], divisor: int
    ) -> Arrays:
        batch = records.model_batch(
            [e["inputs"] for e in examples],
            [e["targets"] for e in examples],
            -(-self._data.inputs_length // divisor),
            -(-self._data.targets_length // divisor),
            pad_id=self._data.vocabulary.pad_id,
            start_id=self._start_id,
        )
        if self._indices is not None:
            batch["task_index"] = self._indices[self._reader.owners(numbers)]
        return batch


def _seed(seed: int, name: str) -> int:
    """Returns a 32-bit seed that says nothing about those of other seeds and names."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "little")
