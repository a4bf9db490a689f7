"""Optimizers and learning rate schedules: settings that build Optax transformations."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from robust_ft.errors import UserError, nearest
from robust_ft.trainable import flatten
from robust_ft.types import Params

DECAYS = ("constant", "linear", "cosine", "rsqrt")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A learning rate: linear warm-up from 0 to `peak`, then a decay.

    Attributes:
        peak: The rate after warm-up.
        warmup_steps: Number of steps of warm-up.
        decay: "constant"; "linear" or "cosine" down to 0 at `decay_steps`; "rsqrt", with the
            square root of the step from the end of warm-up on.
        decay_steps: The step, counted from 0, at which "linear" and "cosine" arrive at 0.
    """

    peak: float
    warmup_steps: int = 0
    decay: str = "constant"
    decay_steps: int = 0

    def __post_init__(self) -> None:
        if self.decay not in DECAYS:
            raise UserError(
                f"Schedule.decay='{self.decay}' is not one of {DECAYS}."
                + nearest(self.decay, DECAYS)
            )
        if self.warmup_steps < 0:
            raise UserError(f"Schedule.warmup_steps={self.warmup_steps} must not be negative.")
        if self.decay in ("linear", "cosine") and self.decay_steps <= self.warmup_steps:
            raise UserError(
                f"Schedule.decay_steps={self.decay_steps} must lie after "
                f"Schedule.warmup_steps={self.warmup_steps} for decay='{self.decay}'."
            )

    def __call__(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """Returns the rate of the update that leads from `step` to `step + 1`."""
        step = jnp.asarray(step, jnp.float32)
        warmup = max(self.warmup_steps, 1)
        rate = self.peak * jnp.minimum(1.0, (step + 1) / warmup)
        if self.decay == "rsqrt":
            return rate * jax.lax.rsqrt(jnp.maximum(step + 1, warmup) / warmup)
        if self.decay == "constant":
            return rate
        rest = self.decay_steps - self.warmup_steps
        done = jnp.clip((step - self.warmup_steps) / rest, 0.0, 1.0)
        if self.decay == "linear":
            return rate * (1.0 - done)
        return rate * 0.5 * (1.0 + jnp.cos(jnp.pi * done))


class Optimizer(Protocol):
    """A frozen dataclass of an optimizer's settings."""

    @property
    def learning_rate(self) -> Schedule: ...

    def build(self) -> optax.GradientTransformation:
        """Returns the Optax transformation, gradient clipping and learning rate included."""
        ...


@dataclasses.dataclass(frozen=True)
class Adafactor:
    """Adafactor with T5's settings; each parameter leaf has its own scale and clipping.

    Attributes:
        multiply_by_parameter_scale: Make steps relative to the parameter's RMS (at least 1e-3).
            T5 finetuning does; the published prompt tuning code does not.
        decay_rate: Second moments decay with 1 - t^-decay_rate.
        clipping_threshold: Limit of an update's RMS before the learning rate.
        weight_decay: Share of a parameter that each step removes, whatever the learning rate.
        clip_norm: Limit of the gradient's global norm, or None.
    """

    learning_rate: Schedule
    multiply_by_parameter_scale: bool = True
    decay_rate: float = 0.8
    clipping_threshold: float = 1.0
    weight_decay: float = 0.0
    clip_norm: float | None = None

    def build(self) -> optax.GradientTransformation:
        parts = [
            optax.scale_by_factored_rms(decay_rate=self.decay_rate),
            optax.clip_by_block_rms(self.clipping_threshold),
            optax.scale_by_learning_rate(self.learning_rate),  # and by -1
        ]
        if self.multiply_by_parameter_scale:
            parts.append(optax.stateless(_times_parameter_scale))
        if self.weight_decay:
            parts.append(optax.add_decayed_weights(-self.weight_decay))
        return _clipped(self.clip_norm, optax.chain(*parts))


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay, which is scaled by the learning rate.

    Attributes:
        epsilon: Added to the root of the second moment. Large values (1e-3) keep small gradients
            small instead of normalizing them to full-size steps.
        clip_norm: Limit of the gradient's global norm, or None.
    """

    learning_rate: Schedule
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = None

    def build(self) -> optax.GradientTransformation:
        return _clipped(
            self.clip_norm,
            optax.adamw(
                self.learning_rate,
                b1=self.beta1,
                b2=self.beta2,
                eps=self.epsilon,
                weight_decay=self.weight_decay,
            ),
        )


def _times_parameter_scale(updates: Params, params: Params) -> Params:
    """Multiplies each leaf with its parameter's RMS, at least 1e-3.

    Optax's own transformation, made to have gradients, keeps a copy of every parameter on the way.
    """

    def scaled(update: jax.Array, param: jax.Array) -> jax.Array:
        rms = jnp.sqrt(jnp.mean(jnp.square(param)))
        return update * jnp.maximum(rms, 1e-3)

    return jax.tree.map(scaled, updates, params)


def _clipped(
    clip_norm: float | None, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
    if clip_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)
    return _in_float32(optimizer)


def _in_float32(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keeps the state and computes updates in float32, whatever the parameters' type.

    Optax takes the parameters' type, and moving averages in bfloat16 stop moving: they lose the
    new share of a second moment as soon as it is below 1/256 of the old one.
    """

    def widen(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params: Any) -> Any:
        return optimizer.init(widen(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return optimizer.update(widen(updates), state, widen(params))

    return optax.GradientTransformation(init, update)


def state_axes(opt_state: Any, params: Params, axes: Params) -> Any:
    """Returns the logical axes of every leaf of an optimizer state.

    A leaf shaped like its parameter has the parameter's axes, one of Adafactor's factored second
    moments those that are left; counters and placeholders are replicated (`None`).

    Args:
        opt_state: The state, or its shapes.
        params: The parameters that it belongs to, or their shapes.
        axes: Their logical axes, a tree like `params`.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(params).items()}
    names = flatten(axes)

    def leaf_axes(key_path: tuple[Any, ...], leaf: Any) -> tuple[str | None, ...] | None:
        path = "/".join(str(k.key) for k in key_path if isinstance(k, jax.tree_util.DictKey))
        if path not in shapes:
            return None
        if leaf.shape == shapes[path]:
            return names[path]
        if len(shapes[path]) < 2:
            return None
        # Of the two largest axes, v_row has lost the larger and v_col the smaller one.
        *_, second, largest = np.argsort(shapes[path])
        fields = [k.name for k in key_path if isinstance(k, jax.tree_util.GetAttrKey)]
        for field, lost in (("v_row", largest), ("v_col", second)):
            if field in fields and leaf.shape == tuple(np.delete(shapes[path], lost)):
                return tuple(a for i, a in enumerate(names[path]) if i != lost)
        return None

    return jax.tree_util.tree_map_with_path(leaf_axes, opt_state)
