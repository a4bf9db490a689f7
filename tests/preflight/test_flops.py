"""Counted operations, against hand counts."""

import jax
import jax.numpy as jnp

from robust_ft.preflight import flops


def traced(function, *shapes):
    return jax.jit(function).trace(*[jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes])


def test_products():
    product = traced(lambda a, b: jnp.tanh(a @ b), (3, 5), (5, 7))
    assert flops.count(product) == 2 * 3 * 5 * 7
    batched = traced(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (2, 3, 5), (2, 5, 7))
    assert flops.count(batched) == 2 * 2 * 3 * 5 * 7


def test_loops():
    def scanned(a, b):
        return jax.lax.fori_loop(0, 4, lambda i, x: x @ b, a)

    def endless(a, b):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: x @ b, a)

    once = 2 * 3 * 5 * 5
    assert flops.count(traced(scanned, (3, 5), (5, 5))) == 4 * once
    assert flops.count(traced(endless, (3, 5), (5, 5)), trips=6) == 6 * once


def test_gradients_and_what_is_computed_again():
    def loss(a, b):
        return jnp.sum(jnp.tanh(a @ b))

    once = 2 * 3 * 5 * 7
    both = traced(jax.grad(loss, argnums=(0, 1)), (3, 5), (5, 7))
    assert flops.count(both) == 3 * once
    again = traced(jax.grad(jax.checkpoint(loss), argnums=(0, 1)), (3, 5), (5, 7))
    assert flops.count(again) == 4 * once
