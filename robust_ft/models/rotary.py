"""Rotary positions: a token's position turns pairs of entries of its queries and keys by angles."""

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

if TYPE_CHECKING:
    from robust_ft.models.llama import LlamaConfig

ROPE_SCALINGS = ("none", "linear", "llama3", "yarn")

Rotary = tuple[jax.Array, jax.Array]  # cosines and sines, each [batch, length, 1, head_dim / 2]


def rotary_angles(positions: Int[Array, "batch length"], cfg: "LlamaConfig") -> Rotary:
    """Returns float32 cosines and sines of each position's angles, times the attention factor."""
    # [batch, length, 1, pairs], the same for all heads
    frequencies = rotary_frequencies(cfg)[None, None, None]
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    scale = attention_factor(cfg)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(
    x: Float[Array, "batch length heads head_dim"], rotary: Rotary
) -> Float[Array, "batch length heads head_dim"]:
    """Rotates entries i and i + head_dim / 2 of every head by their angle, in float32."""
    cos, sin = rotary  # [batch, length, 1, head_dim / 2]
    # Halves, not neighbours, are pairs: Hugging Face's layout. Meta's checkpoints have neighbours.
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return rotated.astype(x.dtype)


def rotary_frequencies(cfg: "LlamaConfig") -> Float[np.ndarray, "pairs"]:
    """Returns by how many radians a position rotates each of the head_dim / 2 pairs of entries."""
    # On the host in float64, and rounded to float32 once, at the end.
    frequencies = cfg.rope_theta ** (-np.arange(0, cfg.head_dim, 2) / cfg.head_dim)
    kept = _kept(cfg, frequencies)
    return (kept * frequencies + (1 - kept) * frequencies / cfg.rope_factor).astype(np.float32)


def attention_factor(cfg: "LlamaConfig") -> float:
    """Returns what queries and keys are multiplied by, beside being rotated."""
    if cfg.rope_scaling != "yarn":
        return 1.0
    if cfg.rope_attention_factor is not None:
        return cfg.rope_attention_factor
    return 0.1 * math.log(cfg.rope_factor) + 1


def _kept(
    cfg: "LlamaConfig", frequencies: Float[np.ndarray, "pairs"]
) -> Float[np.ndarray, "pairs"] | float:
    """Returns how much of each frequency is kept: 1 leaves it, 0 divides it by rope_factor."""
    if cfg.rope_scaling == "none":
        return 1.0
    if cfg.rope_scaling == "linear":
        return 0.0
    if cfg.rope_scaling == "llama3":
        # Linear in the number of periods in the original length.
        periods = cfg.rope_original_length * frequencies / (2 * math.pi)
        low, high = cfg.rope_low_freq_factor, cfg.rope_high_freq_factor
        share: np.ndarray = np.clip((periods - low) / (high - low), 0, 1)
        return share
    # "yarn": linear in the pair's index, between the pairs with beta_fast and beta_slow periods.
    first, last = _pair(cfg, cfg.rope_beta_fast), _pair(cfg, cfg.rope_beta_slow)
    if cfg.rope_truncate:
        first, last = math.floor(first), math.ceil(last)
    # The bounds, the last one's too, are those of YaRN's own code.
    first, last = max(first, 0), min(last, cfg.head_dim - 1)
    width = last - first or 0.001
    stretched: np.ndarray = np.clip((np.arange(cfg.head_dim // 2) - first) / width, 0, 1)
    return 1 - stretched


def _pair(cfg: "LlamaConfig", periods: float) -> float:
    """Returns the index, a fraction, of the pair with this many periods in the original length."""
    wavelength = cfg.rope_original_length / periods
    return cfg.head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(cfg.rope_theta))
