"""Rates of mixtures that go by numbers of examples, and what is drawn at random."""

import functools
import json
import logging

import pytest
import seqio
import tensorflow as tf

from robust_ft import metrics
from robust_ft.data import cache, loader, raw_files, seqio_tasks
from robust_ft.data.cache import TaskData
from robust_ft.data.seqio_tasks import Files, text_features
from robust_ft.errors import UserError
from robust_ft.vocabulary import ByteVocabulary


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rates")


@pytest.fixture(scope="module")
def registered(folder):
    names = ("rates_a", "rates_b", "rates_c")
    for name in names:
        seqio_tasks.add(
            name,
            {split: [Files((f"{folder}/{name}.jsonl",), raw_files.json_lines)] for split in SPLITS},
            dict,
            metric_fns=[metrics.accuracy],
            postprocess_fn=None,
        )

    def lines(task):
        return len((folder / f"{task.name}.jsonl").read_text().splitlines())

    by_number = seqio.mixing_rate_num_examples
    mixtures = {
        "rates_number": by_number,
        "rates_most": functools.partial(by_number, maximum=20),
        "rates_tempered": functools.partial(by_number, temperature=2.0),
        "rates_function": lambda task: 2.0 * min(task.num_input_examples("train"), 1000),
        "rates_file": lines,
    }
    for name, rate in mixtures.items():
        seqio.MixtureRegistry.add(name, names[:2], default_rate=rate)
    seqio.MixtureRegistry.add("rates_nested", [("rates_number", 1.0), ("rates_c", by_number)])
    seqio.MixtureRegistry.add("rates_nan", ["rates_a"], default_rate=float("nan"))
    seqio.TaskRegistry.add(
        "rates_uncounted",
        source=seqio.FunctionDataSource(letters, splits=("train",)),
        preprocessors=[],
        output_features=text_features(),
    )
    seqio.MixtureRegistry.add("rates_unknown", ["rates_uncounted"], default_rate=by_number)
    return folder


SPLITS = ("train", "validation")


def letters(split, shuffle_files=False, seed=None):
    texts = [f"{chr(97 + i)}" * 5 for i in range(20)]
    return tf.data.Dataset.from_tensor_slices({"inputs": texts, "targets": texts})


def write(folder, task, count):
    rows = [{"inputs": f"{task} {i}", "targets": "x"} for i in range(count)]
    (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rates(folder, task, split="train"):
    return {each.task: each.rate for each in cache.ensure(data(folder, task, split))}


def data(folder, task, split="train"):
    return TaskData(
        task=task,
        module="seqio",  # any: the tasks are registered above
        split=split,
        inputs_length=40,
        targets_length=8,
        vocabulary=ByteVocabulary(),
        cache_dir=str(folder / "cache"),
    )


EXPECTED = {
    "rates_number": (lambda n: n),
    "rates_most": (lambda n: min(n, 20)),
    "rates_tempered": (lambda n: n**0.5),
    "rates_function": (lambda n: 2 * n),
    "rates_file": (lambda n: n),
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("first", ["mixture", "task"])
@pytest.mark.parametrize("mixture", EXPECTED)
def test_rates_follow_the_files(registered, mixture, first, split):
    expected = EXPECTED[mixture]
    for count in (10, 30, 7):
        write(registered, "rates_a", count)
        write(registered, "rates_b", 10)
        if first == "task":  # which is then not stale when the mixture is asked for
            cache.ensure(data(registered, "rates_a", split))
        assert rates(registered, mixture, split) == pytest.approx(
            {"rates_a": expected(count), "rates_b": expected(10)}
        )
        found = rates(registered, f"{mixture}_1shot", split)
        assert list(found.values()) == pytest.approx([expected(count), expected(10)])


def test_rates_of_mixtures_in_mixtures(registered):
    for task, count in (("rates_a", 10), ("rates_b", 30), ("rates_c", 5)):
        write(registered, task, count)
    expected = {"rates_a": 0.25, "rates_b": 0.75, "rates_c": 5}
    assert rates(registered, "rates_nested") == pytest.approx(expected)


def test_rates_that_are_none(registered):
    write(registered, "rates_a", 3)
    with pytest.raises(UserError, match="'rates_nan' gives task 'rates_a' the rate nan"):
        rates(registered, "rates_nan")
    with pytest.raises(UserError, match="source of task 'rates_uncounted' does not say how many"):
        rates(registered, "rates_unknown")


@seqio.map_over_dataset(num_seeds=1)
def seeded(example, seed):
    noise = tf.strings.as_string(tf.random.stateless_uniform([], seed, 0, 1000, tf.int32))
    return {**example, "inputs": noise}


def unseeded(dataset):
    return dataset.map(
        lambda x: {**x, "inputs": tf.strings.as_string(tf.random.uniform([], 0, 1000, tf.int32))}
    )


def plain(dataset):
    return dataset.map(lambda x: {**x, "inputs": tf.strings.upper(x["inputs"])})


@pytest.mark.parametrize(
    ("preprocessor", "is_random"), [(seeded, True), (unseeded, True), (plain, False)]
)
def test_random_preprocessors_are_said_to_be_drawn_once(folder, caplog, preprocessor, is_random):
    name = f"rates_random_{getattr(preprocessor, '__name__', 'seeded')}"
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(letters, splits=("train",)),
        preprocessors=[preprocessor],
        output_features=text_features(),
    )
    found = []
    for number in range(2):
        settings = data(folder / f"{number}", name)
        with caplog.at_level(logging.WARNING):
            loader.train_batches(settings, 2, seed=0).close()
        said = "draws random numbers in its preprocessors: its cache keeps one draw" in caplog.text
        assert said == is_random
        found.append([e.inputs_text for e in loader.eval_examples(settings)])
    assert found[0] == found[1]  # built again, it is the same draw
