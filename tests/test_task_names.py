"""Names of derived tasks: making and parsing are inverse."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robust_ft import task_names
from robust_ft.task_names import DerivedName

SEEDS = st.none() | st.integers(min_value=0)
# Pieces of suffixes too, so that names nest and nearly parse.
BASES = st.lists(
    st.sampled_from(["rte", "_", "1", "2shot", "_4shot", "_shuffled", "_seed1", "_ood"]), min_size=1
).map("".join)


@given(BASES, st.integers(min_value=0), SEEDS)
def test_what_is_made_is_parsed(base, shots, seed):
    derived = DerivedName(base, shots, seed)
    assert task_names.parse(str(derived)) == derived


@given(BASES)
def test_what_is_parsed_is_made_again(name):
    derived = task_names.parse(name)
    assert derived is None or str(derived) == name


@given(BASES, st.integers(min_value=1))
def test_shots(task, shots):
    assert task_names.with_shots(task, 0) == task
    name = task_names.with_shots(task, shots)
    assert task_names.parse(name) == DerivedName(task, shots)
    assert list(task_names.lineage(name)) == [name, *task_names.lineage(task)]


@pytest.mark.parametrize("name", ["rte", "rte_0shot", "rte_01shot", "_1shot", "rte_seed1", "1shot"])
def test_names_that_are_not_derived(name):
    assert task_names.parse(name) is None


def test_lineage():
    name = "d2t_ood_4shot_seed1"
    assert list(task_names.lineage(name)) == [name, "d2t_ood", "d2t"]
    assert list(task_names.lineage("_ood")) == ["_ood"]
