"""Reading JSON, and writing files and folders whole or not at all."""

import json

import pytest

from robust_ft.errors import UserError
from robust_ft.files import (
    read_json,
    read_json_object,
    replacing,
    write_atomically,
    write_json,
    write_json_lines,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_json_round_trip(tmp_path):
    file = tmp_path / "x.json"
    write_json(file, {"a": [1, None]})
    assert file.read_text() == '{\n  "a": [\n    1,\n    null\n  ]\n}\n'
    assert read_json(file) == read_json_object(file) == {"a": [1, None]}
    assert names(tmp_path) == ["x.json"]


def test_json_lines(tmp_path):
    file = tmp_path / "x.jsonl"
    records = [{"text": "é\nb"}, {"text": ""}]
    write_json_lines(file, iter(records))
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == records
    assert "é" in file.read_text(encoding="utf-8")


@pytest.mark.parametrize("default", [None, {}, []])
def test_a_missing_file_has_the_default(tmp_path, default):
    assert read_json(tmp_path / "x.json", default=default) is default
    assert read_json(tmp_path / "no folder" / "x.json", default=default) is default


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, r"There is no file '.*x\.json'\."),
        (b"", r"'.*x\.json' is not JSON: Expecting value in line 1\."),
        (b'{"a":\n [1,', r"'.*x\.json' is not JSON: Expecting value in line 2\."),
        (b'"\xff"', r"'.*x\.json' is not JSON: it is not text in UTF-8\."),
        (b"[]", r"'.*x\.json' is not a JSON object\."),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, content, sentence):
    file = tmp_path / "x.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=f"^{sentence}$"):
        read_json_object(file)


def test_what_is_there_and_cannot_be_read_has_no_default(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read: Is a directory\."):
        read_json(tmp_path, default={})


def test_a_failing_write_leaves_the_earlier_file(tmp_path):
    file = tmp_path / "x.txt"
    write_atomically(file, "earlier")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(file, "x" * 100_000 + "\ud800")
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert file.read_text() == "earlier"
    assert names(tmp_path) == ["x.txt"]


def test_a_failing_write_leaves_the_earlier_folder(tmp_path):
    folder = tmp_path / "x"
    for text in ("earlier", "later"):
        with replacing(folder) as temporary:
            temporary.mkdir()
            (temporary / text).touch()
        assert names(folder) == [text]
    with pytest.raises(KeyboardInterrupt), replacing(folder) as temporary:
        temporary.mkdir()
        raise KeyboardInterrupt
    assert names(folder) == ["later"]
    assert names(tmp_path) == ["x"]
