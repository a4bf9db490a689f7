import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_ft.errors import UserError
from robust_ft.metrics.arg import average_relative_gain

# Mean accuracies over the templates of a T0 of T5-XL's size, with deep prompts of 16 examples, as
# the paper's authors published them with their code; the paper's table says that its ARG is 42.9.
PAPER = {
    "anli": (45, 36.7733),
    "hellaswag": (4, 27.8904),
    "story_cloze": (5, 91.8546),
    "cb": (15, 77.8571),
    "copa": (12, 81.0844),
    "rte": (10, 79.1697),
    "wic": (10, 53.9028),
    "wsc": (10, 55.5769),
    "winogrande": (5, 53.7648),
}
ACCURACIES = st.dictionaries(
    st.sampled_from(list(PAPER)), st.lists(st.floats(0, 100), min_size=1, max_size=4), min_size=1
)


def test_the_papers_number_is_averaged_within_datasets_first():
    accuracies = {name: [mean] * templates for name, (templates, mean) in PAPER.items()}
    assert average_relative_gain(accuracies, by_dataset=True) == pytest.approx(42.9, abs=0.05)
    assert average_relative_gain(accuracies) == pytest.approx(38.70, abs=0.05)


@given(ACCURACIES)
@settings(deadline=None)
def test_against_its_definition(accuracies):
    chance = {"anli": 1 / 3, "cb": 1 / 3, "hellaswag": 1 / 4}
    gains = {
        name: [(value / 100 - chance.get(name, 1 / 2)) / chance.get(name, 1 / 2) for value in found]
        for name, found in accuracies.items()
    }
    every = [gain for found in gains.values() for gain in found]
    means = [sum(found) / len(found) for found in gains.values()]
    expected = 100 * sum(every) / len(every)
    assert average_relative_gain(accuracies) == pytest.approx(expected, abs=1e-9)
    expected = 100 * sum(means) / len(means)
    assert average_relative_gain(accuracies, by_dataset=True) == pytest.approx(expected, abs=1e-9)


def test_guessing_never_and_always():
    assert average_relative_gain({"cb": [100 / 3], "rte": [50.0, 50.0]}) == pytest.approx(0)
    assert average_relative_gain({"cb": [0.0], "rte": [0.0]}) == pytest.approx(-100)
    assert average_relative_gain({"cb": [100.0]}) == pytest.approx(200)
    assert average_relative_gain({"mine": [30.0]}, {"mine": 10.0}) == pytest.approx(200)


@pytest.mark.parametrize(
    ("accuracies", "message"),
    [
        ({}, "no accuracies"),
        ({"cb": []}, "no accuracies"),
        ({"cb": [100.1]}, "from 0 to 100, not those of 'cb'"),
        ({"cb": [float("nan")]}, "from 0 to 100"),
        ({"helaswag": [1.0]}, "'helaswag' has no random baseline.* mean 'hellaswag'"),
    ],
)
def test_what_it_refuses(accuracies, message):
    with pytest.raises(UserError, match=f"ARG: .*{message}"):
        average_relative_gain(accuracies)
