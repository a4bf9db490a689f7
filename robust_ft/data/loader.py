"""Batches from ready caches through Grain: order, mixing, sharding, packing, exact resuming.

The order of the examples is a function of the seed alone. Grain shuffles the *numbers* of examples
(of each task, anew every epoch) and mixes them; whole blocks of numbers are then read and padded
with numpy (`batching`), which costs far less than a step of Python for each example. A position
says how many blocks and rows have been handed out, so resuming is exact and takes no time.
"""

import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grain
import numpy as np
from absl import logging
from jaxtyping import Int32, Int64

from robust_ft.data import cache, meta_batches, mixing, records
from robust_ft.data.batching import Batcher, ExampleReader, features_of
from robust_ft.data.cache import CachedTask, TaskData
from robust_ft.data.meta_batches import MetaBatch
from robust_ft.data.records import Arrays
from robust_ft.data.replay import Replay
from robust_ft.decoder_start import DecoderStart
from robust_ft.errors import UserError

# One thread reads ahead: the step needs no more, and more would take CPU cores from it.
_READ_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
# Packing reads this many examples at once.
_PACKING_BLOCK = 64
# Packed rows that are open at once. First-fit leaves less padding with more of them, but a resumed
# run has to read again what was in the open rows.
_PACKING_ROWS = 64


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
        fields: All other fields of the task's example, if its postprocessor may ask for them.
    """

    inputs: Int32[np.ndarray, " inputs"]
    targets: Int32[np.ndarray, " targets"]
    inputs_text: str
    targets_text: str
    references: tuple[str, ...]
    id: int
    choices: tuple[str, ...] = ()
    answer_choices: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def as_seqio(self) -> dict[str, Any]:
        """The example as seqio's Evaluator has it: ids, texts before tokenization, other fields."""
        texts = {"inputs": self.inputs_text, "targets": self.targets_text}
        return {
            **{f"{name}_pretokenized": text.encode() for name, text in texts.items()},
            **self.fields,
            "inputs": self.inputs,
            "targets": self.targets,
        }


class BatchSource:
    """Endless training batches (dicts of numpy arrays by t5x's feature names), with a position.

    `train_batches` makes one. Its reading thread stops when it is closed or garbage-collected.
    """

    def __init__(
        self, dataset: grain.IterDataset, identity: Mapping[str, Any], reader: ExampleReader
    ):
        """Starts reading.

        Args:
            dataset: Gives the batches, with the numbers of their examples.
            identity: All that a position in the dataset depends on, as JSON can hold it.
            reader: Numbers the examples.
        """
        self._identity = dict(identity)
        self._reader = reader
        self._examples = np.zeros(0, np.int64)
        # In a list, which the finalizer empties: it may not hold `self`. Without a finalizer,
        # Grain's iterators would be closed during Python's shutdown, and complain.
        self._open = [iter(dataset)]
        self._finalizer = weakref.finalize(self, _close, self._open)

    def __iter__(self) -> "BatchSource":
        return self

    def __next__(self) -> Arrays:
        """Returns the next batch."""
        batch: Arrays = dict(next(self._open[0]))
        self._examples = batch.pop(records.EXAMPLES)
        return batch

    @property
    def examples(self) -> Int64[np.ndarray, " examples"]:
        """The numbers of the last batch's examples, which `named` tells apart."""
        return self._examples

    def named(self, numbers: Int64[np.ndarray, " examples"]) -> list[tuple[str, int]]:
        """Returns the task of each example, and its position in the task's split, from 0."""
        names = list(self._identity["examples"])
        located = map(self._reader.position_of, numbers.tolist())
        return [(names[owner], position) for owner, position in located]

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the last batch, as JSON can hold it.

        Without packing, a run with another number of shards can resume from it.
        """
        # Through JSON: a copy of Grain's state, and an error here if it is not JSON.
        state = {**self._identity, "position": self._open[0].get_state()}
        copy: dict[str, Any] = json.loads(json.dumps(state))
        return copy

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Resumes at a position from `get_state`.

        Raises:
            UserError: The position was taken with other data, seed, batch size or packing.
        """
        if misfit := self.misfit(state):
            raise UserError(misfit)
        self._open[0].set_state(dict(state["position"]))

    def misfit(self, state: Mapping[str, Any]) -> str:
        """Returns a sentence if a position was taken with other data or settings, else ""."""
        # Positions of earlier versions do not have these.
        state = {"by_length": 0, "content": self._identity.get("content"), **state}
        for name, value in self._identity.items():
            if state.get(name) != value:
                return (
                    f"The saved data position does not fit this run: its {name} is "
                    f"{state.get(name)!r}, but this run's is {value!r}."
                )
        return ""

    def close(self) -> None:
        """Stops reading ahead; nothing can be read afterwards."""
        self._finalizer()


def train_batches(
    data: TaskData,
    batch_size: int,
    seed: int,
    packing: bool = False,
    shard: tuple[int, int] = (0, 1),
    start: DecoderStart = DecoderStart(),
    task_index: Callable[[str], int] | None = None,
    by_length: int = 0,
    meta: MetaBatch | None = None,
    replay: Replay | None = None,
    marks_replay: bool = False,
) -> BatchSource:
    """Returns endless training batches of a task or mixture, from its cache (built if missing).

    Every epoch of a task has all its examples, each time in another order. A mixture takes from its
    tasks at their rates.

    Args:
        data: What to read.
        batch_size: Rows of the global batch; each shard gives `batch_size / shard count` of them.
        seed: Seed of the order, which does not depend on the shards: without packing, the batches
            of all shards, concatenated, are the batch of a single shard. With packing, shards pack
            disjoint examples.
        packing: Whether to put several examples into one row, told apart by segment ids.
        shard: Index and count. All processes of one model-parallel group take the same index.
        start: Gives the decoder's first input token, `Model.decoder_start`.
        task_index: From a task's name to what "task_index" (int32[batch]) says for its examples,
            such as `Model.task_index`; by default batches do not have it.
        by_length: If above 0, examples of this many batches are re-sorted into length buckets, and
            each bucket is padded to a half, a quarter or an eighth of the lengths where that is
            enough. The order of the batches stays random. Every shard reads all examples.
        meta: Asks for meta-batches, arrays [rows, tasks, batches, length]: the examples of a batch
            are of one task, and tasks come at the mixture's rates.
        replay: Other examples that are mixed in, at the same places for all shards.
        marks_replay: Whether "without_prompt" (bool[batch]) says which rows are replayed.

    Raises:
        UserError: See `cache.ensure`; or the batch size is not a multiple of the shard count, or
            packing is combined with `task_index` or `by_length`; or a task has too few examples
            for a meta-batch.
    """
    index, count = shard
    _check(batch_size, index, count, by_length)
    if packing and task_index is not None:
        raise UserError("Packed rows hold examples of several tasks, so they have no task_index.")
    if packing and by_length:
        raise UserError("Packed rows have no padding to save: choose packing or by_length.")
    rows = batch_size // count
    tasks = cache.ensure(data)
    own = len(tasks)
    if replay is not None:
        tasks = [*tasks, *_replayed(replay, tasks)]
    _warn_of_draws(tasks)
    data = data if replay is None else replay.widened(data)
    reader = ExampleReader(tasks)
    names = [task.task for task in tasks]
    batcher = Batcher(reader, data, start, features_of(names, own, task_index, marks_replay))
    # What a position depends on. The number of shards matters to packing alone.
    identity = {
        **_content(data, tasks),
        "seed": seed,
        "batch_size": batch_size,
        "packing": packing,
        "by_length": by_length,
    }
    if replay is not None:
        identity["replay"] = [replay.data.task, replay.data.split, replay.share]
    own_rows = slice(index * rows, (index + 1) * rows)
    if meta is not None:
        meta_batches.check_sizes(tasks, batch_size, meta.batches)
        each = [
            meta_batches.episodes(task, numbers, batch_size, meta.batches)
            for task, numbers in zip(tasks, mixing.shuffled(tasks, seed), strict=True)
        ]
        drawn = mixing.mixed(tasks, each).batch(meta.tasks, drop_remainder=True)
        batches = drawn.map(lambda n: meta_batches.padded(batcher, n, meta, own_rows))
        return BatchSource(
            batches.to_iter_dataset(_READ_AHEAD), identity | {"meta": list(meta)}, reader
        )
    order = mixing.endless(tasks, own, seed, replay.rates if replay else (0, 1))
    if by_length:
        # Every shard sorts the same window of global batches, and keeps its own rows of each.
        windows = order.batch(batch_size * by_length, drop_remainder=True)
        blocks = windows.random_map(
            lambda window, generator: batcher.length_buckets(
                window, batch_size, own_rows, generator
            ),
            seed=mixing.hashed(seed, "by_length"),
        )
        return BatchSource(_flat(blocks, by_length), identity, reader)
    # Blocks of consecutive examples go to the shards in turn. Single examples must not: two tasks
    # at equal rates alternate, and two shards that alternated too would see one task each.
    # drop_remainder: Grain would round the endless length up, past the largest integer it can hold.
    block_size = _PACKING_BLOCK if packing else rows
    blocks = order.batch(block_size, drop_remainder=True)[index::count]
    if not packing:
        batches = blocks.map(batcher.padded).to_iter_dataset(_READ_AHEAD)
        return BatchSource(batches, identity, reader)

    packed = _packed(blocks, reader, data, rows, start, mixing.hashed(seed, "packing"))
    return BatchSource(packed, {**identity, "shard": [index, count]}, reader)


def _packed(
    blocks: grain.MapDataset,
    reader: ExampleReader,
    data: TaskData,
    rows: int,
    start: DecoderStart,
    seed: int,
) -> grain.IterDataset:
    """Returns batches of packed rows, from blocks of the numbers of examples."""

    def examples_to_pack(numbers: np.ndarray) -> list[Arrays]:
        return [
            records.to_pack(example["inputs"], example["targets"], start, int(number))
            for number, example in zip(numbers, reader.examples(numbers), strict=True)
        ]

    packed = grain.experimental.FirstFitPackIterDataset(
        _flat(blocks.map(examples_to_pack), _PACKING_BLOCK),
        length_struct={
            **data.lengths,
            "decoder_inputs": data.targets_length,
            # More than a row can hold: each has a token of the target.
            records.EXAMPLES: data.targets_length + 1,
        },
        num_packing_bins=max(_PACKING_ROWS, rows),
        seed=seed,
    )
    batches = packed.batch(rows, drop_remainder=True).map(
        lambda batch: records.packed_batch(batch, data.vocabulary.pad_id)
    )
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=4)


def _content(data: TaskData, tasks: Sequence[CachedTask]) -> dict[str, Any]:
    return {
        "task": data.task,
        "split": data.split,
        "examples": {task.task: [task.info.num_examples, task.rate] for task in tasks},
        "content": {task.task: task.info.content[:16] for task in tasks},
        "lengths": [data.inputs_length, data.targets_length],
    }


def _replayed(replay: Replay, tasks: Sequence[CachedTask]) -> Sequence[CachedTask]:
    replayed = cache.ensure(replay.data)
    for name in sorted({task.task for task in replayed} & {task.task for task in tasks}):
        raise UserError(f"Replay.data has '{name}', one of the stage's own tasks; name another.")
    return replayed


def _warn_of_draws(tasks: Sequence[CachedTask]) -> None:
    for task in tasks:
        if task.info.is_random:
            logging.warning(
                "Task '%s' draws random numbers in its preprocessors: its cache keeps one draw, "
                "which is the same in every epoch.",
                task.task,
            )


def _check(batch_size: int, index: int, count: int, by_length: int) -> None:
    if not 0 <= index < count:
        raise UserError(f"Shard {index} of {count} does not exist.")
    if batch_size <= 0 or batch_size % count:
        raise UserError(
            f"A batch of {batch_size} rows cannot be divided into {count} equal shards."
        )
    if by_length < 0:
        raise UserError(f"by_length={by_length} is not a number of batches, or 0.")


def eval_examples(
    data: TaskData, limit: int | None = None, positions: Sequence[int] | None = None
) -> list[EvalExample]:
    """Returns a task's examples in the order of its split, from its cache (built if missing).

    Args:
        data: What to read; one task, or a mixture of one.
        limit: Number of examples to take at most, always the same ones. They are spread evenly over
            the split, since many test files are sorted.
        positions: Of the examples to take instead, in their order.

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
    if positions is not None:
        numbers = np.asarray(positions, np.int64)
    return [
        _eval_example(data, info, int(number), record)
        for number, record in zip(numbers, ExampleReader(tasks).read(numbers), strict=True)
    ]


def eval_batches(
    examples: Sequence[EvalExample],
    batch_size: int,
    inputs_length: int,
    pad_id: int = 0,
) -> list[Arrays]:
    """Returns batches of the examples' inputs in their order, each of `batch_size` rows.

    The last batch is filled up with rows of padding.

    Args:
        examples: The examples.
        batch_size: Rows of each batch.
        inputs_length: Encoder tokens of each row.
        pad_id: The vocabulary's padding.

    Returns:
        What decoding reads (`records.input_batch`) and `example_index` (int32[batch]): the index of
        each row's example in `examples`, -1 for rows of padding.

    Raises:
        ValueError: An input is longer than its length.
    """
    batches = []
    for start in range(0, len(examples), batch_size):
        chunk = examples[start : start + batch_size]
        inputs = [example.inputs for example in chunk]
        batch = records.input_batch(inputs, inputs_length, batch_size, pad_id)
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
    # Training splits keep no texts of inputs and targets; decoding gives them back, up to the
    # vocabulary's normalization.
    inputs_text = texts.get("inputs")
    if inputs_text is None:
        inputs_text = data.vocabulary.decode(inputs.tolist())
    targets_text = texts.get("targets")
    if targets_text is None:
        targets_text = data.vocabulary.decode(targets.tolist())
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
        fields=records.unpack(texts["whole"]) if "whole" in texts else {},
    )


def _flat(blocks: grain.MapDataset, block_size: int) -> grain.IterDataset:
    """Returns the elements of blocks that were read at once, each of at most `block_size`."""
    ahead = blocks.to_iter_dataset(_READ_AHEAD)
    return grain.experimental.FlatMapIterDataset(ahead, _Flatten(block_size))


class _Flatten(grain.experimental.FlatMapTransform):
    def __init__(self, block_size: int):
        super().__init__()
        self.max_fan_out = block_size

    def flat_map(self, element: list[Arrays]) -> list[Arrays]:
        return element
