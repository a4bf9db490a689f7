import dataclasses

import numpy as np
import pytest
from every_method import PLUGGED
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_families import CONFIGS, model_of
from tiny_models import tiny_model, tree_equal

from robust_ft import trainable
from robust_ft.errors import UserError
from robust_ft.models.peft import Lora, Prompt

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
        ([".*", "!encoder/.*"], lambda path: not path.startswith("encoder/")),
        (
            ["encoder/.*", "!.*/scale", ".*norm/scale"],
            lambda p: (
                (p.startswith("encoder/") and not p.endswith("/scale")) or p.endswith("norm/scale")
            ),
        ),
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
        ([".*", "!encoder/promt"], "'encoder/promt' matches none .* Did you mean 'encoder/prompt'"),
        (["encoder/.*", "!.*"], "Nothing would train: the trainable patterns .* leave none"),
    ],
)
def test_patterns_that_are_mistakes(patterns, named):
    with pytest.raises(UserError, match=named.replace("(", r"\(")):
        trainable.trainable_paths(PARAMS, patterns)


families = pytest.mark.parametrize("family", CONFIGS)


# --- The words "peft" and "base"


def assert_partition(model):
    """Asserts that "peft" is what the model's methods own, and "base" the pretrained model."""
    shapes = model.shapes()
    peft, base = (
        trainable.trainable_paths(shapes, [word], model.peft_owns) for word in ("peft", "base")
    )
    assert peft and base and not peft & base
    assert peft | base == set(trainable.flatten(shapes))
    assert base == set(trainable.flatten(model.without_peft().shapes()))
    for method in model.peft:
        owned = {path for path in peft if method.owns(path)}
        assert owned and not any(p.owns(path) for p in model.peft for path in owned if p != method)
    everything = trainable.trainable_paths(shapes, ["base", "peft"], model.peft_owns)
    assert everything == peft | base


@families
@pytest.mark.parametrize("method", PLUGGED)
def test_peft_and_base_partition_the_parameters_of_every_method(family, method):
    assert_partition(model_of(family, *PLUGGED[method].peft))


# Names of parameters and modules consist of more letters, so none is another's.
NEW_NAMES = st.from_regex("[x-z][x-z0-9_]{0,5}", fullmatch=True)


@given(
    family=st.sampled_from(sorted(CONFIGS)),
    method=st.sampled_from(sorted(PLUGGED)),
    names=st.lists(NEW_NAMES, min_size=5, max_size=5, unique=True),
)
@settings(max_examples=15, deadline=None)
def test_peft_and_base_partition_the_parameters_of_renamed_methods(family, method, names):
    peft = [
        dataclasses.replace(plugged, name=name)
        for plugged, name in zip(PLUGGED[method].peft, names, strict=False)
    ]
    assert_partition(model_of(family, *peft))


@families
@pytest.mark.parametrize("method", [Lora(name="decoder", rank=2), Prompt(name="mlp", length=3)])
def test_a_method_may_not_have_the_name_of_a_part_of_the_model(family, method):
    message = rf"{type(method).__name__}.name='{method.name}' is a part of .*'.*{method.name}/.*'"
    with pytest.raises(UserError, match=message):
        model_of(family, method).check()
    dataclasses.replace(model_of(family, method), peft=(Prompt(length=3),)).check()


@families
def test_peft_names_nothing_in_a_model_without_methods(family):
    model = model_of(family)
    with pytest.raises(UserError, match=r"'peft' names parameters of PEFT methods.*has none"):
        trainable.trainable_paths(model.shapes(), ["base", "peft"], model.peft_owns)
    assert trainable.trainable_paths(model.shapes(), ["base"], model.peft_owns) == set(
        trainable.flatten(model.shapes())
    )


def test_base_names_nothing_where_methods_own_everything():
    with pytest.raises(UserError, match="'base' matches none of the"):
        trainable.trainable_paths(PARAMS, ["base"], lambda path: True)


# --- Methods that add no parameters

# In the encoder and in the decoder.
NORMS_A_LAYER = {"t5": (2, 3), "bart": (2, 3), "gpt2": (0, 2), "llama": (0, 2)}


def selected(model, patterns):
    return trainable.trainable_paths(model.shapes(), patterns, model.peft_owns)


@families
def test_top_layers(family):
    model = model_of(family)  # of two decoder layers
    paths = set(trainable.flatten(model.shapes()))
    second = {path for path in paths if path.startswith("decoder/layers_1/")}
    both = {path for path in paths if path.startswith("decoder/layers_")}
    assert second and selected(model, trainable.top_layers(model, 1)) == second
    assert both > second and selected(model, trainable.top_layers(model, 2)) == both
    more = trainable.top_layers(model, 1, more=["token_embedder/.*"])
    assert selected(model, more) == second | {"token_embedder/embedding"}
    with pytest.raises(UserError, match=r"count=3 must be from 1 to the decoder's 2 layers"):
        trainable.top_layers(model, 3)
    with pytest.raises(UserError, match="count=0"):
        trainable.top_layers(model, 0)


def test_top_layers_have_numbers_of_any_length():
    model = tiny_model(num_decoder_layers=12)
    (pattern,) = trainable.top_layers(model, 3)
    shapes = {f"layers_{i}": {"mlp": np.zeros(1)} for i in range(120)}
    found = trainable.trainable_paths({"decoder": shapes, "encoder": shapes}, [pattern])
    assert found == {f"decoder/layers_{i}/mlp" for i in (9, 10, 11)}
    patterns = trainable.above_bottom_layers(tiny_model(num_decoder_layers=12), 2)
    params = {"decoder": shapes, "encoder": shapes, "token_embedder": {"embedding": np.zeros(1)}}
    found = trainable.trainable_paths(params, patterns)
    stacks = ("decoder", "encoder")
    assert found == {f"{stack}/layers_{i}/mlp" for stack in stacks for i in range(2, 120)}


@families
def test_top_layers_of_the_encoder(family):
    model = model_of(family)
    if family in ("gpt2", "llama"):
        with pytest.raises(UserError, match=r"encoder=True, but a \w+Config has none"):
            trainable.top_layers(model, 1, encoder=True)
        return
    tops = ("decoder/layers_1/", "encoder/layers_0/")
    expected = {p for p in trainable.flatten(model.shapes()) if p.startswith(tops)}
    assert selected(model, trainable.top_layers(model, 1, encoder=True)) == expected
    with pytest.raises(UserError, match=r"count=2 .* the encoder's 1 layers"):
        trainable.top_layers(model, 2, encoder=True)


@families
def test_above_bottom_layers(family):
    model = model_of(family, Prompt(length=3), Lora(rank=2, target=".*"))
    base = {path for path in trainable.flatten(model.shapes()) if not model.peft_owns(path)}
    embeddings = {path for path in base if "embed" in path and "rel_embedding" not in path}
    assert "token_embedder/embedding" in embeddings
    bottom = {path for path in base if "/layers_0/" in path}
    assert bottom
    assert selected(model, trainable.above_bottom_layers(model, 0)) == base - embeddings
    found = selected(model, trainable.above_bottom_layers(model, 1))
    assert found == base - embeddings - bottom and any("/layers_1/" in path for path in found)
    with pytest.raises(UserError, match=r"count=3 must be from 0 to the decoder's 2 layers"):
        trainable.above_bottom_layers(model, 3)


@families
def test_norms(family):
    model = model_of(family)
    found = selected(model, [".*norm.*/(scale|bias)"])
    encoder, decoder = NORMS_A_LAYER[family]
    norms = encoder + 2 * decoder  # of one and two layers
    norms += {"t5": 2, "bart": 2, "gpt2": 1, "llama": 1}[family]  # in front of or behind them
    leaves = {"scale", "bias"} if family in ("bart", "gpt2") else {"scale"}
    assert len(found) == len(leaves) * norms
    assert {path.rsplit("/", 1)[1] for path in found} == leaves
    shapes = trainable.flatten(model.shapes())
    assert {shapes[path].shape for path in found} == {(model.config.emb_dim,)}
    # There is no scale that is no norm's.
    assert {p for p in found if p.endswith("/scale")} == selected(model, [".*/scale"])


@families
def test_biases(family):
    model = model_of(family)
    if family in ("t5", "llama"):
        with pytest.raises(UserError, match="matches none"):
            selected(model, [".*/bias"])
        return
    found = selected(model, [".*/bias"])
    shapes = trainable.flatten(model.shapes())
    kernels = {p.replace("/kernel", "/bias") for p in shapes if p.endswith("/kernel")}
    norms = {p for p in selected(model, [".*norm.*/(scale|bias)"]) if p.endswith("/bias")}
    assert found == kernels | norms and kernels and norms


@families
def test_bitfit_is_for_every_family(family, caplog):
    with caplog.at_level("INFO"):
        found = selected(model_of(family), trainable.bitfit(model_of(family)))
    has_biases = family in ("bart", "gpt2")
    assert {path.rsplit("/", 1)[1] for path in found} == {"bias" if has_biases else "scale"}
    assert ("has no biases" in caplog.text) != has_biases
