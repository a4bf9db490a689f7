"""Builds the tokenized cache: runs a seqio task or mixture once, on the only tensorflow we use.

A split is written in parts, which a build that was killed finds again, and several processes share.
The folder of all is made beside its final place and renamed when complete, so nothing incomplete
looks ready, and two builds at once end with one of two equal results.
"""

import contextlib
import dataclasses
import fcntl
import importlib
import itertools
import os
import shutil
import socket
import tempfile
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
    columns,
    derived,
    fingerprints,
    own_files,
    parts,
    records,
    task_rows,
)
from robust_ft.data.columns import Column
from robust_ft.data.parts import Counts, Parts
from robust_ft.errors import UserError, nearest
from robust_ft.files import write_json

with contextlib.suppress(RuntimeError):  # raised if tensorflow already runs
    # Otherwise tensorflow takes all memory of the accelerators that JAX is about to use.
    for _kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], _kind)

_FEATURES = task_rows.FEATURES
_PROGRESS_SECONDS = 5.0
_MANY = 4  # tasks a process, of which all have about as much to do
PART = 20_000  # examples: what a build loses at most when it is killed, a second or two of work

# What a module's sources were when we imported it: Python keeps the old code if they change.
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
        rates = {task.name: provider.get_rate(task) for task in tasks}
        if min(rates.values()) <= 0:
            raise UserError(
                f"Mixture '{data.task}' gives a task a rate that is not positive: {rates}."
            )
        with _publishing(cache.directory(data, source)) as folder:
            write_json(folder / cache.MIXTURE, {"mixture": data.task, "rates": rates})


def build_share(found: Sequence[cache.TaskData], index: int, count: int) -> None:
    """Builds one of `count` shares of what is missing, for `build` to join.

    A share is every `count`-th task; where they are few, every `count`-th part of each, for which
    every process reads all of it: only tokenizing is shared.

    Raises:
        UserError: As `build`.
    """
    jobs = {}
    for data in found:
        source = _import(data.module)
        for task in _find(data)[1]:
            jobs[dataclasses.replace(data, task=task.name)] = task, source
    by_task = len(jobs) >= _MANY * count
    for number, (data, (task, source)) in enumerate(jobs.items()):
        if not by_task:
            # Each task's first part is another share's: there may be no second one.
            _build_parts(task, data, source, (index - number) % count, count)
        elif number % count == index:
            _build_task(task, data, source)


def _build_parts(
    task: seqio.Task, data: cache.TaskData, source: str, first: int, step: int
) -> None:
    """Writes every `step`-th part, without joining them."""
    final = cache.directory(data, source)
    with _only_one(final) as is_alone:
        if not is_alone or cache.read_info(final) is not None:
            return  # without locks nobody could join them
        written = _open_parts(task, data.split, parts.folder_of(final))
    try:
        _write_parts(task, data, written, lambda number: number % step == first)
    except (OSError, RuntimeError):
        if cache.read_info(final) is None:
            raise  # else another process was faster, and has removed the parts


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
    found = derived.find(data.task)
    if found is None or data.split in found.splits:
        return data.split
    return sorted(found.splits)[-1]


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
    with _only_one(final) as is_alone:
        if cache.read_info(final) is not None:
            return
        with _publishing(final) as folder:
            # Without locks somebody else might be done with a common folder, and remove it.
            kept = parts.folder_of(final) if is_alone else folder.with_name(f"{folder.name}.parts")
            info = _write_examples(task, data, folder, kept)
            write_json(folder / cache.INFO, dataclasses.asdict(info))
        shutil.rmtree(kept)
    _report(info, data)


def _report(info: cache.CacheInfo, data: cache.TaskData) -> None:
    """Says what was left out or cut."""
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
                getattr(data, f"{feature}_length"),
                info.max_length[feature],
            )


def _write_examples(
    task: seqio.Task, data: cache.TaskData, folder: Path, kept: Path
) -> cache.CacheInfo:
    written = _open_parts(task, data.split, kept)
    if not written.are_complete():
        _write_parts(task, data, written, lambda number: True)
    counts = written.join(folder / cache.EXAMPLES)
    if not counts.num_examples:
        raise UserError(f"Task '{data.task}' has no examples in its split '{data.split}'.")
    raw_files = written.identity["raw_files"]
    return cache.CacheInfo(
        task=data.task,
        split=data.split,
        metrics=tuple(_name(fn) for fn in task.metric_fns),
        postprocess=_name(task.postprocessor) if task.postprocessor else "",
        token_dtype=records.token_dtype(data.vocabulary.vocab_size),
        has_texts=_has_texts(data),
        raw_files=tuple(fingerprints.RawFile(**raw) for raw in raw_files),
        seqio_version=written.identity["seqio_version"],
        **dataclasses.asdict(counts),
    )


def _open_parts(task: seqio.Task, split: str, folder: Path) -> Parts:
    # Described before they are read: a change in the middle makes the cache out of date.
    raw_files = [dataclasses.asdict(raw) for raw in _raw_files(task, split)]
    identity = {"raw_files": raw_files, "seqio_version": cache.seqio_version() or "", "size": PART}
    return Parts(folder, identity)


def _write_parts(
    task: seqio.Task, data: cache.TaskData, written: Parts, is_ours: Callable[[int], bool]
) -> None:
    """Writes those parts that are missing and ours; reads past the others."""
    made = {feature: Column(task, feature, data) for feature in _FEATURES}
    lengths = {"inputs": data.inputs_length, "targets": data.targets_length}
    rows = task_rows.rows(task_rows.dataset(task, data.split, lengths))
    progress = _Progress(f"{data.task} {data.split}", task.num_input_examples(data.split))
    seen = 0
    for number in itertools.count():
        first = next(rows, None)
        if first is None:
            break
        block = itertools.chain([first], itertools.islice(rows, PART - 1))
        if written.counts(number) is None and is_ours(number):
            counts = Counts()
            written.write(number, _records(block, data, made, counts, progress, seen), counts)
            seen += counts.num_examples
        else:
            seen += sum(1 for _ in block)
    written.end(number)
    progress.done(seen)


def _records(
    rows: Iterator[dict[str, Any]],
    data: cache.TaskData,
    made: Mapping[str, Column],
    counts: Counts,
    progress: "_Progress",
    seen: int,
) -> Iterator[bytes]:
    """Yields the rows' records, and counts them."""
    dtype = records.token_dtype(data.vocabulary.vocab_size)
    has_texts = _has_texts(data)
    for row in rows:
        if "exemplars" in row:
            counts.num_dropped_exemplars += fit_exemplars(row, made["inputs"])
        tokens = {}
        for feature, column in made.items():
            tokens[feature] = column.tokens(row)
            counts.feature(feature, column.length, len(tokens[feature]))
        texts = columns.texts(row, tokens, data.vocabulary) if has_texts else None
        yield records.encode(tokens["inputs"], tokens["targets"], dtype, texts)
        counts.num_examples += 1
        progress(seen + counts.num_examples)


def _has_texts(data: cache.TaskData) -> bool:
    return not data.split.startswith("train")


def fit_exemplars(example: dict[str, Any], inputs: Column) -> int:
    """Leaves those exemplars in `inputs` that fit; returns how many do not."""
    exemplars = [text.decode("utf-8") for text in example["exemplars"].tolist()]
    text, kept = derived.fit(exemplars, example["query"].decode("utf-8"), inputs.fits)
    example["inputs"] = text.encode("utf-8")
    return len(exemplars) - len(kept)


def _name(function: Callable[..., Any]) -> str:
    """Returns the name to find a metric or postprocessor by when seqio is not there."""
    while hasattr(function, "func"):  # functools.partial
        function = function.func
    name = getattr(function, "__name__", type(function).__name__)
    module = getattr(function, "__module__", "")
    return name if module.startswith("robust_ft.metrics") else f"{module}:{name}"


def _raw_files(task: seqio.Task, split: str) -> tuple[fingerprints.RawFile, ...]:
    if isinstance(task.source, seqio.FunctionDataSource):
        return ()  # its one "shard" is the name of the split
    shards = [os.fspath(shard) for shard in task.source.list_shards(split)]
    return tuple(fingerprints.describe_file(shard) for shard in shards if os.path.isfile(shard))


@contextlib.contextmanager
def _only_one(final: Path) -> Iterator[bool]:
    """Lets one process of this machine build a folder; another waits and finds it ready.

    Gives whether it is so: where the file system has no locks both build, which costs time only.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    with open(final.parent / f".{final.name}.lock", "w") as lock:
        is_alone = False
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
            is_alone = True
        yield is_alone


@contextlib.contextmanager
def _publishing(final: Path) -> Iterator[Path]:
    """Gives a new folder to fill; renames it to `final` at the end, replacing what is there."""
    final.parent.mkdir(parents=True, exist_ok=True)
    owner = f".{final.name}.{socket.gethostname()}"
    _remove_leftovers(final.parent, owner)
    folder = Path(tempfile.mkdtemp(prefix=f"{owner}.{os.getpid()}.", dir=final.parent))
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp's folders are private, a cache is for all
        try:
            folder.rename(final)
        except OSError:  # there is one
            if cache.read_info(final) is not None:  # another process was faster: theirs is as good
                shutil.rmtree(folder)
                return
            old = folder.with_name(f"{folder.name}.old")
            with contextlib.suppress(FileNotFoundError):
                final.rename(old)
            with contextlib.suppress(OSError):  # another one has done that meanwhile
                folder.rename(final)
            shutil.rmtree(old, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _remove_leftovers(parent: Path, owner: str) -> None:
    """Removes what builds left that were killed on this machine."""
    for folder in parent.glob(f"{owner}.*"):
        pid = folder.name[len(owner) + 1 :].split(".")[0]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (ValueError, PermissionError):
            pass


class _Progress:
    """Says how far a long build is; silent for those of a few seconds."""

    def __init__(self, name: str, total: int | None):
        self._name, self._total = name, total
        self._start = self._last = 0.0

    def __call__(self, count: int) -> None:
        now = time.monotonic()
        if count == 1:  # what a task does before its first example says nothing of its rate
            self._start = self._last = now
        if now - self._last >= _PROGRESS_SECONDS:
            self._last = now
            self._print(count, now)

    def done(self, count: int) -> None:
        """Says that the build is complete, if anything was said before."""
        if self._last != self._start:
            self._print(count, time.monotonic())

    def _print(self, count: int, now: float) -> None:
        rate = count / max(now - self._start, 1e-9)
        total, left = "", ""
        if self._total and self._total > count:
            total = f"/{self._total}"
            left = f"  {console.duration((self._total - count) / rate)} left"
        console.print_line(f"[cache {self._name}] {count}{total} examples  {rate:.0f}/s{left}")
