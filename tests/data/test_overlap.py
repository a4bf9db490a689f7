"""The same example in training and in an evaluation is counted."""

import dataclasses
import json
import tempfile
import types

import pytest

pytest.importorskip("seqio")

from hypothesis import given, settings
from hypothesis import strategies as st

from robust_ft import console, overlap_file
from robust_ft.data import overlap
from robust_ft.data.cache import TaskData
from robust_ft.data.in_memory import pairs_task
from robust_ft.decoding import Decoder
from robust_ft.evaluate import Evaluation
from robust_ft.vocabulary import ByteVocabulary


def data(folder, name, split="train", length=32, **splits):
    task = pairs_task(name, cache_dir=str(folder), **splits)
    return TaskData(
        task=name, split=split, inputs_length=length, targets_length=16,
        vocabulary=ByteVocabulary(), cache_dir=str(folder), file_tasks=(task,),
    )  # fmt: skip


TRAIN = [("Where is it?", "here"), ("how many", "two"), ("a long question that is cut", "yes")]
OTHER = [("where  IS it? ", "Here"), ("how many", "three"), ("new", "two"), ("how many", "two")]


def test_examples_in_training_and_test_are_counted(tmp_path):
    train = data(tmp_path, "sums", train=TRAIN)
    test = data(tmp_path, "other", "test", train=TRAIN[:1], test=OTHER)
    counted = overlap.count(train, (overlap.Evaluated(test), overlap.Evaluated(test, limit=2)))
    assert counted == overlap.Counted(
        # Case and spacing do not count; another answer to the same input is no same example.
        (overlap.Overlap("other", "test", 4, 3, 2), overlap.Overlap("other", "test", 2, 1, 1)),
        num_train=3,
        num_compared=3,
    )
    fields = json.loads(json.dumps(dataclasses.asdict(counted)))
    assert overlap.Counted.from_json(fields) == counted
    assert next(iter(overlap.sentences(counted))) == (
        "3 of 4 examples of other, split test, have an input of the 3 training examples, 2 of them "
        "with the same target"
    )


def test_inputs_of_other_lengths_are_compared_by_what_both_have(tmp_path):
    train = data(tmp_path, "sums", train=TRAIN, length=12)
    test = data(tmp_path, "other", "test", train=TRAIN[:1], test=[TRAIN[2]])
    (found,) = overlap.count(train, (overlap.Evaluated(test),)).overlaps
    assert (found.same_input, found.same_example) == (1, 1)


def test_a_large_cache_is_sampled_and_said_to_be(tmp_path, monkeypatch):
    monkeypatch.setattr(overlap, "LIMIT", 2)
    train = data(tmp_path, "sums", train=TRAIN)
    test = data(tmp_path, "other", "test", train=TRAIN[:1], test=OTHER)
    overlap._count.cache_clear()
    counted = overlap.count(train, (overlap.Evaluated(test),))
    assert (counted.num_train, counted.num_compared) == (3, 2)
    assert "3 training examples (of which 2 were compared)" in next(
        iter(overlap.sentences(counted))
    )


TEXTS = st.text("ab ", min_size=1, max_size=3).filter(str.strip)
ROWS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=8)


@settings(max_examples=5, deadline=None)
@given(ROWS, ROWS)
def test_counts_are_those_of_sets(train_rows, test_rows):
    with tempfile.TemporaryDirectory() as folder:
        train = data(folder, "sums", train=train_rows)
        test = data(folder, "other", "test", train=[("x", "x")], test=test_rows)
        (found,) = overlap.count(train, (overlap.Evaluated(test),)).overlaps
    pairs = {tuple(map(overlap.normalized, row)) for row in train_rows}
    tested = [tuple(map(overlap.normalized, row)) for row in test_rows]
    inputs = {text for text, _ in pairs}
    assert found.num_examples == len(test_rows)
    assert found.same_input == sum(text in inputs for text, _ in tested)
    assert found.same_example == sum(row in pairs for row in tested)


def test_a_stage_says_it_once_and_keeps_the_counts(tmp_path, capsys, monkeypatch):
    train = data(tmp_path, "sums", train=TRAIN)
    test = data(tmp_path, "other", "test", train=TRAIN[:1], test=OTHER)
    evaluation = Evaluation(test, Decoder(max_decode_len=4))
    stage = types.SimpleNamespace(
        name="model",
        data=train,
        replay=None,
        evaluations=(),
        final_evaluations=(evaluation, evaluation),
    )
    before = console.get()
    console.configure()
    (tmp_path / "model").mkdir()
    overlap_file.write(stage, tmp_path / "model")
    assert capsys.readouterr().out.count("[model] 3 of 4 examples of other") == 1
    written = json.loads((tmp_path / "model" / "overlap.json").read_text())
    assert written["overlaps"] == [
        {"task": "other", "split": "test", "num_examples": 4, "same_input": 3, "same_example": 2}
    ]
    # A stage that goes on counts nothing.
    monkeypatch.setattr(overlap, "count", None)
    overlap_file.write(stage, tmp_path / "model")
    assert not capsys.readouterr().out
    console._shared = before
