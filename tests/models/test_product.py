"""The matrix product and its gradients are JAX's own, whatever the types."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_ft.models.product import product


@pytest.mark.parametrize("kernel_type", ["float32", "bfloat16"])
@pytest.mark.parametrize("output_type", [None, "float32"])
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6)])
def test_product_and_gradients_are_those_of_matmul(shape, output_type, kernel_type):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape), kernel_type)
    kernel = jnp.asarray(rng.normal(size=(6, 3)), kernel_type)
    factors = jnp.asarray(rng.normal(size=(*shape[:-1], 3)), jnp.float32)

    def both(multiply):
        def loss(x, kernel):
            y = multiply(x, kernel)
            return jnp.sum(y.astype(jnp.float32) * factors), y

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(x, kernel)

    found = both(lambda x, kernel: product(x, kernel, output_type))
    expected = both(lambda x, k: jnp.matmul(x, k, preferred_element_type=output_type))
    # bfloat16 has 8 bits: two roundings of the same number differ by 1/128 at most.
    tolerance = 1e-6 if kernel_type == "float32" else 1 / 128
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        ours, theirs = (np.asarray(each, np.float64) for each in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def test_a_kernel_gradient_is_made_in_the_kernel_s_own_orientation():
    def loss(kernel):
        return jnp.sum(product(jnp.ones((2, 5, 6)), kernel) ** 2)

    assert "transpose[" not in str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((6, 3))))
