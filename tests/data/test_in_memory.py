"""Pairs of texts and rows in memory as tasks."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("seqio")

from robust_ft.data import loader
from robust_ft.data.cache import TaskData
from robust_ft.data.in_memory import pairs_task, rows_task
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


ROWS = [
    {"q": "?", "n": 1, "yes": True, "of": ["a", "b"], "label": 0, "extra": object()},
    {"q": "ü\n", "n": 2, "yes": False, "of": ("b", "c"), "label": 1, "extra": None},
]
TEXTS = {"inputs": "{q} {n} {yes}", "targets": "{label}", "choices": "{of}", "answer": "index"}


PLAIN = [{**{n: v for n, v in row.items() if n != "extra"}, "of": list(row["of"])} for row in ROWS]
NUMPY = [{**row, "n": np.int32(row["n"]), "of": np.array(row["of"])} for row in ROWS]
TABLES = {
    "dicts": lambda: ROWS,
    "iterator": lambda: iter(ROWS),
    "numpy": lambda: NUMPY,
    "arrow": lambda: pa.Table.from_pylist(PLAIN),
    "pandas": lambda: pytest.importorskip("pandas").DataFrame(ROWS),
    "polars": lambda: pytest.importorskip("polars").DataFrame(PLAIN),
    "datasets": lambda: pytest.importorskip("datasets").Dataset.from_list(PLAIN),
}


@pytest.mark.parametrize("kind", TABLES)
def test_rows_of_any_kind(kind, tmp_path):
    found = rows_task("rows", train=ROWS, test=TABLES[kind](), cache_dir=str(tmp_path), **TEXTS)
    examples = loader.eval_examples(data_of(found, tmp_path, "test"))
    assert [(e.inputs_text, e.targets_text, e.answer_choices) for e in examples] == [
        ("? 1 True", "a", ("a", "b")),
        ("ü\n 2 False", "c", ("b", "c")),
    ]
    assert found.test == found.train and Path(found.train).parent == tmp_path / "rows"
    assert len(list((tmp_path / "rows").iterdir())) == 1


def test_the_columns_that_a_task_reads_are_its_content(tmp_path):
    both = [
        rows_task("rows", train=rows, cache_dir=str(tmp_path), inputs="{q}", targets="{label}")
        for rows in (ROWS, [{"label": row["label"], "q": row["q"]} for row in ROWS])
    ]
    assert both[0] == both[1]
    other = [{**ROWS[0], "label": 1}, ROWS[1]]
    changed = rows_task("rows", train=other, cache_dir=str(tmp_path), inputs="{q}", targets="{q}")
    assert changed != both[0]


def test_a_share_of_rows(tmp_path):
    rows = [{"q": f"question {i}", "a": "x"} for i in range(50)]
    task = rows_task(
        "rows", train=rows, validation=0.2, cache_dir=str(tmp_path), inputs="{q}", targets="{a}"
    )
    pairs = pairs_task(
        "pairs",
        train=[(row["q"], "x") for row in rows],
        validation=0.2,
        cache_dir=str(tmp_path),
    )
    for split in ("train", "validation"):
        found = {e.inputs_text for e in loader.eval_examples(data_of(task, tmp_path, split))}
        same = {e.inputs_text for e in loader.eval_examples(data_of(pairs, tmp_path, split))}
        assert found == same and found


@pytest.mark.parametrize(
    ("rows", "settings", "sentence"),
    [
        ([{"q": "a"}], {}, "Task 'rows', train, row 1: no column 'label'|'rows', train, row 1"),
        ([ROWS[0], {"q": "a", "lable": 1}], {}, "row 2: no column 'label', only .*mean 'lable'"),
        ([{"q": None, "label": 1}], {}, r"row 1: column 'q' is empty \(null\)"),
        ([{"q": float("nan"), "label": 1}], {}, r"row 1: column 'q' is empty \(NaN\)"),
        ([{"q": object(), "label": 1}], {}, "row 1: column 'q' is not plain data .*object"),
        (
            [{"q": "?", "label": "two\nlines"}],
            {"choices": ["a", "b"]},
            r"row 1: target 'two lines' is none of a, b\.$",
        ),
        (["q"], {}, "row 1: it is not a dict but 'q'"),
        ({"q": ["a"], "label": ["b"]}, {}, "a dict of q, label is no rows; give a list of dicts"),
        ("rows.csv", {}, r"'rows', train: 'rows\.csv' is a name; robust_ft\.FileTask reads files"),
        (None, {}, "Task 'rows' names no file"),
        (ROWS, {"choices": "{of}"}, r"row 1: target '0' is none of a, b.*answer='index'"),
        (ROWS, {"lables": 1}, "unexpected keyword argument 'lables'"),
        ([], {}, "Task 'rows' names no file"),
    ],
)
def test_what_is_wrong_with_rows_and_where(rows, settings, sentence, tmp_path):
    with pytest.raises((UserError, TypeError), match=sentence):
        rows_task(
            "rows",
            train=rows,
            cache_dir=str(tmp_path),
            **{"inputs": "{q}", "targets": "{label}"} | settings,
        )
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_what_pandas_calls_missing(tmp_path):
    pandas = pytest.importorskip("pandas")
    for missing in (None, float("nan"), pandas.NA, pandas.NaT):
        frame = pandas.DataFrame({"q": ["a", missing], "label": [1, "x"]})
        with pytest.raises(UserError, match=r"'rows', test, row 2: column 'q' is empty \(null\)"):
            rows_task("rows", test=frame, inputs="{q}", targets="{label}", cache_dir=str(tmp_path))
    twice = pandas.DataFrame([["a", "b"]], columns=["q", "q"])
    with pytest.raises(UserError, match="'rows', test: two columns are called 'q'"):
        rows_task("rows", test=twice, inputs="{q}", targets="{q}", cache_dir=str(tmp_path))
