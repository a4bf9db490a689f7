"""Every number that a config can set has a range, and is refused outside of it."""

import dataclasses
import inspect
import math
import typing
from collections.abc import Mapping, Sequence

import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st

from robust_ft.data.file_task import FileTask
from robust_ft.decoding import Decoder
from robust_ft.errors import UserError
from robust_ft.evaluate import Evaluation
from robust_ft.gin_config import REGISTERED
from robust_ft.gin_types import typed
from robust_ft.models.t5 import T5Config
from robust_ft.objectives import Cocktail, Fisher
from robust_ft.optim import Schedule
from robust_ft.ranges import Range, check_ranges, range_of

DECODER = Decoder(max_decode_len=2)
# What else must be given.
NEEDED = {
    "AdamW": {"learning_rate": Schedule(0.1)},
    "Adafactor": {"learning_rate": Schedule(0.1)},
    "CocktailSelection": {"student": "s", "full": "stage:f"},
    "Decoder": {"max_decode_len": 8},
    "Drift": {"evaluations": [toy.TARGET_EVALUATION]},
    "EnsembleSelection": {
        "light": "stage:l",
        "full": "stage:f",
        "evaluations": [toy.TARGET_EVALUATION],
    },
    "Evaluation": {"data": toy.DATA, "decoder": DECODER},
    "FewShot": {
        "model": toy.MODEL,
        "restore": "scratch",
        "evaluations": [toy.TARGET_EVALUATION],
        "data": toy.DATA,
        "datasets": ["toy"],
        "optimizer": toy.stage().optimizer,
    },
    "Ewc": {"weight": 1.0, "fisher": Fisher(data=toy.DATA)},
    "Fisher": {"data": toy.DATA},
    "HalfFinetuning": {"optimizer": toy.stage().optimizer, "period": 2},
    "InterpolationSelection": {"stage": "stage:f", "evaluations": [toy.TARGET_EVALUATION]},
    "L2SP": {"weight": 1.0},
    "FileTask": {"name": "t", "inputs": "{a}", "targets": "{b}", "train": "a.csv"},
    "GradientAlignment": {"evaluation": toy.TARGET_EVALUATION},
    "Model": {"config": toy.CONFIG},
    "Recipe": {"name": "r", "model_dir": "/tmp/r", "stages": [toy.stage()]},
    "Replay": {"data": toy.DATA},
    "Schedule": {"peak": 0.1},
    "SentencePieceVocabulary": {"path": "a.model"},
    "Stage": {
        "name": "s",
        "model": toy.MODEL,
        "restore": "scratch",
        "trainable": [".*"],
        "data": toy.DATA,
        "steps": 2,
        "batch_size": 4,
        "optimizer": toy.stage().optimizer,
        "evaluations": [toy.TARGET_EVALUATION],
    },
    "TaskData": {
        "task": "toy",
        "module": "toy_tasks",
        "split": "train",
        "feature_lengths": {"inputs": 8, "targets": 8},
        "vocabulary": toy.DATA.vocabulary,
    },
    "above_bottom_layers": {"model": toy.MODEL, "count": 1},
    "students": {"stage": toy.stage(objective=Cocktail(), teacher="pretrained")},
    "suite": {"split": "test", "target": toy.TARGET_EVALUATION},
    "top_layers": {"model": toy.MODEL, "count": 1},
}
# Only a config's; its families are tried.
ABSTRACT = {"ModelConfig"}
# Below 0 is meant: what it does stands in the docstring.
NEGATIVE = {"Decoder.alpha", "Prompt.low", "Recipe.compile_effort", "Recipe.seed"}
NEGATIVE |= {
    "HalfFinetuning.seed",
    "FileTask.split_seed",
    "GradientAlignment.seed",
    "Partitioner.fully_sharded",
}
# Its own sentence tells what a lambda is, or which layers there are.
OTHERWISE_NAMED = {"students.weights", "top_layers.count", "above_bottom_layers.count"}
OTHERWISE_NAMED |= {"EnsembleSelection.weights", "CocktailSelection.weights"}
OTHERWISE_NAMED |= {"InterpolationSelection.weights"}
SHARE_OF_FILE = {"FileTask.validation", "FileTask.test"}
# Its numbers are in a dictionary: lengths, which TaskData checks, and numbers of shots.
MAPPINGS = {"TaskData.feature_lengths", "suite.held_out_tasks"}


def numbers():
    """Yields (owner, field, annotation) of every number that a config can set."""
    for owner, target in REGISTERED.items():
        if owner not in ABSTRACT:
            for field, parameter in inspect.signature(target, eval_str=True).parameters.items():
                if is_number(parameter.annotation):
                    yield owner, field, parameter.annotation


def is_number(hint):
    if hint in (int, float):
        return True
    if typing.get_origin(hint) is Mapping:
        return False
    return any(map(is_number, typing.get_args(hint)))


NUMBERS = list(numbers())


def test_every_number_has_a_range():
    assert len(NUMBERS) > 90
    bare = {f"{owner}.{field}" for owner, field, hint in NUMBERS if range_of(hint) is None}
    assert bare == SHARE_OF_FILE


@pytest.mark.parametrize(
    ("owner", "field", "hint"), NUMBERS, ids=[f"{owner}.{field}" for owner, field, _ in NUMBERS]
)
def test_absurd_numbers_are_refused(owner, field, hint):
    name = f"{owner}.{field}"
    absurd = [math.nan, math.inf, -math.inf, *([] if name in NEGATIVE else [-1])]
    found = range_of(hint)
    if name in SHARE_OF_FILE or math.isfinite(min(found.most, found.below)):
        absurd.append(10**9)
    is_list = any(typing.get_origin(x) in (Sequence, tuple) for x in (hint, *typing.get_args(hint)))
    for value in absurd:
        given_value = [value] if is_list else value
        with pytest.raises(UserError) as caught:
            typed(owner, REGISTERED[owner])(**{**NEEDED.get(owner, {}), field: given_value})
        text = str(caught.value)
        assert text.endswith(".") and "\n" not in text
        assert name in text or name in OTHERWISE_NAMED, text


@pytest.mark.parametrize(("feature", "length"), [("inputs", 1), ("targets", -1)])
def test_lengths_of_features(feature, length):
    lengths = {"inputs": 8, "targets": 8, feature: length}
    sentence = rf"TaskData.{feature}_length={length} of task 'toy' must be at least 2\."
    with pytest.raises(UserError, match=sentence):
        REGISTERED["TaskData"](**{**NEEDED["TaskData"], "feature_lengths": lengths})


def test_shots_of_a_suite():
    with pytest.raises(UserError, match=r"Evaluation.shots=-1 of the evaluation on"):
        REGISTERED["suite"](
            "test", toy.TARGET_EVALUATION, toy.HELD_OUT_EVALUATION, {-1: ["toy_other"]}
        )


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        (Range(), "a finite number"),
        (Range(least=0), "at least 0"),
        (Range(least=-1, most=1), "from -1 to 1"),
        (Range(least=0, below=1), "at least 0 and below 1"),
        (Range(above=0, most=1), "above 0 and at most 1"),
    ],
)
def test_words(numbers, words):
    assert str(numbers) == words


@given(st.floats(), st.floats(-5, 5), st.floats(-5, 5))
def test_a_range_is_its_limits(number, low, high):
    inside = math.isfinite(number)
    assert (number in Range()) == inside
    assert (number in Range(least=low, below=high)) == (inside and low <= number < high)
    assert (number in Range(above=low, most=high)) == (inside and low < number <= high)


def test_what_is_no_number_passes():
    @dataclasses.dataclass
    class Settings:
        count: typing.Annotated[int, Range(least=1)] | None = None
        many: Sequence[typing.Annotated[float, Range(above=0)]] = ()
        name: str = ""

    check_ranges(Settings())
    check_ranges(Settings(3, [0.5, 1]))
    check_ranges(Settings(True))  # what is of another type is refused elsewhere
    with pytest.raises(UserError, match=r"Settings.count=0 of x must be at least 1, or None\."):
        check_ranges(Settings(0), " of x")
    with pytest.raises(UserError, match=r"Settings.many=0 must be above 0\."):
        check_ranges(Settings(many=[1, 0]))


def test_edges_are_allowed():
    T5Config(dropout_rate=0.0)
    Schedule(0.0)
    Decoder(max_decode_len=1, alpha=-1.0, top_p=1.0, temperature=0.1)
    Evaluation(toy.DATA, DECODER, limit=None)
    FileTask(name="t", inputs="{a}", targets="{b}", train="a.csv", validation=0.5)
