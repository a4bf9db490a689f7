"""The weight is chosen by validation scores, of equal ones the most mixed."""

import dataclasses
import inspect
import json
import math

import pytest

from robust_ft.ensembles.mixture_weight import FILE, GRID, Candidate, SelectedWeight, select
from robust_ft.errors import UserError


def test_the_grid_is_the_papers():
    assert GRID == (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ({0: 63.2, 0.5: 65.0, 1: 63.1}, 0.5),
        ({0: 70.0, 0.1: 69.9, 1: 10.0}, 0),
        ({0: 1.0, 1: 2.0}, 1),
        ({0.9: 5.0}, 0.9),
        # Of equal ones the nearest to a half, then the larger.
        (dict.fromkeys(GRID, 50.0), 0.5),
        ({0: 94.0, 0.5: 98.6, 0.75: 98.6, 1: 98.6}, 0.5),
        ({0.25: 80.0, 0.75: 80.0, 0.5: 79.0}, 0.75),
        ({0.9: 98.6, 1: 98.6, 0.5: 90.0}, 0.9),
        ({0: 0.0, 1: 0.0}, 1),
        ({0: -math.inf, 0.1: -math.inf}, 0.1),
    ],
)
def test_choose(scores, best):
    assert select(scores) == best
    assert select(dict(reversed(scores.items()))) == best


def test_the_choice_can_see_nothing_but_validation_scores():
    assert list(inspect.signature(select).parameters) == ["validation_scores"]


@pytest.mark.parametrize(
    ("scores", "sentence"),
    [
        ({}, "select needs at least one lambda"),
        ({1.5: 1.0}, "lambda=1.5 must be from 0 .* to 1"),
        ({0.5: 1.0, -0.1: 2.0}, "lambda=-0.1 must be from 0"),
        ({math.nan: 1.0}, "lambda=nan must be from 0"),
    ],
)
def test_bad_scores(scores, sentence):
    with pytest.raises(UserError, match=sentence):
        select(scores)


def test_a_choice_is_read_as_it_was_written(tmp_path):
    candidates = [Candidate(0.0, 63.0, "full", 150), Candidate(0.25, 65.5, "cocktail_0.25", 100)]
    selection = SelectedWeight.of(candidates)
    assert (selection.weight, selection.selected) == (0.25, candidates[1])
    assert SelectedWeight.read(tmp_path) is None
    (tmp_path / FILE).write_text(json.dumps(dataclasses.asdict(selection)))
    assert SelectedWeight.read(tmp_path) == selection


def test_nan_never_wins():
    assert select({0.5: math.nan, 1: -3.0, 0: -4.0}) == 1
    assert select({0.5: math.nan, 1: math.nan}) == 0.5
