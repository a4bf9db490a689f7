"""Finds the tokenized cache of a task or mixture; `build` builds it.

A cache is a folder named after its task, its split and a hash of everything that could change its
content: the task's source files, the lengths, the vocabulary. It appears under that name only when
it is complete. A mixture's folder holds the rates, and of which content of its tasks they are. What
cannot be in the hash (raw files, seqio's version) is recorded in `info.json`; a cache that
disagrees is built again.

The key is computed without seqio or tensorflow, so neither is imported where a cache is ready.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from robust_ft import buckets
from robust_ft.data import fingerprints, mirror, quiet
from robust_ft.data.file_task import FileTask
from robust_ft.errors import UserError
from robust_ft.files import read_json
from robust_ft.ranges import Range, check_ranges
from robust_ft.vocabulary import Vocabulary

# Incremented when records, info.json or the tokenization change: then no old cache is read.
FORMAT = 4
EXAMPLES = "examples.array_record"
INFO, MIXTURE = mirror.MARKERS
BUILDS = 3  # attempts at a cache that is out of date as soon as it is built


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """What to read: plain data, hashable.

    Attributes:
        task: Name of a seqio task or mixture.
        module: Python module that registers it when imported, such as 'tasks.superglue'; None
            where all is in `file_tasks`.
        split: Name of one of its splits.
        inputs_length: Maximum number of input tokens, EOS included; longer inputs are truncated.
        targets_length: The same for targets.
        vocabulary: Turns the task's texts into ids.
        cache_dir: Folder of all caches; default $ROBUST_FT_CACHE_DIR, else ~/.cache/robust_ft. If
            it is in a bucket, each host has a copy.
        file_tasks: Tasks in a user's own files, known beside those of the module.
    """

    task: str
    module: str | None = None
    split: str = "train"
    # At least one token and the end of the sequence.
    inputs_length: Annotated[int, Range(least=2)]
    targets_length: Annotated[int, Range(least=2)]
    vocabulary: Vocabulary
    cache_dir: str | None = None
    file_tasks: tuple[FileTask, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "file_tasks", tuple(self.file_tasks))
        check_ranges(self, f" of task '{self.task}'")

    @property
    def lengths(self) -> dict[str, int]:
        """The maximum lengths by feature."""
        return {"inputs": self.inputs_length, "targets": self.targets_length}


@dataclass(frozen=True)
class CacheInfo:
    """The content of `info.json` of one task's cache.

    Attributes:
        task: seqio's name.
        split: Name of the split.
        num_examples: Records in the cache.
        num_truncated: Examples truncated to the maximum length, by feature ('inputs', 'targets').
        max_length: Tokens of the longest example before truncation, by feature.
        num_tokens: Tokens of all examples after truncation, EOS included, by feature.
        metrics: Names for `robust_ft.metrics.get`; of functions from elsewhere 'module:name'.
        postprocess: Name of the postprocessing function likewise, '' if there is none.
        refused: Why the task cannot be evaluated, a sentence for each function without a name.
        token_dtype: numpy type of ids in the records.
        raw_files: Files that the examples were read from, as far as the task's source names them.
        seqio_version: Version of the seqio that ran the task.
        num_dropped_exemplars: Exemplars of a k-shot task that did not fit into the inputs.
        num_references: Examples that list what counts as right; the others have a single target.
        is_random: Whether the task draws random numbers, of which the cache keeps one draw.
        content: A hash of the examples before they are tokenized, wherever they come from; a run's
            record knows them by it.
    """

    task: str
    split: str
    num_examples: int
    num_truncated: Mapping[str, int]
    max_length: Mapping[str, int]
    num_tokens: Mapping[str, int]
    metrics: tuple[str, ...]
    postprocess: str
    refused: tuple[str, ...]
    token_dtype: str
    raw_files: tuple[fingerprints.RawFile, ...]
    seqio_version: str
    num_dropped_exemplars: int = 0
    num_references: int = 0
    is_random: bool = False
    content: str = ""


@dataclass(frozen=True)
class CachedTask:
    """One task of a ready cache: its folder and its share (unnormalized) in the mixture."""

    directory: str
    task: str
    rate: float
    info: CacheInfo

    @property
    def examples_file(self) -> str:
        """The ArrayRecord file of the examples."""
        return os.path.join(self.directory, EXAMPLES)


def ensure(data: TaskData) -> list[CachedTask]:
    """Returns the ready cache of `data`, a mixture's tasks in the order of their names.

    Builds what is missing or was built from raw files that have changed since. seqio and
    tensorflow are imported only for that.

    Raises:
        UserError: If the module, the task or the split does not exist, or has no examples.
    """
    ready = load(data)
    if ready is None:
        with quiet.without_native_log():
            try:
                from robust_ft.data import build  # the one import that brings in tensorflow
            except ModuleNotFoundError as error:
                raise UserError(
                    f"There is no cache of task '{data.task}', split '{data.split}' at "
                    f"{directory(data)}, and {error.name}, which builds it, is not installed."
                ) from error

        # Repeated if raw files changed during the build, or if another process, where files cannot
        # be locked, was just replacing the cache with its own.
        for _ in range(BUILDS):
            build.build(data)
            if (ready := load(data)) is not None:
                return ready
        raise UserError(
            f"The source or data files of task '{data.task}' keep changing while its cache is "
            "built; try again when they are still."
        )
    return ready


def load(data: TaskData) -> list[CachedTask] | None:
    """Returns the ready cache of `data`, None if it is missing, incomplete or out of date."""
    source = fingerprints.module_fingerprint(data.module)
    folder = directory(data, source)
    mirror.fetch(folder)
    mixture = read_json(folder / MIXTURE, default=None)
    rates = mixture["rates"] if mixture else {data.task: 1.0}
    read = [fingerprints.RawFile(**raw) for raw in mixture["raw_files"]] if mixture else []
    if any(map(fingerprints.has_changed, read)):
        return None
    tasks = []
    for task, rate in rates.items():
        folder = directory(dataclasses.replace(data, task=task), source)
        if mixture:
            mirror.fetch(folder)
        info = read_info(folder)
        if info is None:
            return None
        if mixture and mixture["content"][task] != info.content:
            return None  # the rates are those of other examples
        tasks.append(CachedTask(str(folder), task, rate, info))
    return tasks


def directory(data: TaskData, source: str | None = None) -> Path:
    """Returns the folder where the cache of `data` is or would be.

    Args:
        data: What to read.
        source: The module's `fingerprints.module_fingerprint`, if it is known already.

    Raises:
        UserError: If there is no such module or vocabulary file.
    """
    dependencies = {
        "format": FORMAT,
        "task": data.task,
        "split": data.split,
        "inputs_length": data.inputs_length,
        "targets_length": data.targets_length,
        "vocabulary": data.vocabulary.fingerprint,
        "source": source or fingerprints.module_fingerprint(data.module),
    }
    # Of derived tasks too, whose names begin with the task's (`task_names`).
    if any(f"{data.task}_".startswith(f"{task.name}_") for task in data.file_tasks):
        dependencies["files"] = [task.definition for task in data.file_tasks]
    key = hashlib.sha256(json.dumps(dependencies, sort_keys=True).encode()).hexdigest()
    name = re.sub(r"[^\w.]+", "_", f"{data.task}-{data.split}").strip("_")
    return root(data.cache_dir) / f"{name}-{key[:16]}"


def root(cache_dir: str | None = None) -> Path:
    """Returns the folder of all caches on this host: `cache_dir`, or the default (see `TaskData`).

    Of a folder in a bucket, that of its copies.
    """
    folder = cache_dir or os.environ.get("ROBUST_FT_CACHE_DIR") or "~/.cache/robust_ft"
    return mirror.folder_of(folder) if buckets.is_bucket(folder) else Path(folder).expanduser()


def read_info(folder: Path) -> CacheInfo | None:
    """Returns a task's info, None if the folder is not complete or out of date."""
    fields = read_json(folder / INFO, default=None)
    if fields is None or not (folder / EXAMPLES).is_file():
        return None
    raw_files = tuple(fingerprints.RawFile(**raw) for raw in fields.pop("raw_files"))
    fields |= {name: tuple(fields[name]) for name in ("metrics", "refused")}
    info = CacheInfo(**fields, raw_files=raw_files)
    current = seqio_version() in (info.seqio_version, None)
    return info if current and not any(fingerprints.has_changed(raw) for raw in raw_files) else None


def seqio_version() -> str | None:
    """Returns the version of the installed seqio without importing it, None if there is none.

    A machine without seqio accepts a cache of any version.
    """
    try:
        return importlib.metadata.version("seqio")
    except importlib.metadata.PackageNotFoundError:
        return None
