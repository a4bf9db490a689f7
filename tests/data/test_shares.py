"""Validation and test splits that are shares of the training file."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("seqio")

from robust_ft.data import loader
from robust_ft.data.cache import TaskData
from robust_ft.data.file_task import FileTask
from robust_ft.errors import UserError
from robust_ft.vocabulary import ByteVocabulary


def task(**settings):
    fields = {"name": "cut", "inputs": "{q}", "targets": "{a}", "train": "t.jsonl"}
    return FileTask(**fields | settings)


def rows(count):
    return [{"q": f"question {i}", "a": f"answer {i}"} for i in range(count)]


@given(
    st.floats(0.01, 0.49), st.floats(0.01, 0.49), st.integers(), st.lists(st.text(), max_size=30)
)
@settings(deadline=None)
def test_a_rows_split_depends_on_its_inputs_and_the_seed_alone(validation, test, seed, texts):
    cut = task(validation=validation, test=test, split_seed=seed)
    for text in texts:
        split = cut.split_of({"q": text, "a": "x", "id": 1})
        assert split in ("train", "validation", "test")
        assert split == cut.split_of({"id": 2, "a": "y", "q": text})
        # Another template over the same columns and a task of another name cut the same rows.
        other = task(name="other", inputs="Q: {q} A:", validation=validation, split_seed=seed)
        assert (split == "validation") == (other.split_of({"q": text}) == "validation")


def test_the_shares_are_about_what_was_asked_for():
    cut = task(validation=0.1, test=0.2)
    found = [cut.split_of(row) for row in rows(20_000)]
    assert found.count("validation") / 20_000 == pytest.approx(0.1, abs=0.01)
    assert found.count("test") / 20_000 == pytest.approx(0.2, abs=0.01)
    other = task(validation=0.1, test=0.2, split_seed=1)
    again = [other.split_of(row) for row in rows(20_000)]
    both = sum(a == b == "validation" for a, b in zip(found, again, strict=True))
    assert both / 20_000 == pytest.approx(0.01, abs=0.005)


def test_the_split_is_the_same_on_every_machine_and_in_every_version():
    found = [task(validation=0.3).split_of(row)[0] for row in rows(20)]
    assert "".join(found) == "vvttttttvtttvtvvtvvt"
    code = """
from robust_ft.data.file_task import FileTask
task = FileTask(name="cut", inputs="{q}", targets="{a}", train="t.jsonl", validation=0.3)
print("".join(task.split_of({"q": f"question {i}", "a": ""})[0] for i in range(20)))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "".join(found)


@pytest.fixture
def read(tmp_path):
    """Writes a training file and returns the examples of a split of a task, (inputs, targets)."""

    def read(records, split, **settings):
        file = tmp_path / "train.jsonl"
        file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
        cut = task(**{"train": str(file), "validation": 0.2} | settings)
        data = TaskData(
            task="cut",
            split=split,
            inputs_length=40,
            targets_length=40,
            vocabulary=ByteVocabulary(),
            cache_dir=str(tmp_path / "cache"),
            file_tasks=(cut,),
        )
        return [(e.inputs_text, e.targets_text) for e in loader.eval_examples(data)]

    return read


def test_every_row_is_in_one_split_and_stays_there(read):
    records = rows(60) + rows(10)  # ten of them twice
    parts = {split: read(records, split, test=0.2) for split in ("train", "validation", "test")}
    everything = sorted(row for part in parts.values() for row in part)
    assert everything == sorted((record["q"], record["a"]) for record in records)
    assert not set(parts["train"]) & set(parts["validation"])
    assert not set(parts["test"]) & {*parts["train"], *parts["validation"]}
    for split, before in parts.items():
        after = read([*records, *rows(90)[60:]], split, test=0.2)
        assert after[: len(before)] == before and len(after) > len(before)
    assert read(records, "validation", split_seed=7) != parts["validation"]


def test_a_split_with_a_file_is_not_cut(read, tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"q": "question 0", "a": "answer 0"}))
    assert len(read(rows(40), "test", test=str(tmp_path / "test.jsonl"))) == 1
    found = read(rows(40), "train") + read(rows(40), "validation")
    assert len(found) == 40


def test_nothing_is_in_two_splits_of_saved_datasets_either(tmp_path, read):
    from test_file_kinds import write_saved

    write_saved(tmp_path / "saved", rows(40))
    settings = {"train": str(tmp_path / "saved"), "validation": 0.2}
    found = read([], "train", **settings) + read([], "validation", **settings)
    assert sorted(found) == sorted((row["q"], row["a"]) for row in rows(40))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"validation": 0.0}, r"FileTask\.validation=0\.0 .* above 0 and below 1"),
        ({"validation": 1}, r"FileTask\.validation=1 .* above 0 and below 1"),
        ({"test": -0.1}, r"FileTask\.test=-0\.1 .* above 0 and below 1"),
        ({"test": float("nan")}, r"FileTask\.test=nan .* above 0 and below 1"),
        ({"validation": True}, r"FileTask\.validation=True"),
        ({"validation": 0.1, "train": None}, r"validation=0\.1 .*FileTask\.train names none"),
        ({"validation": 0.5, "test": 0.5}, "leave nothing to train on"),
    ],
)
def test_shares_that_are_none(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        task(**settings)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_share_that_leaves_a_split_empty(read, split):
    with pytest.raises(
        UserError,
        match=r"FileTask\.validation=0\.001 \(task 'cut'\) of the 5 rows in .*train\.jsonl leaves "
        r"the split 'validation' without any",
    ):
        read(rows(5), split, validation=0.001)


def test_a_row_that_cannot_be_split(read):
    with pytest.raises(UserError, match=r"train\.jsonl, line 2: column 'q' is empty \(null\)\."):
        read([*rows(1), {"q": None, "a": "x"}], "train")
