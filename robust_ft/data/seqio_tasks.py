"""Building blocks of our seqio tasks: text features without a vocabulary, and sources of texts.

A task here says what an example *is*: its preprocessors end in the strings `inputs` and `targets`
(and, for evaluation, `references`, `id`, `choices`, `answer_choices`). Only the run knows the
vocabulary, so tokenizing is left to the cache (`build`). A seqio task that tokenizes by itself
works too.
"""

import glob
import itertools
import os
import socket
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from robust_ft.data.fingerprints import DATA_DIR_VARIABLE
from robust_ft.data.raw_files import Reader, Row, located
from robust_ft.errors import UserError, nearest

_CHUNK = 256  # examples that go from Python to tensorflow at once

_TFDS_NEEDS = "give TFDS a network, or a TFDS_DATA_DIR where the dataset is prepared"

ExampleFn = Callable[[dict[str, Any]], Mapping[str, Any] | None]


def text_features(add_eos_to_inputs: bool = True) -> dict[str, seqio.Feature]:
    """Returns the `output_features` of a task whose `inputs` and `targets` are texts.

    Args:
        add_eos_to_inputs: Whether inputs end in EOS, as T5's do; targets always do.
    """

    def feature(add_eos: bool) -> seqio.Feature:
        vocabulary = seqio.PassThroughVocabulary(size=0)
        return seqio.Feature(vocabulary, add_eos=add_eos, dtype=tf.string, rank=0)

    return {"inputs": feature(add_eos_to_inputs), "targets": feature(True)}


def from_python(
    examples: Callable[[], Iterable[Mapping[str, Any]]],
    texts: Sequence[str] = ("inputs", "targets"),
    lists: Sequence[str] = (),
    integers: Sequence[str] = (),
) -> tf.data.Dataset:
    """Returns a dataset of the mappings that `examples()` yields.

    As `tf.data.Dataset.from_generator`, but several times faster: a call into Python costs the same
    for one example as for hundreds, so they are handed over in chunks.

    Args:
        examples: Called for each pass over the dataset.
        texts: Names of fields that are one string.
        lists: Names of fields that are lists of strings, of any lengths.
        integers: Names of fields that are an integer.
    """

    def chunks() -> Iterator[dict[str, list[Any]]]:
        source = iter(examples())
        while chunk := list(itertools.islice(source, _CHUNK)):
            fields = {name: [example[name] for example in chunk] for name in (*texts, *integers)}
            for name in lists:
                fields[name] = [text for example in chunk for text in example[name]]
                fields[f"{name}/lengths"] = [len(example[name]) for example in chunk]
            yield fields

    def with_lists(fields: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        for name in lists:
            lengths = fields.pop(f"{name}/lengths")
            fields[name] = tf.RaggedTensor.from_row_lengths(fields[name], lengths)
        return fields

    numbers = (*integers, *(f"{name}/lengths" for name in lists))
    signature = {name: tf.TensorSpec([None], tf.string) for name in (*texts, *lists)}
    signature |= {name: tf.TensorSpec([None], tf.int64) for name in numbers}
    dataset = tf.data.Dataset.from_generator(chunks, output_signature=signature)
    return dataset.map(with_lists).unbatch()


@dataclass(frozen=True)
class Files:
    """Official raw files of a split.

    Attributes:
        paths: Below $ROBUST_FT_DATA_DIR, or absolute; may hold wildcards, whose files are read in
            the order of their names.
        read: From these files to their records.
    """

    paths: tuple[str, ...]
    read: Reader

    def find(self) -> list[Path] | None:
        """Returns the files, None if a path has none."""
        paths: list[Path] = []
        for pattern in self.paths:
            if not os.path.isabs(pattern):
                if not os.environ.get(DATA_DIR_VARIABLE):
                    return None
                pattern = os.path.join(glob.escape(os.environ[DATA_DIR_VARIABLE]), pattern)
            matches = sorted(glob.glob(pattern))
            if not matches:
                return None
            paths += map(Path, matches)
        return paths


@dataclass(frozen=True)
class Tfds:
    """A split of a TFDS dataset, which TFDS prepares unless $TFDS_DATA_DIR has it already.

    Attributes:
        name: With its version, such as 'super_glue/rte:1.0.2'.
        split: TFDS's name for it, such as 'train' or 'validation[:50%]'.
        record: From an example (bytes are strings by then, arrays lists) to what `Files` read.
    """

    name: str
    split: str
    record: Callable[[dict[str, Any]], dict[str, Any]] = dict

    def load(self) -> tf.data.Dataset:
        """Returns the split, downloaded if it is not there yet.

        Raises:
            Exception: Whatever a download, a server or a disk can raise.
        """
        if not tfds.builder(self.name).is_prepared() and _is_offline():
            raise ConnectionError("there is no network")
        source = seqio.TfdsDataSource(tfds_name=self.name, splits={self.split: self.split})
        return source.get_dataset(split=self.split, shuffle=False)

    def rows(self, dataset: tf.data.Dataset) -> Iterator[Row]:
        """Yields the records of what `load` returned."""
        for number, example in enumerate(dataset.as_numpy_iterator()):
            place = f"{self.name}, split {self.split}, example {number}"
            yield Row(place, self.record(_plain(example)))


Origin = Files | Tfds
Splits = dict[str, list[Origin]]


class TextSource(seqio.DataSource):
    """A seqio source of texts: reads a split from its official files if they exist, else from TFDS.

    Which of the two is decided when a split is read: importing a task touches no file. Examples
    have `inputs`, `targets`, `id` (a count from 0) and, where the task has them,
    `references`, `choices` and `answer_choices`.
    """

    def __init__(
        self,
        task: str,
        splits: Mapping[str, Sequence[Origin]],
        example: ExampleFn,
        references: bool = False,
        choices: Sequence[str] = (),
        exemplars: str | None = None,
        answer_choices: bool = False,
    ):
        """Describes the source.

        Args:
            task: Its name, for messages.
            splits: The origins of each split, of which the first that exists is read; TFDS counts
                as existing.
            example: From a record to `inputs` and `targets`; None leaves the record out. Raises
                KeyError or ValueError with a sentence for a record that it does not accept.
            references: Whether `example` also gives `references`, a list of all that counts as
                right.
            choices: The answer choices of a classification task: all targets that it has.
            exemplars: The task whose training split has this task's exemplars, by default itself.
            answer_choices: Whether `example` also gives `answer_choices`, a list of the answers
                that a model ranks (none where the example has none).
        """
        super().__init__(splits=tuple(splits))
        self._task = task
        self._origins = {split: tuple(origins) for split, origins in splits.items()}
        self._counts: dict[str, tuple[object, int]] = {}
        self._example = example
        self._choices = tuple(choices)
        self._lists = ("references",) * references + ("choices",) * bool(choices)
        self._lists += ("answer_choices",) * answer_choices
        self.exemplars = exemplars

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """False: a file is read from its start."""
        return False

    def num_input_examples(self, split: str) -> int:
        """Returns the number of examples, for mixtures whose rates go by it: reads all of them.

        Raises:
            UserError: As `examples`.
        """
        files = [Path(shard) for shard in self.list_shards(split)]
        stats = [file.stat() for file in files if file.is_file()]
        version = [files, [(s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats]]
        known = self._counts.get(split)
        if known is None or known[0] != version:
            known = self._counts[split] = version, sum(1 for _ in self.examples(split))
        return known[1]

    def list_shards(self, split: str) -> list[str]:
        """Returns the split's files, TFDS's where there are none."""
        for origin in self._origins_of(split):
            if isinstance(origin, Tfds):  # a version of theirs never changes
                return [origin.name]
            if files := origin.find():
                return [os.fspath(file) for file in files]
        raise self._nothing(split)

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: Any,
    ) -> tf.data.Dataset:
        """Returns the split's examples in the order of its files; the loader shuffles, not this."""
        del shuffle, seed, shard_info, unused
        return from_python(lambda: self.examples(split), lists=self._lists, integers=("id",))

    def examples(self, split: str) -> Iterator[dict[str, Any]]:
        """Yields the split's examples.

        Raises:
            UserError: There is no such split, neither its files nor TFDS have it, or a record is
                bad.
        """
        count = 0
        for place, record in self._rows(split):
            try:
                example = self._example(record)
                if example is None:
                    continue
                target = example["targets"]
                if self._choices and target not in self._choices:
                    hint = nearest(target, self._choices)
                    known = ", ".join(self._choices)
                    raise ValueError(f"target '{target}' is none of {known}.{hint}")
            except (KeyError, ValueError) as error:
                raise located(place, error) from error
            yield {**example, "choices": self._choices, "id": count}
            count += 1

    def _rows(self, split: str) -> Iterator[Row]:
        for origin in self._origins_of(split):
            if isinstance(origin, Tfds):
                try:
                    dataset = origin.load()
                except Exception as error:
                    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                    failed = f"{origin.name} does not come from TFDS ({reason})"
                    raise self._nothing(split, failed) from error
                yield from origin.rows(dataset)
                return
            if files := origin.find():
                yield from origin.read(files)
                return
        raise self._nothing(split)

    def _origins_of(self, split: str) -> tuple[Origin, ...]:
        if split not in self._origins:
            hint = nearest(split, self._origins)
            known = ", ".join(self._origins)
            raise UserError(f"Task '{self._task}' has no split '{split}', only {known}.{hint}")
        return self._origins[split]

    def _nothing(self, split: str, tfds: str = "") -> UserError:
        """Returns the error for a split that no origin has: it says what would provide it."""
        start = f"Task '{self._task}', split '{split}', "
        files = [", ".join(o.paths) for o in self._origins_of(split) if isinstance(o, Files)]
        if not files:
            return UserError(f"{start}{tfds}; {_TFDS_NEEDS}.")
        missing = f"has no file {' and no '.join(files)}"
        if os.path.isabs(files[0]):
            return UserError(f"{start}{missing}.")
        data_dir = os.environ.get(DATA_DIR_VARIABLE) or "which is not set"
        missing += f" below ${DATA_DIR_VARIABLE} ({data_dir})"
        if not tfds:
            return UserError(f"{start}{missing}; put the official files there.")
        return UserError(
            f"{start}{missing}, and {tfds}; put the official files there, or {_TFDS_NEEDS}."
        )


def add(
    name: str,
    splits: Mapping[str, Sequence[Origin]],
    example: ExampleFn,
    metric_fns: Sequence[Callable[..., Any]],
    postprocess_fn: Callable[..., str],
    references: bool = False,
    choices: Sequence[str] = (),
    exemplars: str | None = None,
    answer_choices: bool = False,
    add_eos_to_inputs: bool = True,
) -> None:
    """Registers a seqio task of texts.

    The arguments are those of `TextSource`, `seqio.Task` and `text_features`.
    """
    seqio.TaskRegistry.add(
        name,
        source=TextSource(name, splits, example, references, choices, exemplars, answer_choices),
        preprocessors=[],
        output_features=text_features(add_eos_to_inputs),
        postprocess_fn=postprocess_fn,
        metric_fns=list(metric_fns),
    )


def _is_offline() -> bool:
    """Whether this machine cannot resolve host names; TFDS would try for minutes."""
    if urllib.request.getproxies():
        return False
    try:
        socket.getaddrinfo("storage.googleapis.com", 443)
    except OSError:
        return True
    return False


def _plain(value: Any) -> Any:
    """Turns TFDS's arrays and bytes into what JSON holds: strings, numbers, lists and dicts."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.generic):
        return value.item()
    return value.decode("utf-8") if isinstance(value, bytes) else value
