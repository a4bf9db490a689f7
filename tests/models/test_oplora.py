"""OPLoRA against NumPy in float64, on an encoder-decoder and a decoder-only model."""

import dataclasses

import jax
import numpy as np
import pytest
from checks import logits_of
from tiny_families import CONFIGS, batch_of, model_of, params_of

from robust_ft.checkpoints_io import adapters
from robust_ft.checkpoints_io.adapters import Adapter
from robust_ft.errors import UserError
from robust_ft.models.peft import Lora, OPLora
from robust_ft.trainable import flatten, merge, split

K = 5
OPLORA = OPLora(rank=3, alpha=5.0, directions=K, target=r".*layers_0.*/(query|wo)")
families = pytest.mark.parametrize("family", ["t5", "llama"])


def prepared(family):
    """Returns a model and its parameters, `u` and `v` computed from random kernels."""
    model = model_of(family, OPLORA)
    return model, model.initialize_peft(jax.random.key(0), params_of(model))


def float64(leaf):
    return np.asarray(leaf, np.float64)


def references(params):
    """Yields each layer, its projections from NumPy's own SVD and its kernel."""
    flat = flatten(params)
    for path in flat:
        if path.endswith("/oplora/a"):
            kernel = float64(flat[f"{path.removesuffix('/oplora/a')}/kernel"])
            u, s, vt = np.linalg.svd(kernel, full_matrices=False)
            left = np.eye(len(kernel)) - u[:, :K] @ u[:, :K].T
            right = np.eye(kernel.shape[1]) - vt[:K].T @ vt[:K]
            yield path.removesuffix("/oplora/a"), left, right, kernel, (u, s, vt)


@families
def test_the_update_is_projected_and_top_directions_stay(family):
    _, params = prepared(family)
    merged, flat = flatten(OPLORA.merge(params)), flatten(params)
    layers = list(references(params))
    assert {"t5": 5, "llama": 2}[family] == len(layers)
    for layer, left, right, kernel, (u, s, vt) in layers:
        a, b = (float64(flat[f"{layer}/oplora/{name}"]) for name in "ab")
        expected = kernel + 5 / 3 * left @ a @ b @ right
        found = float64(merged[f"{layer}/kernel"])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        assert np.abs(found - kernel).max() > 0.01
        np.testing.assert_allclose(u[:, :K].T @ found, s[:K, None] * vt[:K], rtol=0, atol=1e-5)
        np.testing.assert_allclose(found @ vt[:K].T, u[:, :K] * s[:K], rtol=0, atol=1e-5)


@families
def test_gradients_are_projected(family):
    model, params = prepared(family)
    rng = np.random.default_rng(1)
    trained = model.without_fixed(path for path in flatten(params) if model.peft_owns(path))
    assert {path.rsplit("/", 1)[1] for path in trained} == {"a", "b"}
    inside, outside = split(params, trained)
    given = {path: rng.normal(size=leaf.shape) for path, leaf in flatten(inside).items()}

    def dot(inside):
        exported = flatten(model.export(merge(inside, outside)))
        return sum((leaf * exported[path]).sum() for path, leaf in given.items())

    found = flatten(jax.grad(dot)(inside))
    for layer, left, right, *_ in references(params):
        for name, expected in (
            ("a", left @ given[f"{layer}/oplora/a"]),
            ("b", given[f"{layer}/oplora/b"] @ right),
        ):
            value = found[f"{layer}/oplora/{name}"]
            np.testing.assert_allclose(value, expected, rtol=0, atol=1e-5, err_msg=layer)


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
def test_merged_and_exported_are_the_same_model(family):
    model = model_of(family, dataclasses.replace(OPLORA, target=".*"))
    params = jax.jit(model.initialize_peft)(jax.random.key(0), params_of(model))
    batch = batch_of()
    logits = logits_of(model, params, batch)
    for other, theirs in (
        (model.without("oplora"), OPLORA.merge(params)),
        (model.exported(), jax.jit(model.export)(params)),
    ):
        np.testing.assert_allclose(logits_of(other, theirs, batch), logits, rtol=0, atol=1e-5)
    assert model.exported().peft == (Lora(rank=3, alpha=5.0, target=".*", name="oplora"),)


def test_an_export_is_a_plain_lora_that_fits_the_recipes_method():
    model, params = prepared("t5")
    exported = flatten(jax.jit(model.export)(params))
    owned = {path: leaf for path, leaf in exported.items() if model.peft_owns(path)}
    assert owned.keys() == model.without_fixed(p for p in flatten(params) if model.peft_owns(p))
    adapter = Adapter("the export", model.exported().peft, owned)
    adapters.check_methods(adapter, model.peft)
    other = dataclasses.replace(OPLORA, rank=4)
    with pytest.raises(UserError, match=r"Lora.rank=3, the model has 4"):
        adapters.check_methods(adapter, (other,))


@pytest.mark.parametrize("directions", [16, 200])
def test_directions_must_leave_something(directions):
    model = model_of("t5", OPLora(directions=directions))
    with pytest.raises(UserError, match=rf"directions={directions} leaves nothing .*below 12\."):
        model.check()
    model_of("t5", OPLora(directions=11)).check()
