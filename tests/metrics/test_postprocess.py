import pytest
from hypothesis import given
from hypothesis import strategies as st

from robust_ft import metrics
from robust_ft.errors import UserError
from robust_ft.metrics.postprocess import first_word, identity, promot

PLAIN = st.text(st.characters(categories=["Ll", "Nd", "Zs"]), max_size=30).map(str.strip)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("<extra_id_0> Paris <extra_id_1> is a city <extra_id_2>", "Paris"),
        ("<extra_id_0>Paris<extra_id_1>", "Paris"),
        ("before <extra_id_0> Paris", "Paris"),
        ("Paris <extra_id_1> and more", "Paris"),
        ("<extra_id_1> junk <extra_id_0> Paris <extra_id_1> more", "Paris"),
        ("  Paris \n", "Paris"),
        ("<extra_id_0> Paris Q: Where is Rome? A: Italy <extra_id_1>", "Paris"),
        ("Paris\nQ: Where is Rome? A: Italy Q: Where", "Paris"),
        ("Paris Q : where is Rome ? A : Italy", "Paris"),
        ("Guten Tag. Translate English to German: Good night. Gute Nacht.", "Guten Tag."),
        ("It rained. Article: Snow fell. One sentence summary: It snowed.", "It rained."),
        ("a Article: b Q: c Translate d", "a"),
        ("Q: Where is Rome?", ""),
        ("see the FAQ: there", "see the FAQ: there"),
        ("Translated books and Articles: a list", "Translated books and Articles: a list"),
        ("", ""),
    ],
)
def test_promot(output, expected):
    assert promot(output) == expected
    assert promot(output, example={"inputs": "Q: ..."}, is_target=False) == expected


def test_a_target_is_not_trimmed():
    assert promot("Translate this Q: now", example=None, is_target=True) == "Translate this Q: now"
    assert promot("<extra_id_0> True <extra_id_1>", is_target=True) == "True"


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("True", "True"),
        ("True. Because it says so", "True"),
        ("False False", "False"),
        ("<extra_id_0> Neither, I think <extra_id_1>", "Neither"),
        ("A) red", "A"),
        ("True Q: next", "True"),
        ("Truely", "Truely"),
        ("'True' it is", "'True'"),
        ("Vrai ou faux", "Vrai"),
        ("Été 1990", "Été"),
        ("", ""),
        ("Q: True", ""),
    ],
)
def test_first_word(output, expected):
    assert first_word(output) == expected
    assert first_word(output, example=None, is_target=False) == expected


@given(PLAIN, PLAIN, st.sampled_from(["Q: ", "Translate ", "Article: ", ""]))
def test_the_answer_comes_out_of_whatever_surrounds_it(answer, rest, prefix):
    wrapped = f"<extra_id_0> {answer} {prefix}{rest if prefix else ''} <extra_id_1> {rest}"
    assert promot(wrapped) == answer
    assert promot(answer) == answer
    assert promot(promot(wrapped)) == promot(wrapped)


@given(st.text(max_size=60), st.booleans())
def test_never_longer_and_never_with_a_first_sentinel_part(text, is_target):
    answer = promot(text, is_target=is_target)
    assert answer in text
    assert answer == answer.strip()
    assert answer.startswith(first_word(text, is_target=is_target))


def test_names_are_found_again():
    for name, function in metrics.POSTPROCESSORS.items():
        assert function.__name__ == name
        assert metrics.get_postprocess(name) is function
    assert metrics.get_postprocess("") is identity
    assert identity(" a Q: b ", example=None, is_target=True) == " a Q: b "
    with pytest.raises(UserError, match=r"no postprocessor 'promt'.* Did you mean 'promot'"):
        metrics.get_postprocess("promt")
