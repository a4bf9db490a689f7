"""Builds the tokenized cache: runs a seqio task or mixture once, on the only tensorflow we use.

A split is written in parts (`parts`): a build that was killed goes on with those it finds, and
several processes can each write some. The complete folder appears by one rename (`publishing`).
"""

import contextlib
import dataclasses
import importlib
import itertools
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import seqio
import tensorflow as tf
from absl import logging

from robust_ft import console
from robust_ft.data import (
    cache,
    derived,
    fingerprints,
    mirror,
    own_files,
    parts,
    publishing,
    records,
    seqio_tasks,
    task_functions,
    task_rows,
    tokenization,
)
from robust_ft.data.parts import Counts, Parts
from robust_ft.data.tokenization import FeatureTokenizer
from robust_ft.errors import UserError, nearest
from robust_ft.files import write_json

with contextlib.suppress(RuntimeError):  # raised if tensorflow already runs
    # Otherwise tensorflow takes all memory of the accelerators that JAX is about to use.
    for _kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], _kind)

_FEATURES = task_rows.FEATURES
_PROGRESS_SECONDS = 5.0
_MANY = 4  # tasks a process from which on all processes have about as much to do
_DRAWN = 64  # examples that are compared to find out whether a task draws random numbers
PART = 20_000  # examples; a killed build loses one part, a second or two of work

# Fingerprint of each module when it was imported: Python keeps the old code if its files change.
_imported: dict[str, str] = {}


def build(data: cache.TaskData) -> None:
    """Builds what is missing of the cache of a task, or of all of a mixture's tasks.

    Raises:
        UserError: If the task or split does not exist, is empty, or does not suit the vocabulary.
    """
    source = _import(data.module)
    provider, tasks = _find(data)
    for task in tasks:
        _build_task(task, dataclasses.replace(data, task=task.name), source)
    if isinstance(provider, seqio.Mixture):
        _build_mixture(provider, tasks, data, source)


def _build_mixture(
    mixture: seqio.Mixture, tasks: Sequence[seqio.Task], data: cache.TaskData, source: str
) -> None:
    """Writes the rates of a mixture, with the content of what they may have been computed from."""
    content, raw_files = {}, []
    for task in tasks:
        folder = cache.directory(dataclasses.replace(data, task=task.name), source)
        if (info := cache.read_info(folder)) is None:
            return  # changed since it was built; `cache.ensure` builds again
        content[task.name] = info.content
        if data.split != "train" and "train" in task.splits:  # by which rates usually go
            raw_files += [dataclasses.asdict(raw) for raw in _raw_files(task, "train")]
    rates = {task.name: _rate(mixture, task) for task in tasks}
    with publishing.new_folder(cache.directory(data, source)) as folder:
        fields = {"rates": rates, "content": content, "raw_files": raw_files}
        write_json(folder / cache.MIXTURE, {"mixture": data.task, **fields})
    mirror.put(cache.directory(data, source))


def _rate(mixture: seqio.Mixture, task: seqio.Task) -> float:
    try:
        rate = float(mixture.get_rate(task))
    except TypeError as error:
        for each in mixture.tasks:
            if "train" in each.splits and each.num_input_examples("train") is None:
                raise UserError(
                    f"The rates of mixture '{mixture.name}' go by numbers of examples, and the "
                    f"source of task '{each.name}' does not say how many it has; give it "
                    "num_input_examples=..., or the mixture rates that are numbers."
                ) from error
        raise
    if not 0 < rate < math.inf:  # also for NaN
        raise UserError(
            f"Mixture '{mixture.name}' gives task '{task.name}' the rate {rate:g}; it must be a "
            "positive number."
        )
    return rate


def build_share(missing: Sequence[cache.TaskData], index: int, count: int) -> None:
    """Builds one of `count` shares of what is missing; a later `build` joins them.

    A share is every `count`-th task. Where there are few tasks it is every `count`-th part of each:
    every process then reads all examples, and only tokenizing is shared.

    Raises:
        UserError: As `build`.
    """
    jobs = {}
    for data in missing:
        source = _import(data.module)
        for task in _find(data)[1]:
            jobs[dataclasses.replace(data, task=task.name)] = task, source
    by_task = len(jobs) >= _MANY * count
    for number, (data, (task, source)) in enumerate(jobs.items()):
        if not by_task:
            # Shifted for each task: small tasks have one part, and all would be share 0's.
            _build_parts(task, data, source, (index - number) % count, count)
        elif number % count == index:
            _build_task(task, data, source)


def _build_parts(
    task: seqio.Task, data: cache.TaskData, source: str, first: int, step: int
) -> None:
    """Writes every `step`-th part, without joining them."""
    final = cache.directory(data, source)
    with publishing.exclusive(final) as is_alone:
        if not is_alone or cache.read_info(final) is not None:
            return  # without locks each process builds on its own, and nobody would join these
        written = _open_parts(task, data.split, parts.folder_of(final))
    try:
        _write_parts(task, data, written, lambda number: number % step == first)
    except (OSError, RuntimeError):
        if cache.read_info(final) is None:
            raise  # otherwise another process has joined and removed the parts meanwhile


def tasks_of(data: cache.TaskData) -> list[str]:
    """Returns the names of the tasks that have the split: a mixture's, or the task itself.

    Raises:
        UserError: If the module, the task or the split does not exist.
    """
    _import(data.module)
    return [task.name for task in _find(data)[1]]


def any_split(data: cache.TaskData) -> str:
    """Returns the split of `data`, or another one if the task has none of that name.

    Raises:
        UserError: If the module or the task does not exist.
    """
    _import(data.module)
    provider = derived.find(data.task)
    if provider is None or data.split in provider.splits:
        return data.split
    splits: list[str] = sorted(provider.splits)
    return splits[-1]


def find_task(data: cache.TaskData) -> seqio.Task:
    """Returns the task.

    Raises:
        UserError: As `tasks_of`; or if `data` names a mixture of several tasks.
    """
    _import(data.module)
    [task] = _find(data)[1]
    return task


def _find(data: cache.TaskData) -> tuple[seqio.Task | seqio.Mixture, list[seqio.Task]]:
    """Returns the task or mixture, and those of its tasks that have the split."""
    for file_task in data.file_tasks:
        own_files.register(file_task)
    provider = _get_provider(data)
    if isinstance(provider, seqio.Task):
        return provider, [provider]
    tasks = [task for task in provider.tasks if data.split in task.splits]
    without = [task.name for task in provider.tasks if data.split not in task.splits]
    if without:
        logging.warning(
            "Mixture '%s' leaves out tasks without a split '%s': %s",
            data.task,
            data.split,
            ", ".join(without),
        )
    return provider, tasks


def _import(module: str | None) -> str:
    source = fingerprints.module_fingerprint(module)
    if module is None:
        return source
    if _imported.setdefault(module, source) != source:
        raise UserError(
            f"The task module '{module}' has changed since it was imported; start Python again."
        )
    importlib.import_module(module)
    return source


def _get_provider(data: cache.TaskData) -> seqio.Task | seqio.Mixture:
    provider = derived.find(data.task)
    if provider is None:
        known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
        hint = nearest(data.task, known)
        place = f"Module '{data.module}' registers" if data.module else "TaskData.file_tasks has"
        raise UserError(f"{place} no task or mixture '{data.task}'.{hint}")
    if data.split not in provider.splits:
        splits = sorted(provider.splits)
        hint = nearest(data.split, splits)
        raise UserError(
            f"Task '{data.task}' has no split '{data.split}', only {', '.join(splits)}.{hint}"
        )
    return provider


def _build_task(task: seqio.Task, data: cache.TaskData, source: str) -> None:
    final = cache.directory(data, source)
    with publishing.exclusive(final) as is_alone:
        if cache.read_info(final) is not None:
            return
        with publishing.new_folder(final) as folder:
            # Without locks, another process might finish with a shared folder first and remove it.
            own = folder.with_name(f"{folder.name}.parts")
            parts_folder = parts.folder_of(final) if is_alone else own
            try:
                info = _write_examples(task, data, folder, parts_folder)
            except UserError:  # the data are at fault: what was made of them is of no use
                shutil.rmtree(parts_folder, ignore_errors=True)
                raise
            write_json(folder / cache.INFO, dataclasses.asdict(info))
        mirror.put(final)
        shutil.rmtree(parts_folder)
    _report(info, data)


def _report(info: cache.CacheInfo, data: cache.TaskData) -> None:
    """Warns of what was left out or truncated."""
    if info.num_dropped_exemplars:
        logging.warning(
            "Task '%s', split '%s': %d exemplars are left out of the %d examples, since they would "
            "not fit into %d tokens.",
            info.task,
            info.split,
            info.num_dropped_exemplars,
            info.num_examples,
            data.inputs_length,
        )
    for feature in _FEATURES:
        if info.num_truncated[feature]:
            logging.warning(
                "Task '%s', split '%s': %d of %d examples have their %s cut to %d tokens "
                "(the longest has %d).",
                info.task,
                info.split,
                info.num_truncated[feature],
                info.num_examples,
                feature,
                data.lengths[feature],
                info.max_length[feature],
            )


def _write_examples(
    task: seqio.Task, data: cache.TaskData, folder: Path, parts_folder: Path
) -> cache.CacheInfo:
    written = _open_parts(task, data.split, parts_folder)
    if not written.are_complete():
        _write_parts(task, data, written, lambda number: True)
    counts = written.join(folder / cache.EXAMPLES)
    if not counts.num_examples:
        raise UserError(f"Task '{data.task}' has no examples in its split '{data.split}'.")
    raw_files = written.identity["raw_files"]
    functions = task_functions.named(task, data.module)
    return cache.CacheInfo(
        task=data.task,
        split=data.split,
        **functions._asdict(),
        token_dtype=records.token_dtype(data.vocabulary.vocab_size),
        raw_files=tuple(fingerprints.RawFile(**raw) for raw in raw_files),
        seqio_version=written.identity["seqio_version"],
        is_random=_is_random(task, data),
        **dataclasses.asdict(counts),
    )


def _is_random(task: seqio.Task, data: cache.TaskData) -> bool:
    """Whether the first examples differ with another seed."""
    while isinstance(task.source, derived.DerivedSource):
        task = task.source.base
    if not task.preprocessors:
        return False
    contents = []
    for seed in (0, 1):
        examples = task_rows.dataset(task, data.split, data.lengths, seed).take(_DRAWN)
        counts = Counts()
        for number, row in enumerate(task_rows.rows(examples)):
            counts.example(number, row)
        contents.append(counts.content)
    return contents[0] != contents[1]


def _open_parts(task: seqio.Task, split: str, folder: Path) -> Parts:
    # Hashed before they are read, so that a file that changes meanwhile makes the cache stale.
    raw_files = [dataclasses.asdict(raw) for raw in _raw_files(task, split)]
    identity = {"raw_files": raw_files, "seqio_version": cache.seqio_version() or "", "size": PART}
    return Parts(folder, identity)


def _write_parts(
    task: seqio.Task, data: cache.TaskData, written: Parts, is_ours: Callable[[int], bool]
) -> None:
    """Writes the missing parts that `is_ours` accepts; the examples of others are only read."""
    tokenizers = {feature: FeatureTokenizer(task, feature, data) for feature in _FEATURES}
    rows = task_rows.rows(task_rows.dataset(task, data.split, data.lengths))
    # Our own sources would have to read all examples to count them.
    is_own = isinstance(task.source, seqio_tasks.TextSource | derived.DerivedSource)
    total = None if is_own else task.num_input_examples(data.split)
    progress = _Progress(f"{data.task} {data.split}", total)
    seen = 0
    for number in itertools.count():
        first = next(rows, None)
        if first is None:
            break
        block = itertools.chain([first], itertools.islice(rows, PART - 1))
        if written.counts(number) is None and is_ours(number):
            counts = Counts()
            written.write(number, _records(block, data, tokenizers, counts, progress, seen), counts)
            seen += counts.num_examples
        else:
            seen += sum(1 for _ in block)
    written.end(number)
    progress.done(seen)


def _records(
    rows: Iterator[dict[str, Any]],
    data: cache.TaskData,
    tokenizers: Mapping[str, FeatureTokenizer],
    counts: Counts,
    progress: "_Progress",
    seen: int,
) -> Iterator[bytes]:
    """Yields the records of rows, and adds them to `counts`; `seen` examples came before."""
    dtype = records.token_dtype(data.vocabulary.vocab_size)
    is_training = data.split.startswith("train")
    for row in rows:
        counts.example(seen + counts.num_examples, row)
        if "exemplars" in row:
            counts.num_dropped_exemplars += fit_exemplars(row, tokenizers["inputs"])
        features = {name: tokenize(row) for name, tokenize in tokenizers.items()}
        for name, tokenized in features.items():
            counts.feature(name, tokenized.length, len(tokenized.ids))
        counts.num_references += len(row.get("references", ())) > 0
        # Training reads ids alone, and most of a cache would be texts.
        is_evaluated = not is_training or task_rows.WHOLE in row
        texts = tokenization.texts(row, features, data.vocabulary, is_evaluated)
        yield records.encode(features["inputs"].ids, features["targets"].ids, dtype, texts)
        counts.num_examples += 1
        progress(seen + counts.num_examples)


def fit_exemplars(example: dict[str, Any], tokenizer: FeatureTokenizer) -> int:
    """Replaces a k-shot example's inputs by those with the exemplars that fit; returns the rest."""
    exemplars = [text.decode("utf-8") for text in example["exemplars"].tolist()]
    text, kept = derived.fit(exemplars, example["query"].decode("utf-8"), tokenizer.fits)
    example["inputs"] = text.encode("utf-8")
    return len(exemplars) - len(kept)


def _raw_files(task: seqio.Task, split: str) -> tuple[fingerprints.RawFile, ...]:
    if isinstance(task.source, seqio.FunctionDataSource):
        return ()  # it reads no files: its only "shard" is the name of the split
    shards = [os.fspath(shard) for shard in task.source.list_shards(split)]
    return tuple(fingerprints.describe_file(shard) for shard in shards if os.path.isfile(shard))


class _Progress:
    """Prints the progress of a long build; builds of a few seconds print nothing."""

    def __init__(self, name: str, total: int | None):
        self._name, self._total = name, total
        self._start = self._last = 0.0

    def __call__(self, count: int) -> None:
        now = time.monotonic()
        if count == 1:  # a task's preparations before its first example do not count in its rate
            self._start = self._last = now
        if now - self._last >= _PROGRESS_SECONDS:
            self._last = now
            self._print(count, now)

    def done(self, count: int) -> None:
        """Prints the final count, if anything was printed before."""
        if self._last != self._start:
            self._print(count, time.monotonic())

    def _print(self, count: int, now: float) -> None:
        rate = count / max(now - self._start, 1e-9)
        total, left = "", ""
        if self._total and self._total > count:
            total = f"/{self._total}"
            left = f"  {console.duration((self._total - count) / rate)} left"
        console.print_line(f"[cache {self._name}] {count}{total} examples  {rate:.0f}/s{left}")
