"""Input pipeline: the cached loader against plain seqio, and how long training waits for it.

    python benchmarks/data.py

Both read the same mixture of the mini world in one process, alternately, for some rounds: seqio
tokenizes, shuffles, mixes, pads and batches texts from memory; the loader does what it does in a
run. The unit is examples per CPU-second of the whole process, since an input pipeline competes with
the training step for cores. Then a recipe trains for some steps, and the benchmark reports the
share of the warmed-up loop's time that is spent waiting for the next batch.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import seqio
import tensorflow as tf

from robust_ft import console, train
from robust_ft.data import build, cache, loader, task_rows
from robust_ft.vocabulary import ByteVocabulary, SentencePieceVocabulary, Vocabulary

TASKS = ("mini_rte", "mini_d2t")
MIXTURE = "mini_rte_d2t"
LENGTHS = {"inputs": 128, "targets": 64}
WARM_STEPS = 20


def seqio_batches(
    data: cache.TaskData, vocabulary: seqio.Vocabulary, batch_size: int
) -> Iterator[Any]:
    """Returns seqio's batches of the mixture, built as in its documentation."""
    feature = seqio.Feature(vocabulary, add_eos=True)
    for name in TASKS:
        task = build.find_task(dataclasses.replace(data, task=name))
        rows = list(task_rows.rows(task_rows.dataset(task, "train")))
        texts = {key: [row[key] for row in rows] for key in task_rows.FEATURES}
        seqio.TaskRegistry.add(
            f"{name}_plain",
            source=seqio.FunctionDataSource(
                lambda split, shuffle_files, seed=None, texts=texts: (
                    tf.data.Dataset.from_tensor_slices(texts)
                ),
                splits=("train",),
            ),
            preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
            output_features=dict.fromkeys(task_rows.FEATURES, feature),
        )
    seqio.MixtureRegistry.add(f"{MIXTURE}_plain", [f"{name}_plain" for name in TASKS], 1.0)
    dataset = seqio.get_dataset(
        f"{MIXTURE}_plain",
        task_feature_lengths=LENGTHS,
        dataset_split="train",
        shuffle=True,
        num_epochs=None,
        seed=0,
        feature_converter=seqio.EncDecFeatureConverter(pack=False),
    )
    batches = dataset.batch(batch_size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
    return batches.as_numpy_iterator()


def per_cpu_second(batches: Iterator[Any], batch_size: int, count: int) -> float:
    """Returns the examples of `count` batches per CPU-second of this process."""
    start = time.process_time()
    for _ in range(count):
        next(batches)
    return count * batch_size / (time.process_time() - start)


def throughput(batch_size: int, count: int, rounds: int, spiece: str | None) -> None:
    """Prints both rates and their ratio."""
    ours: Vocabulary = ByteVocabulary()
    theirs: seqio.Vocabulary = seqio.ByteVocabulary(extra_ids=100)
    if spiece is not None:
        ours = SentencePieceVocabulary(spiece, extra_ids=100)
        theirs = seqio.SentencePieceVocabulary(spiece, extra_ids=100)
    with tempfile.TemporaryDirectory() as folder:
        data = cache.TaskData(
            task=MIXTURE,
            module="tasks.mini",
            inputs_length=LENGTHS["inputs"],
            targets_length=LENGTHS["targets"],
            vocabulary=ours,
            cache_dir=folder,
        )
        cache.ensure(data)
        sources: dict[str, Iterator[Any]] = {
            "seqio.get_dataset": seqio_batches(data, theirs, batch_size),
            "cached loader": loader.train_batches(data, batch_size, seed=0),
        }
        rates: dict[str, list[float]] = {name: [] for name in sources}
        for batches in sources.values():
            per_cpu_second(batches, batch_size, WARM_STEPS)
        for _ in range(rounds):
            for name, batches in sources.items():
                rates[name].append(per_cpu_second(batches, batch_size, count))
    rows = [
        (name, statistics.median(values), min(values), max(values))
        for name, values in rates.items()
    ]
    console.print_table(
        f"Examples per CPU-second, batches of {batch_size}, {rounds} alternating rounds",
        ["", "median", "least", "most"],
        rows,
    )
    ratio = statistics.median(fast / slow for slow, fast in zip(*rates.values(), strict=True))
    console.print_line(f"the loader gives {ratio:.1f} times as many")


def input_wait(recipe: str, steps: int) -> None:
    """Prints the share of a warmed-up training loop that is spent waiting for a batch."""
    calls: list[tuple[float, float]] = []
    make: Callable[..., loader.BatchSource] = loader.train_batches

    class Timed(loader.BatchSource):
        def __next__(self) -> Any:
            start = time.perf_counter()
            batch = super().__next__()
            calls.append((start, time.perf_counter()))
            return batch

    def timed(*args: Any, **kwargs: Any) -> loader.BatchSource:
        source = make(*args, **kwargs)
        source.__class__ = Timed
        return source

    loader.train_batches = timed
    try:
        with tempfile.TemporaryDirectory() as folder:
            flags = {"MODEL_DIR": folder, "TRAIN_STEPS": steps, "EVAL_PERIOD": steps}
            limits = {"EVAL_LIMIT": 2, "TEST_LIMIT": 2, "HELD_OUT_TASKS": "{}"}
            train.main(
                [f"--gin_file=gin_configs/{recipe}.gin"]
                + [f"--gin.{name}={value}" for name, value in {**flags, **limits}.items()]
            )
    finally:
        loader.train_batches = make
    warm = calls[WARM_STEPS:]
    waited = sum(end - start for start, end in warm[:-1])
    share = waited / (warm[-1][0] - warm[0][0])
    console.print_line(
        f"{recipe}: of {len(warm) - 1} warm steps {share:.2%} is waiting for input "
        f"({1e3 * waited / (len(warm) - 1):.2f} ms a step)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=200, help="in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--spiece", metavar="FILE", help="a SentencePiece model; bytes without it")
    parser.add_argument("--recipe", default="full_rte")
    parser.add_argument("--steps", type=int, default=120, help="0 for none")
    arguments = parser.parse_args()
    throughput(arguments.batch_size, arguments.batches, arguments.rounds, arguments.spiece)
    if arguments.steps:
        input_wait(arguments.recipe, arguments.steps)


if __name__ == "__main__":
    main()
