"""Optimizers and learning rate schedules: frozen settings that build Optax transformations."""

import dataclasses
from typing import Annotated, Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from robust_ft.errors import UserError, nearest
from robust_ft.partitioning import LogicalAxes
from robust_ft.ranges import NonNegative, Positive, Range, Rate, Whole, check_ranges
from robust_ft.trainable import flatten
from robust_ft.types import Params

DECAYS = ("constant", "linear", "cosine", "rsqrt")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A learning rate schedule: linear warmup from 0 to `peak`, then a decay.

    Attributes:
        peak: The rate after warmup.
        warmup_steps: Number of warmup steps.
        decay: "constant"; "linear" or "cosine" to 0 at `decay_steps`; "rsqrt", the inverse square
            root of the step, from the end of warmup.
        decay_steps: The step, counted from 0, at which "linear" and "cosine" reach 0.
    """

    peak: NonNegative
    warmup_steps: Whole = 0
    decay: str = "constant"
    decay_steps: Whole = 0

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.decay not in DECAYS:
            raise UserError(
                f"Schedule.decay='{self.decay}' is not one of {DECAYS}."
                + nearest(self.decay, DECAYS)
            )
        if self.decay in ("linear", "cosine") and self.decay_steps <= self.warmup_steps:
            raise UserError(
                f"Schedule.decay_steps={self.decay_steps} must lie after "
                f"Schedule.warmup_steps={self.warmup_steps} for decay='{self.decay}'."
            )

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """Returns the rate of the update from `step` to `step + 1`."""
        step = jnp.asarray(step, jnp.float32)
        warmup = max(self.warmup_steps, 1)
        rate = self.peak * jnp.minimum(1.0, (step + 1) / warmup)
        if self.decay == "rsqrt":
            return rate * jax.lax.rsqrt(jnp.maximum(step + 1, warmup) / warmup)
        if self.decay == "constant":
            return rate
        decay_length = self.decay_steps - self.warmup_steps
        progress = jnp.clip((step - self.warmup_steps) / decay_length, 0.0, 1.0)
        if self.decay == "linear":
            return rate * (1.0 - progress)
        return rate * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))


@runtime_checkable
class Optimizer(Protocol):
    """A frozen dataclass of an optimizer's settings."""

    @property
    def learning_rate(self) -> Schedule: ...

    def build(self) -> optax.GradientTransformation:
        """Returns the Optax transformation, gradient clipping and learning rate included."""
        ...


@dataclasses.dataclass(frozen=True)
class Adafactor:
    """Adafactor (Shazeer and Stern, 2018) with T5's settings, per parameter leaf.

    Attributes:
        learning_rate: The schedule.
        multiply_by_parameter_scale: Scale each update by its parameter's RMS, at least 1e-3. T5's
            finetuning does; the published prompt tuning code does not.
        decay_rate: Second moments decay with 1 - t^-decay_rate.
        clipping_threshold: The largest RMS of an update, before the learning rate.
        weight_decay: Fraction of a parameter that each step removes, whatever the learning rate.
        clip_norm: The largest global norm of the gradient; None for no limit.
    """

    learning_rate: Schedule
    multiply_by_parameter_scale: bool = True
    decay_rate: Annotated[float, Range(above=0, most=1)] = 0.8
    clipping_threshold: Positive = 1.0
    weight_decay: Rate = 0.0
    clip_norm: Positive | None = None

    def __post_init__(self) -> None:
        check_ranges(self)

    def build(self) -> optax.GradientTransformation:
        transforms = [
            optax.scale_by_factored_rms(decay_rate=self.decay_rate),
            optax.clip_by_block_rms(self.clipping_threshold),
            optax.scale_by_learning_rate(self.learning_rate),  # and by -1
        ]
        if self.multiply_by_parameter_scale:
            transforms.append(optax.stateless(_times_parameter_scale))
        if self.weight_decay:
            transforms.append(optax.add_decayed_weights(-self.weight_decay))
        return _clipped(self.clip_norm, optax.chain(*transforms))


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019).

    Attributes:
        learning_rate: The schedule.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        epsilon: Added to the root of the second moment. Large values (1e-3) keep updates of small
            gradients small instead of normalizing them to full size.
        weight_decay: Times the learning rate, the fraction of a parameter that each step removes.
        clip_norm: The largest global norm of the gradient; None for no limit.
    """

    learning_rate: Schedule
    beta1: Rate = 0.9
    beta2: Rate = 0.999
    epsilon: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    clip_norm: Positive | None = None

    def __post_init__(self) -> None:
        check_ranges(self)

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


def apply_updates(params: Params, updates: Params) -> Params:
    """Returns parameters plus updates: added in the updates' float32, then rounded."""
    updated: Params = jax.tree.map(
        lambda param, update: (param.astype(update.dtype) + update).astype(param.dtype),
        params,
        updates,
    )
    return updated


def moving_average(average: Params, params: Params, decay: float) -> Params:
    """Returns decay * average + (1 - decay) * params, in the average's float32."""
    moved: Params = jax.tree.map(
        lambda mean, leaf: decay * mean + (1 - decay) * leaf.astype(mean.dtype), average, params
    )
    return moved


def _times_parameter_scale(updates: Params, params: Params) -> Params:
    """Scales each update by its parameter's RMS, at least 1e-3.

    Optax's own transformation is differentiable, for which it holds a copy of every parameter.
    """

    def scaled(update: jax.Array, param: jax.Array) -> jax.Array:
        rms = jnp.sqrt(jnp.mean(jnp.square(param)))
        return update * jnp.maximum(rms, 1e-3)

    scaled_updates: Params = jax.tree.map(scaled, updates, params)
    return scaled_updates


def _clipped(
    clip_norm: float | None, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
    if clip_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)
    return _in_float32(optimizer)


def _in_float32(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Holds the state and computes updates in float32, whatever the parameters' dtype.

    Optax takes the parameters' dtype, and moving averages in bfloat16 stop moving: a new term below
    1/256 of the average is rounded away.
    """

    def widen(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params: Any) -> Any:
        return optimizer.init(widen(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        # Optax promotes dtypes and ranks implicitly, where callers may be strict.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            new_updates, new_state = optimizer.update(widen(updates), state, widen(params))
        return new_updates, new_state

    return optax.GradientTransformation(init, update)


def state_axes(opt_state: Any, params: Params, axes: Params) -> Any:
    """Returns the logical axes of every leaf of an optimizer state, so that it is sharded too.

    A leaf shaped like its parameter has the parameter's axes, and Adafactor's factored second
    moments have those that are left. Counters and placeholders are replicated (`None`).

    Args:
        opt_state: The state, or its shapes.
        params: Its parameters, or their shapes.
        axes: Their logical axes, a tree like `params`.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(params).items()}
    names: dict[str, LogicalAxes] = flatten(axes)

    def leaf_axes(key_path: tuple[Any, ...], leaf: Any) -> LogicalAxes | None:
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
