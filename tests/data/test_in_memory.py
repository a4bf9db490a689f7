"""Pairs of texts in memory as a task."""

from pathlib import Path

import pytest

pytest.importorskip("seqio")

from robust_ft.data import loader
from robust_ft.data.cache import TaskData
from robust_ft.data.in_memory import pairs_task
from robust_ft.errors import UserError
from robust_ft.vocabulary import ByteVocabulary

PAIRS = [("{a} + 2 =", "4"), ("where?", "über dort\nhinten")]


@pytest.fixture
def task(tmp_path):
    return pairs_task("sums", train=PAIRS, test=iter(PAIRS[:1]), cache_dir=str(tmp_path))


def data_of(task, tmp_path, split):
    return TaskData(
        task=task.name,
        split=split,
        inputs_length=32,
        targets_length=32,
        vocabulary=ByteVocabulary(),
        cache_dir=str(tmp_path),
        file_tasks=(task,),
    )


def test_examples_are_the_pairs(task, tmp_path):
    [example] = loader.eval_examples(data_of(task, tmp_path, "test"))
    assert (example.inputs_text, example.targets_text) == PAIRS[0]


def test_a_split_or_a_task_that_is_not_there(task, tmp_path):
    with pytest.raises(UserError, match="has no split 'validation', only test, train"):
        loader.eval_examples(data_of(task, tmp_path, "validation"))
    other = pairs_task("others", train=PAIRS, cache_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"TaskData\.file_tasks has no task or mixture 'unknown'"):
        data = TaskData(**{**vars(data_of(other, tmp_path, "train")), "task": "unknown"})
        loader.eval_examples(data)


def test_equal_pairs_are_one_file(task, tmp_path):
    again = pairs_task("others", train=tuple(PAIRS), cache_dir=str(tmp_path))
    assert again.train == task.train and Path(task.train).parent == tmp_path / "pairs"
    assert task.test != task.train


def test_no_pairs():
    with pytest.raises(UserError, match="names no file"):
        pairs_task("sums")
