import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import random_params, tiny_model, tree_equal

from robust_ft import trainable
from robust_ft.errors import UserError
from robust_ft.models.peft import Prompt

NAMES = st.text("ab_1", min_size=1, max_size=3)
LEAVES = st.integers(0, 5).map(lambda n: np.arange(n, dtype=np.float32))
TREES = st.dictionaries(
    NAMES,
    st.recursive(
        LEAVES, lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3), max_leaves=8
    ),
    min_size=1,
    max_size=4,
)


@given(tree=TREES, seed=st.integers(0, 2**16))
@settings(max_examples=100, deadline=None)
def test_split_and_merge_are_inverse(tree, seed):
    flat = trainable.flatten(tree)
    rng = np.random.default_rng(seed)
    paths = frozenset(path for path in flat if rng.random() < 0.5)
    inside, outside = trainable.split(tree, paths)
    assert trainable.flatten(inside).keys() == paths
    assert trainable.flatten(outside).keys() == flat.keys() - paths
    for merged in (trainable.merge(inside, outside), trainable.merge(outside, inside)):
        assert list(trainable.flatten(merged)) == sorted(flat)
        assert all(trainable.flatten(merged)[path] is flat[path] for path in flat)


@given(tree=TREES)
@settings(max_examples=50, deadline=None)
def test_flatten_and_unflatten_are_inverse_and_sorted(tree):
    flat = trainable.flatten(tree)
    assert list(flat) == sorted(flat)
    assert trainable.flatten(trainable.unflatten(flat)) == flat
    assert tree_equal(trainable.unflatten(flat), tree)


def test_merge_refuses_two_values_for_one_path():
    part = {"a": {"b": 1}}
    with pytest.raises(ValueError, match="a/b"):
        trainable.merge(part, {"a": {"b": 2, "c": 3}})
    assert trainable.merge(part, {}, {"a": {"c": 3}}) == {"a": {"b": 1, "c": 3}}


PARAMS = tiny_model((Prompt(length=3),)).shapes()


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ([".*"], lambda path: True),
        ([".*/prompt"], lambda path: path == "encoder/prompt"),
        (["(?!.*prompt).*"], lambda path: path != "encoder/prompt"),
        (["encoder/.*", ".*/scale"], lambda p: p.startswith("encoder/") or p.endswith("/scale")),
        ([".*/layers_1/.*"], lambda path: "/layers_1/" in path),
    ],
)
def test_patterns_match_whole_paths(patterns, expected):
    everything = set(trainable.flatten(PARAMS))
    chosen = trainable.trainable_paths(PARAMS, patterns)
    assert chosen == {path for path in everything if expected(path)}


@pytest.mark.parametrize(
    ("patterns", "named"),
    [
        (["prompt"], "'prompt' matches none of the"),
        ([".*", "encoder/promt"], "Did you mean 'encoder/prompt'"),
        (["encoder/(prompt"], "no valid regex"),
        ([], "at least one"),
    ],
)
def test_patterns_that_are_mistakes(patterns, named):
    with pytest.raises(UserError, match=named.replace("(", r"\(")):
        trainable.trainable_paths(PARAMS, patterns)


def test_report_counts_every_parameter_once():
    model = tiny_model((Prompt(length=3),))
    params = random_params(model)
    paths = trainable.trainable_paths(params, [".*/prompt", ".*_norm/scale"])
    sizes = {path: np.size(leaf) for path, leaf in trainable.flatten(params).items()}
    *lines, last = trainable.report(params, paths).splitlines()
    assert len(lines) == len(sizes)
    for line, (path, size) in zip(lines, sizes.items(), strict=True):
        columns = line.split()
        assert columns[0] == path and columns[-2] == f"{size:,}" and "float32" in columns
        assert columns[-1] == ("trainable" if path in paths else "frozen")
    total, trained = sum(sizes.values()), sum(sizes[path] for path in paths)
    # 3 vectors of 16, and norms of 16: two (three) a layer and one a stack.
    assert trained == 3 * 16 + 16 * (2 * 2 + 1 + 2 * 3 + 1)
    assert last == trainable.summary(params, paths)
    assert last.startswith(f"{total:,} parameters, {trained:,} trainable (")
    assert last.endswith(f"{total - trained:,} frozen")
    # Shapes are enough.
    assert trainable.report(model.shapes(), paths) == trainable.report(params, paths)
