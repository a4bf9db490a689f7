"""Templates with columns, and what a row with choices becomes."""

import decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_ft.data import templates
from robust_ft.data.file_task import FileTask
from robust_ft.errors import UserError

RECORD = {
    "a": "x",
    "n": 2,
    "f": 2.5,
    "yes": True,
    "no": False,
    "d": decimal.Decimal("1.50"),
    "options": ["red", "green", "blue"],
    "answers": {"text": ["one", "two"], "start": [1, 2]},
    "listed": [{"text": "p", "label": "A"}, {"text": "q", "label": "B"}],
    "dotted.name": "dot",
    "null": None,
    "nan": float("nan"),
}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{{a}}} {n} {f} {d}", "{x} 2 2.5 1.50"),
        ("{yes} {no}", "True False"),
        ("{options[1]} {answers.text[0]} {answers.start[1]}", "green one 2"),
        ("{listed.text[1]} {listed[0].label}", "q A"),
        ("{dotted.name}", "dot"),
        ("no column {}", "no column {}"),
    ],
)
def test_what_a_template_becomes(template, text):
    assert templates.fill(template, RECORD) == text


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{option}", "no column 'option', only .* Did you mean 'options'"),
        ("{null}", r"column 'null' is empty \(null\)"),
        ("{nan}", r"column 'nan' is empty \(NaN\)"),
        ("{options}", r"column 'options' is neither a text nor a number but \['red'"),
        ("{options[3]}", r"column 'options' has no '\[3\]': it is \['red'"),
        ("{answers.txt}", r"column 'answers' has no '\.txt'"),
        ("{a.b}", r"column 'a' has no '\.b': it is 'x'"),
        ("{b.c}", r"no column 'b\.c', only"),
    ],
)
def test_what_a_template_does_not_accept(template, sentence):
    with pytest.raises(ValueError, match=sentence):
        templates.fill(template, RECORD)


@given(st.text(), st.dictionaries(st.text(), st.text()))
@settings(deadline=None)
def test_a_text_without_columns_stays(text, record):
    escaped = text.replace("{", "{{").replace("}", "}}")
    assert templates.fill(escaped, record) == text
    assert templates.columns(escaped) == ()


@given(st.dictionaries(st.from_regex(r"[^{}]+", fullmatch=True), st.text(), min_size=1))
@settings(deadline=None)
def test_each_column_is_found_by_its_name(record):
    template = " ".join(f"{{{name}}}" for name in record)
    assert templates.columns(template) == tuple(record)
    assert templates.fill(template, record) == " ".join(record.values())


def task(**fields):
    return FileTask(
        **{"name": "t", "train": "t.jsonl", "inputs": "{q}", "targets": "{label}"} | fields
    )


ROW = {"q": "?", "options": ["red", "green", "blue"], "A": "one", "B": "two", "n": [1, 2, 3]}


@pytest.mark.parametrize(
    ("fields", "label", "target"),
    [
        ({"choices": "{options}"}, "green", "green"),
        ({"choices": ["{A}", "{B}"]}, "two", "two"),
        ({"choices": ["{A}", "none", "{{}}"]}, "{}", "{}"),
        ({"choices": "{options}", "answer": "index"}, 0, "red"),
        ({"choices": "{options}", "answer": "index"}, "2", "blue"),
        ({"choices": "{options}", "answer": "index"}, 2.0, "blue"),
        ({"choices": "{options}", "answer": "number"}, 1, "red"),
        ({"choices": "{options}", "answer": "letter"}, "b", "green"),
        ({"choices": ["{A}", "{B}"], "answer": "index"}, True, "two"),
        ({"choices": "{n}"}, 2, "2"),
        ({"choices": "{n}", "answer": "index"}, 2, "3"),
        ({"choices": ["no", "yes"], "answer": "index", "rank": True}, False, "no"),
    ],
)
def test_the_right_choice(fields, label, target):
    made = task(**fields)
    example = made.example({**ROW, "label": label})
    assert example["targets"] == target and not example["references"]
    assert target in example["answer_choices"]
    assert made.scoring == (("accuracy",), "identity")


def test_an_input_may_be_empty():
    row = {"": "0", "label": "x"}  # as pandas writes its index
    assert task(inputs="").example(row)["inputs"] == ""


def test_fixed_choices_are_decoded_as_ever():
    made = task(choices=["0", "1"])
    assert "answer_choices" not in made.example({"q": "?", "label": 1})
    assert made.scoring == (("exact_match",), "promot")


@pytest.mark.parametrize(
    ("fields", "row", "sentence"),
    [
        ({"choices": "{options}"}, {"label": "gren"}, "'gren' is none of red, .*mean 'green'"),
        ({"choices": "{options}"}, {"label": "B"}, r"'B' is none of .* FileTask\.answer='letter'"),
        ({"choices": "{options}"}, {"label": 1}, r"'1' is none of .* FileTask\.answer='index'"),
        # Not the choice "1" by chance: the number may be an index.
        ({"choices": "{options}"}, {"label": 1, "options": ["0", "1"]}, r"answer='index' \(from"),
        ({"choices": ["no", "yes"]}, {"label": True}, r"'True' is none .*answer='index'"),
        (
            {"choices": "{options}", "answer": "index"},
            {"label": 3},
            "the answer '3' is not a number from 0 to 2",
        ),
        ({"choices": "{options}", "answer": "index"}, {"label": -1}, "from 0 to 2, of 3 choices"),
        ({"choices": "{options}", "answer": "number"}, {"label": 0}, "a number from 1 to 3"),
        ({"choices": "{options}", "answer": "index"}, {"label": 0.5}, "answer '0.5' is not"),
        ({"choices": "{options}", "answer": "letter"}, {"label": "ß"}, "a letter from A to C"),
        ({"choices": "{options}", "answer": "number"}, {"label": True}, "'True' is not a number"),
        ({"choices": "{options}", "answer": "letter"}, {"label": "D"}, "a letter from A to C"),
        ({"choices": "{options}", "answer": "letter"}, {"label": None}, r"'label' is empty"),
        ({"choices": "{A}"}, {"label": "one"}, r"choices='\{A\}' is no list of choices but 'one'"),
        ({"choices": "{options}"}, {"options": ["x"], "label": "x"}, "at least two choices, not 1"),
        ({"choices": "{options}"}, {"options": ["x", ""], "label": "x"}, "choice 2 is an empty"),
        ({"choices": "{options}"}, {"options": ["x", None], "label": "x"}, r"choice 2 is empty"),
        ({"inputs": "q"}, {"label": "x"}, r"inputs='q' is the name of a column.*'\{q\}'"),
    ],
)
def test_a_row_without_a_right_choice(fields, row, sentence):
    with pytest.raises(ValueError, match=sentence):
        task(**fields).example({**ROW, **row})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"targets": "label"}, r"FileTask\.targets='label' .* names no column"),
        ({"answer": "lettr", "choices": "{options}"}, "none of text, .* mean 'letter'"),
        ({"answer": "index"}, r"FileTask\.answer='index' .* needs FileTask\.choices"),
        ({"rank": True}, r"FileTask\.rank=True .* needs FileTask\.choices"),
        ({"rank": True, "choices": ["x"]}, r"FileTask\.rank=True .* needs FileTask\.choices"),
        ({"choices": "yes, no"}, r"choices='yes, no' .* names no column; .*\['yes', 'no'\]"),
        ({"delimiter": ";"}, r"is for \.csv and \.tsv files, and there are none among .*t\.jsonl"),
        ({"delimiter": ";;"}, r"FileTask\.delimiter=';;' .* must be one character"),
        ({"train": "a.parquet.gz"}, r"a\.parquet\.gz' .* must end in one of"),
    ],
)
def test_settings_that_fit_nothing(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        task(**fields)
