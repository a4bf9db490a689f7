"""k-shot and label-shuffled versions of every seqio task and mixture, registered on first use.

The names are those of `robust_ft.task_names`: `<task>_<k>shot`, `<task>_shuffled` (for ProMoT's
format gradient), both also with `_seed<n>`. A task registered under such a name takes precedence.

Every example has its own exemplars, in training splits too (ProMoT + 1-shot): distinct ones, never
one with the example's own inputs. What is drawn is a function of (seed, example id) and the task's
training split alone. Exemplars that do not fit into the run's input length are dropped and counted
when the cache is built (`fit`): the vocabulary is not known earlier.
"""

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import seqio
import tensorflow as tf

from robust_ft import task_names
from robust_ft.data import task_rows
from robust_ft.data.seqio_tasks import from_python
from robust_ft.errors import UserError

# Sentencepiece vocabularies read this as one space.
SEPARATOR = "\n\n"
# Exemplars are drawn from this many first training examples: they are held in memory.
POOL = 50_000
# Targets are shuffled within blocks of this many consecutive examples, for the same reason.
BLOCK = 100_000


class Exemplar(NamedTuple):
    """A training example as text."""

    inputs: str
    targets: str


def find(name: str) -> seqio.Task | seqio.Mixture | None:
    """Returns the task or mixture called `name`, None if there is none.

    A derived one that is not registered yet is registered now, for a mixture with all its tasks.

    Raises:
        UserError: No training split provides its exemplars.
    """
    if name in seqio.TaskRegistry.names() or name in seqio.MixtureRegistry.names():
        return seqio.get_mixture_or_task(name)
    derived = task_names.parse(name)
    base = find(derived.base) if derived else None
    if derived is None or base is None:
        return None
    if isinstance(base, seqio.Mixture):
        # Functions, for rates that follow the base's tasks, as when one's file grows.
        rates = [
            (str(derived._replace(base=task.name)), functools.partial(_base_rate, base, task))
            for task in base.tasks
        ]
        for task_name, _ in rates:
            find(task_name)
        return seqio.MixtureRegistry.add(name, rates)
    seed = derived.seed or 0
    source: seqio.DataSource
    if derived.shots:
        source = _ShotsSource(base, derived.shots, seed)
    else:
        source = _ShuffledSource(base, seed)
    return seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[],
        output_features=base.output_features,
        postprocess_fn=base.postprocessor,
        metric_fns=list(base.metric_fns),
    )


def _base_rate(base: seqio.Mixture, task: seqio.Task, derived: seqio.Task) -> float:
    del derived
    rate: float = base.get_rate(task)
    return rate


def forget(name: str) -> None:
    """Unregisters a task and all that is derived from it, so that its name is free again."""
    for other in list(seqio.TaskRegistry.names()):
        is_derived = isinstance(seqio.TaskRegistry.get(other).source, DerivedSource)
        if other == name or (is_derived and other.startswith(f"{name}_")):
            seqio.TaskRegistry.remove(other)


def draw(
    pool: Sequence[Exemplar], query: str, shots: int, seed: int, example_id: int
) -> list[Exemplar]:
    """Returns `shots` exemplars with different inputs, none of them `query`.

    Args:
        pool: What to draw from, with at least `shots` distinct inputs other than `query`.
        query: The inputs of the example that the exemplars are for.
        shots: Number of exemplars.
        seed: The seed in the task's name.
        example_id: Id of the example in its split.
    """
    chosen: dict[str, Exemplar] = {}
    for attempt in itertools.count():
        if len(chosen) == shots:
            break
        exemplar = pool[_random(seed, example_id, attempt) % len(pool)]
        if exemplar.inputs != query:
            chosen.setdefault(exemplar.inputs, exemplar)
    return list(chosen.values())


def fit(
    exemplars: Sequence[str], query: str, fits: Callable[[str], bool]
) -> tuple[str, Sequence[str]]:
    """Returns the input text with the exemplars that fit, and these exemplars.

    If not all fit together, they are added in turn, each if it fits beside those added before.

    Args:
        exemplars: Texts, in their order.
        query: The text of the example itself, which always stays.
        fits: Whether a text fits into the input length.
    """
    if fits(text := _join(exemplars, query)):
        return text, exemplars
    fitting: list[str] = []
    for exemplar in exemplars:
        if fits(_join([*fitting, exemplar], query)):
            fitting.append(exemplar)
    return _join(fitting, query), fitting


def _join(exemplars: Sequence[str], query: str) -> str:
    return SEPARATOR.join([*exemplars, query])


def _random(*parts: int) -> int:
    """Returns 64 random bits that are a function of `parts`, on every machine."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little")


class DerivedSource(seqio.DataSource):
    """A source over the examples of another task, read as texts."""

    def __init__(self, base: seqio.Task):
        super().__init__(splits=tuple(base.splits))
        self.base = base

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """False: examples are numbered from the split's start."""
        return False

    def num_input_examples(self, split: str) -> int | None:
        """Returns the base task's number of examples."""
        number: int | None = self.base.num_input_examples(split)
        return number

    def list_shards(self, split: str) -> list[str]:
        """Returns the files that the split depends on."""
        return _files(self.base, split)

    def _whole(self) -> tuple[str, ...]:
        """The name of the field that the base task's postprocessor may read, if it does."""
        return (task_rows.WHOLE,) * task_rows.keeps_examples(self.base)

    def _texts(self, split: str) -> tuple[tf.data.Dataset, list[str]]:
        """Returns the base task's examples, and the names of their fields that are lists."""
        dataset = task_rows.dataset(self.base, split)
        for feature in task_rows.FEATURES:
            if dataset.element_spec[feature].dtype != tf.string:
                raise UserError(
                    f"Task '{self.base.name}' makes token ids, so it has no k-shot or shuffled "
                    "version; that needs a task of texts."
                )
        return dataset, [name for name in task_rows.LISTS if name in dataset.element_spec]


class _ShotsSource(DerivedSource):
    """Examples with exemplars before them: `inputs` joins `exemplars` and `query`."""

    def __init__(self, base: seqio.Task, shots: int, seed: int):
        super().__init__(base)
        self._shots, self._seed = shots, seed
        # A task without a training split (OOD data) names the task whose exemplars it takes.
        name = getattr(base.source, "exemplars", None) or base.name
        owner = find(name)
        if not isinstance(owner, seqio.Task) or "train" not in owner.splits:
            raise UserError(
                f"Task '{base.name}' has no {shots}-shot version, since its exemplars would come "
                f"from '{name}', which is no task with a split 'train'."
            )
        self._owner = owner

    def list_shards(self, split: str) -> list[str]:
        """Returns the files of the split and of the exemplars."""
        files = [*super().list_shards(split), *_files(self._owner, "train")]
        return list(dict.fromkeys(files))

    def get_dataset(
        self, split: str = "train", shuffle: bool = True, seed: int | None = None, **unused: Any
    ) -> tf.data.Dataset:
        """Returns the split in its order; the exemplars depend on the seed in the task's name."""
        del shuffle, seed, unused
        dataset, lists = self._texts(split)
        return from_python(
            lambda: self._examples(dataset, lists),
            texts=("inputs", "targets", "query", *self._whole()),
            lists=("exemplars", *lists),
            integers=("id",),
        )

    def _examples(self, dataset: tf.data.Dataset, lists: list[str]) -> Iterator[dict[str, Any]]:
        train = task_rows.dataset(self._owner, "train").take(POOL)
        pool = [Exemplar(row["inputs"], row["targets"]) for row in _numbered(train, [])]
        distinct = {exemplar.inputs for exemplar in pool}
        for example in _numbered(dataset, lists):
            query = example["inputs"]
            if len(distinct) - (query in distinct) < self._shots:
                raise UserError(
                    f"Task '{self._owner.name}' has not {self._shots} training examples that differ"
                    f" from example {example['id']} of '{self.base.name}'."
                )
            drawn = draw(pool, query, self._shots, self._seed, example["id"])
            exemplars = [f"{exemplar.inputs} {exemplar.targets}" for exemplar in drawn]
            text = _join(exemplars, query)
            yield {**example, "inputs": text, "query": query, "exemplars": exemplars}


class _ShuffledSource(DerivedSource):
    """Examples whose targets, with their references, are permuted within the split."""

    def __init__(self, base: seqio.Task, seed: int):
        super().__init__(base)
        self._seed = seed

    def get_dataset(
        self, split: str = "train", shuffle: bool = True, seed: int | None = None, **unused: Any
    ) -> tf.data.Dataset:
        """Returns the split in its order; the targets depend on the seed in the task's name."""
        del shuffle, seed, unused
        dataset, lists = self._texts(split)
        return from_python(
            lambda: self._examples(dataset, lists),
            texts=("inputs", "targets", *self._whole()),
            lists=tuple(lists),
            integers=("id",),
        )

    def _examples(self, dataset: tf.data.Dataset, lists: list[str]) -> Iterator[dict[str, Any]]:
        known = ("targets", *lists, *self._whole())
        moved = [n for n in ("targets", "references", task_rows.WHOLE) if n in known]
        examples = _numbered(dataset, lists)
        while block := list(itertools.islice(examples, BLOCK)):
            # A permutation that is a function of the seed and the examples' ids alone.
            permuted = sorted(block, key=lambda example: _random(self._seed, example["id"]))
            for example, other in zip(block, permuted, strict=True):
                yield {**example, **{name: other[name] for name in moved}}


def _numbered(dataset: tf.data.Dataset, lists: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields examples as strings; `id` is the task's own, else the position in the split."""
    for number, row in enumerate(task_rows.rows(dataset)):
        example: dict[str, Any] = {"id": int(row.get("id", number))}
        for feature in task_rows.FEATURES:
            example[feature] = row[feature].decode("utf-8")
        for name in lists:
            example[name] = [text.decode("utf-8") for text in row[name].tolist()]
        if task_rows.WHOLE in row:
            example[task_rows.WHOLE] = row[task_rows.WHOLE]
        yield example


def _files(task: seqio.Task, split: str) -> list[str]:
    if isinstance(task.source, seqio.FunctionDataSource):
        return []  # it reads no files: its only "shard" is the name of the split
    return list(task.source.list_shards(split))
