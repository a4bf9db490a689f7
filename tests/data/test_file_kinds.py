"""Files of every kind read alike, and one sentence says what is wrong with a file, and where."""

import csv
import gzip
import json
import string

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("seqio")

import seqio

from robust_ft.data import own_files
from robust_ft.data.file_task import FileTask
from robust_ft.errors import UserError

ROWS = [
    {"question": 'Who, "exactly"?', "answer": "Ann", "n": 1, "is": True, "of": ["Ann", "Bo"]},
    {"question": "Où? ;|\t", "answer": "là", "n": 2, "is": False, "of": ["là", "ici", "x"]},
]
TASK = {"name": "kinds", "inputs": "{question} {n} {is}", "targets": "{answer}", "choices": "{of}"}
TEXTS = ['Who, "exactly"? 1 True', "Où? ;|\t 2 False"]


def examples(split="test", **settings):
    """Returns the examples of a split, as the cache builder reads them."""
    task = FileTask(**{"name": "kinds", "inputs": "{question}", "targets": "{answer}"} | settings)
    own_files.register(task)
    return list(seqio.TaskRegistry.get(task.name).source.examples(split))


def write_csv(path, rows, delimiter=",", **options):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter, **options)
        writer.writeheader()
        writer.writerows(rows)


def write_stream(path, rows):
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=1)


def write_saved(path, rows, shards=1):
    """Writes what `datasets.Dataset.save_to_disk` writes; a parity test compares."""
    path.mkdir(parents=True)
    names = [f"data-{i:05}-of-{shards:05}.arrow" for i in range(shards)]
    for i, name in enumerate(names):
        write_stream(path / name, rows[i::shards])
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0"}
    (path / "state.json").write_text(json.dumps(state))


def write_ipc(path, rows):
    pa.feather.write_feather(pa.Table.from_pylist(rows), str(path))


WRITERS = {
    "a.jsonl": lambda path, rows: path.write_text("\n".join(map(json.dumps, rows))),
    "lines.json": lambda path, rows: path.write_text("\n".join(map(json.dumps, rows))),
    "list.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "one_line.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "object.json": lambda path, rows: path.write_text(
        json.dumps({"version": 1, "tags": ["x"], "data": rows}, indent=1)
    ),
    "a.json.gz": lambda path, rows: path.write_bytes(gzip.compress(json.dumps(rows).encode())),
    "a.parquet": lambda path, rows: pa.parquet.write_table(pa.Table.from_pylist(rows), path),
    "a.feather": write_ipc,
    "file.arrow": write_ipc,
    "stream.arrow": write_stream,
    "saved": write_saved,
    "saved.v1.0": write_saved,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_gives_the_same(tmp_path, name):
    WRITERS[name](tmp_path / name, ROWS)
    first, second = examples(**TASK, test=str(tmp_path / name))
    assert [first["inputs"], second["inputs"]] == TEXTS
    assert [first["targets"], second["targets"]] == ["Ann", "là"]
    assert [first["answer_choices"], second["answer_choices"]] == [row["of"] for row in ROWS]


VALUES = st.one_of(
    st.text(min_size=1), st.integers(-(2**63), 2**63 - 1), st.booleans(), st.floats(-1e300, 1e300)
)


@given(
    st.lists(st.tuples(st.text(), st.text()), min_size=1),
    VALUES.flatmap(lambda value: st.lists(st.just(value), min_size=1, max_size=3)),
    st.sampled_from(list(WRITERS)),
)
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read(tmp_path_factory, texts, values, name):
    rows = [
        {"question": q, "answer": a, "v": values[i % len(values)]} for i, (q, a) in enumerate(texts)
    ]
    path = tmp_path_factory.mktemp("kinds") / name
    WRITERS[name](path, rows)
    found = examples(test=str(path), inputs="{question}|{v}")
    assert [(e["inputs"], e["targets"]) for e in found] == [
        (f"{row['question']}|{row['v']}", row["answer"]) for row in rows
    ]


# csv ends its lines with \r\n, and the readers of raw files end a line at \n: other breaks differ.
CELLS = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]))


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1), st.sampled_from(",;\t|:~"))
@settings(max_examples=60, deadline=None)
def test_any_delimiter(tmp_path_factory, cells, delimiter):
    rows = [{"question": q, "answer": a} for q, a in cells]
    for name in ("a.csv", "a.tsv"):
        if (name, delimiter) == ("a.tsv", "\t"):
            continue  # never quoted
        path = tmp_path_factory.mktemp("cells") / name
        write_csv(path, rows, delimiter, quoting=csv.QUOTE_ALL)
        found = examples(test=str(path), delimiter=delimiter)
        assert [(e["inputs"], e["targets"]) for e in found] == cells


@pytest.mark.parametrize(
    ("name", "content", "set_to", "sentence"),
    [
        (
            "a.csv",
            "question;answer\na, b;c\n",
            None,
            r"by a semicolon; set FileTask\.delimiter=';'",
        ),
        ("a.csv", "question\tanswer\na\tb\n", None, r"by a tab; set FileTask\.delimiter='\\t'"),
        ("a.tsv", "question,answer\na,b\n", None, r"by a comma; set FileTask\.delimiter=','"),
        ("a.csv", "question,answer\na,b\n", ";", r"by a comma; set FileTask\.delimiter=','"),
        (
            "a.csv",
            "answer,more,question;x\n",
            ";",
            r"\(FileTask\.inputs\), only .* a semicolon sep",
        ),
        (
            "a.csv",
            "question\na\n",
            None,
            r"'answer' \(FileTask\.targets\), only one column, 'quest",
        ),
    ],
)
def test_a_delimiter_that_is_not_the_files(tmp_path, name, content, set_to, sentence):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}, line 1: .*{sentence}"):
        examples(test=str(tmp_path / name), delimiter=set_to)


def test_a_delimiter_as_a_shell_hands_it_on(tmp_path):
    (tmp_path / "a.csv").write_text("question\tanswer\na,b\tc\n")
    [example] = examples(test=str(tmp_path / "a.csv"), delimiter=r"\t")
    assert (example["inputs"], example["targets"]) == ("a,b", "c")


GOOD = gzip.compress(
    b"question,answer\n" + b"a,b\n" * 9999 + string.ascii_letters.encode(), mtime=0
)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv.gz", GOOD[:-20], r"behind line \d+: the \.gz file is cut off"),
        ("a.csv.gz", b"question,answer\n", "line 1: it is no whole gzip file"),
        ("a.csv.gz", GOOD[:40] + b"x" * 60, "it is no whole gzip file"),
        ("a.csv", b"", r": it has no rows \(task 'kinds', split 'test'\)"),
        ("a.json", b" \n", ": it has no rows"),
        ("a.json", b'{"data": []}', ": it has no rows"),
        ("a.csv", b"question,answer\r\n", ": it has no rows"),
        ("a.csv", b"question,answer\na,\xe9t\xe9\n", "line 2: it is not UTF-8 .byte 3 .* is 0xE9"),
        ("a.csv", "question,answer\na,b".encode("utf-16"), "line 1: it is not UTF-8 .* 0xFF"),
        ("a.json", b'[{"question": "\xff"}]', "line 1: it is not UTF-8"),
        ("a.csv", b"question,answer,question\na,b,c\n", "line 1: two columns .* 'question'"),
        ("a.tsv", b"question\tanswer\tanswer\na\tb\tc\n", "line 1: two columns .* 'answer'"),
        ("a.jsonl", b'{"question": 1, "question": 2}', "line 1: an object has 'question' twice"),
        ("a.json", b'[{"question": 1, "question": 2}]', ": an object has 'question' twice"),
        ("a.jsonl", b'{"question": "a", "answer": null}', "line 1: column 'answer' is empty"),
        ("a.json", b'[{"question": "a",\n"answer": }]', r"line 2: it is not JSON .* column 11"),
        ("a.json", b'{"question": {"0": "a"}}\n', "line 1: no column 'answer'|has no '"),
        ("a.json", b'{"a": [{}], "b": [{}]}', "must hold one list of objects, and has a, b"),
        ("a.json", b'{"a": 1,\n"b": {}}', r"one list of objects, and has none \(a, b\)"),
        (
            "a.jsonl",
            b'{"answer": "", "question": "a\\ud83d"}',
            r"'question' has half a character, '\\ud83d', at",
        ),
        ("a.json", b'"text"', "neither a JSON list nor JSON objects"),
        ("a.json", b'[{"question": "a", "answer": "b"}, "x"]', "item 2: it is not a JSON object"),
        ("a.json", b'[{"question": "a"}]', "item 1: no column 'answer', only question"),
        ("a.json", b"[" * 100_000, "nested too deeply|not JSON"),
        ("a.parquet", b"PAR1 not", r"does not read as \.parquet"),
        ("a.arrow", b"", r"does not read as \.arrow"),
        ("a.feather", b"ARROW1 not", r"does not read as \.feather"),
        ("missing/a.csv", None, "'kinds', split 'test', has no file .*a.csv"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence) as raised:
        examples(test=str(tmp_path / name))
    assert name in str(raised.value) and "\n" not in str(raised.value)


def test_a_null_names_its_row_and_column(tmp_path):
    rows = [{"question": "a", "answer": "b"}, {"question": "c", "answer": None}]
    for name, place in [("a.parquet", "row 2"), ("list.json", "item 2"), ("a.jsonl", "line 2")]:
        WRITERS[name](tmp_path / name, rows)
        with pytest.raises(UserError, match=rf"{name}, {place}: column 'answer' is empty \(null\)"):
            examples(test=str(tmp_path / name))


def test_columns_of_tables_that_are_there_twice(tmp_path):
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["question", "question"])
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: two columns are called 'question'"):
        examples(test=str(tmp_path / "a.parquet"))


def test_a_saved_dataset_with_splits(tmp_path):
    folder = tmp_path / "saved"
    write_saved(folder / "train", ROWS * 3, shards=2)
    write_saved(folder / "dev", ROWS[:1])
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "dev"]}))
    found = {"train": str(folder), "validation": str(folder / "dev")}
    in_order = ["Ann"] * 3 + ["là"] * 3  # row i is in shard i % 2
    assert [e["targets"] for e in examples("train", **TASK, **found)] == in_order
    assert [e["targets"] for e in examples("validation", **TASK, **found)] == ["Ann"]
    with pytest.raises(UserError, match=r"without a split 'validation', only train, dev; name .*"):
        examples("validation", **TASK, train=str(folder), validation=str(folder))
    source = seqio.TaskRegistry.get("kinds").source
    assert [name.rsplit("/", 1)[1] for name in source.list_shards("train")] == [
        "state.json",
        "data-00000-of-00002.arrow",
        "data-00001-of-00002.arrow",
    ]


def test_folders_that_are_no_dataset(tmp_path):
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(UserError, match=r"a\.csv' is a folder, but no dataset that `save_to_disk`"):
        examples(test=str(tmp_path / "a.csv"))
    write_saved(tmp_path / "saved", ROWS)
    (tmp_path / "saved" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(UserError, match=r"data-00000-of-00001\.arrow' is missing"):
        examples(test=str(tmp_path / "saved"))
    with pytest.raises(UserError, match=r"has no file .*none"):
        examples(test=str(tmp_path / "none"))
    state = {"_data_files": [], "_indices_data_files": [{"filename": "indices.arrow"}]}
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"a selection of rows; .*flatten_indices"):
        examples(test=str(tmp_path / "saved"))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_file_is_read_or_explained(tmp_path_factory, data):
    """Whatever bytes are lost or changed, there is no other error than a sentence."""
    kinds = {**WRITERS, "a.csv": write_csv, "a.csv.gz": lambda path, rows: path.write_bytes(GOOD)}
    name = data.draw(st.sampled_from([name for name in kinds if not name.startswith("saved")]))
    path = tmp_path_factory.mktemp("damaged") / name
    kinds[name](path, ROWS)
    content = path.read_bytes()
    start = data.draw(st.integers(0, len(content)))
    stop = data.draw(st.integers(start, min(len(content), start + 20)))
    path.write_bytes(content[:start] + data.draw(st.binary(max_size=8)) + content[stop:])
    try:
        examples(test=str(path))
    except UserError as error:
        assert name in str(error) and "\n" not in str(error)
