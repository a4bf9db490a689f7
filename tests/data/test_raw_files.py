"""Readers of raw files: what they yield, and which place they name for what they do not accept."""

import gzip

import pytest

from robust_ft.data import raw_files
from robust_ft.errors import UserError


@pytest.fixture
def write(tmp_path):
    """Writes a file of bytes or text and returns its path."""

    def write(content, name="file.txt"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    return write


def records(rows):
    return [row.record for row in rows]


def test_json_lines(write):
    file = write('{"a": "ü"}\r\n\n{"a": 2}')
    rows = list(raw_files.json_lines([file, file]))
    assert [row.record for row in rows] == [{"a": "ü"}, {"a": 2}] * 2
    assert [row.place for row in rows] == [f"{file}, line 1", f"{file}, line 3"] * 2
    zipped = write(gzip.compress(b'{"a": 1}\n'), "file.jsonl.gz")
    assert records(raw_files.json_lines([zipped])) == [{"a": 1}]


def test_tab_separated(write):
    file = write('\ufeffa\tb c\n1\t"x\n\n2\t\n')
    expected = [{"a": "1", "b c": '"x'}, {"a": "2", "b c": ""}]
    assert records(raw_files.tab_separated([file])) == expected
    rows = list(raw_files.tab_separated([file], columns=("x", "y")))
    assert rows[0] == (f"{file}, line 1", {"x": "a", "y": "b c"})


def test_quoted(write):
    long = "x" * 200_000
    file = write(f'a,b\n"one, ""1""\nand",2\n\n{long},3\n')
    rows = list(raw_files.quoted([file]))
    assert [row.record for row in rows] == [
        {"a": 'one, "1"\nand', "b": "2"},
        {"a": long, "b": "3"},
    ]
    assert [row.place for row in rows] == [f"{file}, line 2", f"{file}, line 5"]


def test_aligned(write):
    files = [write("a\nb\n", "one"), write("c\nd", "two")]
    expected = [{"x": "a", "y": "c"}, {"x": "b", "y": "d"}]
    assert records(raw_files.aligned(files, ("x", "y"))) == expected


def test_json_list(write):
    file = write('[{"a": 1}, {"a": 2}]')
    assert [row.place for row in raw_files.json_list([file])] == [
        f"{file}, item 1",
        f"{file}, item 2",
    ]
    assert records(raw_files.json_list([write('{"Data": [{}]}')], key="Data")) == [{}]


@pytest.mark.parametrize(
    ("reader", "content", "sentence"),
    [
        (raw_files.json_lines, b'{"a": 1}\n{"a": \xff}\n', "line 2: it is not UTF-8"),
        (raw_files.json_lines, "{\n", r"line 1: it is not JSON \(.*, column 2\)\."),
        (raw_files.json_lines, "{}\n[]\n", "line 2: it is not a JSON object"),
        (
            raw_files.tab_separated,
            "a\tb\n1\t2\n1\n",
            r"line 3: it has 1 .* 2 columns \(a, b\)",
        ),
        (raw_files.quoted, 'a,b\n"x\ny",1\n1,2,3\n', "line 4: it has 3 fields, .* 2 columns"),
        (raw_files.quoted, 'a,b\n"x" y,2\n', "line 2: .*expected after"),
        (raw_files.quoted, 'a,b\n1,2\n"x,2\n3,4\n', "line 3: unexpected end of data"),
        (raw_files.json_list, "{}", "it is not a JSON list"),
        (raw_files.json_list, '[{},\n"a"]', "item 2: it is not a JSON object"),
    ],
)
def test_what_is_wrong_and_where(write, reader, content, sentence):
    with pytest.raises(UserError, match=rf"file\.txt(, |: ){sentence}"):
        list(reader([write(content)]))


def test_unequal_files_side_by_side(write):
    long, short = write("a\nb\n", "long"), write("a\n", "short")
    for files in ([long, short], [short, long]):
        with pytest.raises(UserError, match=r"long, line 2: it has no counterpart, .*short ends"):
            list(raw_files.aligned(files, ("x", "y")))


def test_fields():
    record = {"a": "x", "b": 1, "c": ["y"], "d": []}
    assert raw_files.text(record, "a") == "x" and raw_files.texts(record, "c") == ["y"]
    assert raw_files.one_of(record, "a", {"x": "X"}) == "X"
    for read, sentence in [
        (lambda: raw_files.text(record, "b"), "field 'b' is not a string but 1"),
        (lambda: raw_files.text({"label": ""}, "lable"), "no field 'lable'. Did you mean 'label'"),
        (lambda: raw_files.texts(record, "a"), "field 'a' is not a list of strings but 'x'"),
        (lambda: raw_files.texts(record, "d"), r"field 'd' is not a list of strings but \[\]"),
        (lambda: raw_files.one_of(record, "a", {"xy": ""}), "a 'x' is none of xy"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            read()


def test_a_list_that_is_cut_off(write):
    with pytest.raises(UserError, match=r"file\.txt' is not JSON: .* in line 2"):
        list(raw_files.json_list([write("[\n1,")]))
