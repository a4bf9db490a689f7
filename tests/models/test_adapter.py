"""Adapters on every family; tests/models/test_methods.py holds what all methods have in common."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import logits_of
from tiny_families import CONFIGS, batch_of, model_of, params_of

from robust_ft.errors import UserError
from robust_ft.models import layers
from robust_ft.models.peft import Adapter
from robust_ft.models.peft.adapter import HOULSBY, PFEIFFER, SITES
from robust_ft.trainable import flatten

families = pytest.mark.parametrize("family", CONFIGS)
ENCODER = {"encoder/layers_0": ("attention", "mlp")}
DECODER = {f"decoder/layers_{i}": ("self_attention", "mlp") for i in range(2)}


def owned(model):
    return {path for path in flatten(model.shapes()) if model.peft_owns(path)}


def parameters_of(places):
    return {
        f"{layer}/adapter_{site}/{half}/{leaf}"
        for layer, sites in places.items()
        for site in sites
        for half in ("down", "up")
        for leaf in ("bias", "kernel")
    }


@families
def test_places_and_shapes(family):
    places = DECODER | (ENCODER if family in ("t5", "bart") else {})
    model = model_of(family, Adapter(size=5))
    assert Adapter().sites == HOULSBY and Adapter().size == 200
    assert owned(model) == parameters_of(places)
    one = model_of(family, Adapter(size=5, sites=PFEIFFER))
    assert owned(one) == parameters_of({layer: ["mlp"] for layer in places})
    shapes, axes = flatten(model.shapes()), flatten(model.logical_axes())
    embed = model.config.emb_dim
    for path in owned(model):
        half, leaf = path.split("/")[-2:]
        shape, names = (embed, 5), ("embed", None)
        if half == "up":
            shape, names = shape[::-1], names[::-1]
        start = 0 if leaf == "kernel" else 1
        assert (shapes[path].shape, axes[path]) == (shape[start:], names[start:])


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_cross_attention_can_have_one(family):
    model = model_of(family, Adapter(size=5, sites=SITES))
    places = {layer: (*DECODER[layer], "encoder_decoder_attention") for layer in DECODER}
    assert owned(model) == parameters_of(places | ENCODER)
    params, batch = params_of(model), batch_of()
    without = model_of(family, Adapter(size=5))
    assert np.abs(logits_of(model, params, batch) - logits_of(without, params, batch)).max() > 0.05


def test_it_is_a_bottleneck_around_what_a_sublayer_adds():
    """An independent computation of one layer of GPT-2's, whose norms come first."""
    adapter = Adapter(size=4, activation="relu")

    class Layer(layers.nn.Module):
        @layers.nn.compact
        def __call__(self, x):
            return adapter.residual(self, "mlp", adapter.residual(self, "encoder_decoder", x))

    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 6)), jnp.float32)
    shapes = jax.eval_shape(lambda: layers.nn.unbox(Layer().init(jax.random.key(0), x)["params"]))
    assert shapes.keys() == {"adapter_mlp"}
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    down, up = (params["adapter_mlp"][half] for half in ("down", "up"))
    hidden = np.maximum(np.asarray(x) @ down["kernel"] + down["bias"], 0)
    expected = np.asarray(x) + hidden @ up["kernel"] + up["bias"]
    variables = {"params": jax.tree.map(jnp.asarray, params)}
    np.testing.assert_allclose(Layer().apply(variables, x), expected, atol=1e-5)
    halved = Layer().apply(variables, jnp.asarray(x, jnp.bfloat16))
    assert halved.dtype == jnp.bfloat16
    np.testing.assert_allclose(halved, expected, atol=0.2)


def test_initial_values():
    class Layer(layers.nn.Module):
        @layers.nn.compact
        def __call__(self, x):
            return Adapter().residual(self, "mlp", x)

    variables = Layer().init(jax.random.key(0), jnp.zeros((1, 1, 300)))
    params = flatten(layers.nn.unbox(variables["params"]))
    for path, leaf in params.items():
        assert leaf.dtype == jnp.float32
        if path.endswith("bias"):
            assert not np.any(leaf)
        else:
            # Two standard deviations, beyond which nothing is drawn, leave 88% of the spread.
            assert np.abs(leaf).max() <= 2e-3 and np.abs(leaf).max() > 1.9e-3
            assert np.std(leaf) == pytest.approx(0.88e-3, rel=0.02)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"size": 0}, "size=0"),
        ({"sites": ("mpl",)}, "'mpl'.*Did you mean 'mlp'"),
        ({"activation": "gleu"}, "'gleu'.*Did you mean 'gelu'"),
        ({"name": "a b"}, "one word"),
    ],
)
def test_settings_out_of_range(settings, named):
    with pytest.raises(UserError, match=named):
        Adapter(**settings)


@pytest.mark.parametrize("sites", [("attention", "encoder_decoder_attention"), ()])
def test_sites_of_which_the_model_has_none(sites):
    model = model_of("gpt2", Adapter(sites=sites))
    with pytest.raises(UserError, match=r"sites=\(.*which are \('self_attention', 'mlp'\)"):
        model.check()
    model_of("gpt2", Adapter(sites=("attention", "mlp"))).check()


def test_sites_may_be_a_list_as_gin_gives_them():
    assert hash(Adapter(sites=["mlp"])) == hash(Adapter(sites=PFEIFFER))
