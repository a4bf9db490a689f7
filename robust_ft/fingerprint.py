"""A hash of a model's parameters that does not depend on their sharding or float type."""

import hashlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

# Odd numbers without a pattern: from the golden ratio, and the two of MurmurHash3's finalizer.
_SPREAD, _FIRST, _SECOND = (np.uint32(n) for n in (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35))
_NAN = np.uint32(0x7FC00000)


def fingerprint(leaves: Iterable[tuple[str, Any]]) -> str:
    """Returns a hash of parameters' paths, shapes and values, in hexadecimal.

    Values are rounded to bfloat16 first, so that a model has one fingerprint whether it is loaded
    as float32 or as bfloat16. Sharded arrays are hashed on their devices, and only sums leave them.
    It is not a cryptographic hash: models with equal fingerprints can be constructed.

    Args:
        leaves: (path, array) in any order, each path once. NumPy arrays go to the device one at a
            time.
    """
    lines = {}
    for path, leaf in leaves:
        sums = np.asarray(_sums(leaf)).tolist()
        lines[path] = f"{path} {tuple(leaf.shape)} {sums}\n"
    return hashlib.sha256("".join(lines[path] for path in sorted(lines)).encode()).hexdigest()


@jax.jit
def _sums(leaf: Float[Array, "..."]) -> UInt32[Array, "2"]:
    """Returns two sums, modulo 2**32, of words that mix each value with its position.

    Integer sums do not depend on their order, hence not on how an array is sharded.
    """
    position = jnp.zeros(leaf.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(leaf.ndim)):
        step = np.uint32(stride % 2**32)
        position += step * jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        stride *= leaf.shape[axis]
    words = _mixed(_mixed(position * _SPREAD + 1) + _rounded(leaf))
    sums = [jnp.sum(w, dtype=jnp.uint32) for w in (words, _mixed(words + _SPREAD))]
    return jnp.stack(sums)


def _rounded(leaf: Float[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Returns the bits of values rounded to bfloat16, half to even.

    In integer arithmetic, since devices differ in how they treat subnormal numbers and NaN.
    """
    if leaf.dtype == jnp.bfloat16:
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint16).astype(jnp.uint32) << 16
    else:
        bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
    half = 0x7FFF + ((bits >> 16) & 1)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return jnp.where(is_nan, _NAN, bits + half) >> 16


def _mixed(word: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Mixes words so that each bit depends on all bits (MurmurHash3's finalizer)."""
    word = (word ^ (word >> 16)) * _FIRST
    word = (word ^ (word >> 13)) * _SECOND
    return word ^ (word >> 16)
