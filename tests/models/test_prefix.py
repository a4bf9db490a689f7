"""Prefixes on every family; tests/checkpoints_io/test_peft.py compares logits with PEFT's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import decode_cached, logits_of, scattered
from tiny_families import CONFIGS, batch_of, model_of, params_of
from tiny_models import tree_equal

from robust_ft.errors import UserError
from robust_ft.models import layers
from robust_ft.models.peft import Lora, Prefix
from robust_ft.objectives import CrossEntropy
from robust_ft.optim import AdamW, Schedule
from robust_ft.train_step import init_state, make_train_step
from robust_ft.trainable import flatten, split, trainable_paths

families = pytest.mark.parametrize("family", CONFIGS)
counted = pytest.mark.parametrize("counted", [False, True], ids=["uncounted", "counted"])
SITES = {
    "encoder": {"encoder/layers_0/attention"},
    "decoder": {f"decoder/layers_{i}/self_attention" for i in range(2)},
    "cross": {f"decoder/layers_{i}/encoder_decoder_attention" for i in range(2)},
}


def sites_of(model):
    paths = (path for path in flatten(model.shapes()) if model.peft_owns(path))
    return {path.rsplit("/", 2)[0] for path in paths}


@families
def test_shapes_and_switches(family):
    here = ("decoder",) if family in ("gpt2", "llama") else tuple(SITES)
    assert sites_of(model_of(family, Prefix())) == set().union(*(SITES[site] for site in here))
    for site in here:
        only = {switch: switch == site for switch in SITES}
        model = model_of(family, Prefix(length=5, **only))
        assert sites_of(model) == SITES[site]
    shapes = flatten(model.shapes())
    heads = {"t5": (2, 6), "bart": (3, 5), "gpt2": (3, 5), "llama": (2, 6)}[family]
    found = {leaf.shape for path, leaf in shapes.items() if model.peft_owns(path)}
    assert found == {(5, *heads)}


def test_attention_with_slots_is_attention_to_more_keys():
    """An independent computation, with slots for all heads and no bias on them."""
    rng = np.random.default_rng(0)
    module = layers.Attention(2, 3, 7, peft=(Prefix(length=4),), name="self_attention")

    class Whole(layers.nn.Module):
        @layers.nn.compact
        def __call__(self, x, bias):
            attention = module.clone(parent=self)
            return attention(x, attention.project(x), bias, True)

    x = rng.normal(size=(2, 5, 7)).astype(np.float32)
    bias = rng.normal(size=(1, 2, 5, 5)).astype(np.float32)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32),
        layers.nn.unbox(Whole().init(jax.random.key(0), x, bias)["params"]),
    )
    found = Whole().apply({"params": params}, x, bias)
    p = jax.tree.map(np.asarray, params["self_attention"])
    split_ = lambda name: (x @ p[name]["kernel"]).reshape(2, 5, 2, 3)  # noqa: E731
    slots = {k: np.broadcast_to(v, (2, 4, 2, 3)) for k, v in p["prefix"].items()}
    key = np.concatenate([slots["key"], split_("key")], 1)
    value = np.concatenate([slots["value"], split_("value")], 1)
    scores = np.einsum("bqhd,bkhd->bhqk", split_("query"), key)
    scores[..., 4:] += bias
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    mixed = np.einsum("bhqk,bkhd->bqhd", weights, value).reshape(2, 5, 6)
    np.testing.assert_allclose(found, mixed @ p["out"]["kernel"], atol=1e-4)


@families
@counted
def test_cached_decoding_is_uncached(family, counted):
    model = model_of(family, Prefix(length=3, counted=counted))
    params, batch = params_of(model), batch_of()
    expected = jax.nn.log_softmax(logits_of(model, params, batch))
    length = batch["decoder_input_tokens"].shape[1]
    cached = decode_cached(model, params, batch, length)
    np.testing.assert_allclose(cached, expected, rtol=0, atol=1e-4)


@families
def test_it_matters_and_is_gone_without(family):
    model = model_of(family, Prefix(length=3))
    plain = model.without("prefix")
    params, batch = params_of(model), batch_of()
    _, pretrained = split(params, trainable_paths(params, [".*/prefix/.*"]))
    assert flatten(pretrained).keys() == flatten(plain.shapes()).keys()
    logits = logits_of(plain, pretrained, batch)
    np.testing.assert_array_equal(logits_of(plain, params, batch), logits)
    assert np.abs(logits_of(model, params, batch) - logits).max() > 0.05


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@counted
def test_padding_is_invisible(family, counted):
    model = model_of(family, Prefix(length=3, counted=counted))
    params, batch = params_of(model), batch_of()
    expected = logits_of(model, params, batch)
    found = logits_of(model, params, scattered(batch))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@families
def test_only_it_trains_beside_a_lora(family):
    model = model_of(family, Prefix(length=2), Lora(rank=2))
    params = params_of(model)
    trained, frozen = split(params, trainable_paths(params, [".*/prefix/.*"]))
    optimizer = AdamW(Schedule(1e-2))
    step = jax.jit(make_train_step(model, CrossEntropy(), optimizer))
    before = jax.tree.map(np.array, frozen)
    after, _ = step(init_state(optimizer, trained), frozen, None, batch_of(), jax.random.key(0))
    assert tree_equal(frozen, before)
    for path, leaf in flatten(after.trainable).items():
        assert np.any(leaf != flatten(trained)[path]), path


@families
def test_remat_changes_nothing(family):
    model = model_of(family, Prefix(length=2))
    params, batch = params_of(model), batch_of()
    remat = type(model)(
        type(model.config)(**(vars(model.config) | {"remat": "full"})), model.peft, start_id=2
    )
    expected = logits_of(model, params, batch)
    np.testing.assert_allclose(logits_of(remat, params, batch), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"length": 0}, "length=0"),
        ({"encoder": False, "decoder": False, "cross": False}, "encoder, decoder, cross"),
        ({"counted": True, "decoder": False}, "Prefix.decoder"),
    ],
)
def test_settings_out_of_range(settings, named):
    with pytest.raises(UserError, match=named):
        Prefix(**settings)


def test_slots_that_are_counted_need_positions():
    for family, sentence in {
        "bart": "num_positions=32, of which a prefix takes 40",
        "gpt2": "num_positions=48, of which a prefix takes 40",
    }.items():
        model = model_of(family, Prefix(length=40, counted=True))
        params = model_of(family, Prefix(length=40)).shapes()
        with pytest.raises(UserError, match=sentence):
            jax.eval_shape(model.logits, params, batch_of())


def test_prefixes_with_positions_come_first():
    one, two = Prefix("one", length=2), Prefix("two", length=3, counted=True)
    model_of("t5", two, one).shapes()
    with pytest.raises(UserError, match="counted must come before"):
        model_of("t5", one, two).shapes()
