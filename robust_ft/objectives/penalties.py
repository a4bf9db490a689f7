"""Penalties: terms of the loss that depend on parameters alone, with gradients in closed form."""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robust_ft.data.cache import TaskData
from robust_ft.ranges import Count, NonNegative, check_ranges
from robust_ft.trainable import flatten, unflatten
from robust_ft.types import Params


class Anchor(NamedTuple):
    """What a penalty holds the parameters to; an argument of the train step.

    Attributes:
        origin: The pretrained model's parameters that train, as they were at the stage's start.
        importance: How much each of them counts, in float32; None if all count alike.
    """

    origin: Params
    importance: Params | None = None


@runtime_checkable
class Penalty(Protocol):
    """What a stage adds to the mean loss: a frozen dataclass of its settings."""

    @property
    def fisher(self) -> "Fisher | None":
        """The Fisher information that is the anchor's importance, None if it has none."""
        ...

    def __call__(self, trained: Params, anchor: Anchor) -> tuple[Float[Array, ""], Params]:
        """Returns its value and its gradient, a float32 tree like `trained`.

        Args:
            trained: All parameters that train; those that the anchor lacks are not penalized.
            anchor: What they are held to.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fisher:
    """Which examples tell how much a pretrained model's parameters matter.

    The diagonal of the empirical Fisher information: the mean over examples of the squared gradient
    of log p(target | input).

    Attributes:
        data: What the pretrained model is to remember.
        examples: Number of examples, each of which takes a forward and backward pass of its own.
    """

    data: TaskData
    examples: Count = 256

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class L2SP:
    """weight / 2 * sum_i (p_i - p0_i)^2: the pretrained model as the origin of weight decay.

    Xuhong Li et al., 2018 (arXiv 1802.01483).

    Attributes:
        weight: The factor.
    """

    weight: NonNegative

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def fisher(self) -> Fisher | None:
        return None

    def __call__(self, trained: Params, anchor: Anchor) -> tuple[Float[Array, ""], Params]:
        return quadratic(self.weight, trained, anchor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ewc:
    """weight / 2 * sum_i F_i (p_i - p0_i)^2, where F is the diagonal of the Fisher information.

    Elastic weight consolidation (Kirkpatrick et al., 2017, arXiv 1612.00796, eq. 3).

    Attributes:
        weight: The factor.
        fisher: The examples that F is computed on, with the pretrained model, at the stage's start.
    """

    weight: NonNegative
    fisher: Fisher

    def __post_init__(self) -> None:
        check_ranges(self)

    def __call__(self, trained: Params, anchor: Anchor) -> tuple[Float[Array, ""], Params]:
        return quadratic(self.weight, trained, anchor)


def quadratic(weight: float, trained: Params, anchor: Anchor) -> tuple[Float[Array, ""], Params]:
    """Returns weight / 2 * sum_i F_i (p_i - p0_i)^2 and its gradient weight * F_i (p_i - p0_i)."""
    origin = flatten(anchor.origin)
    importance = flatten(anchor.importance) if anchor.importance is not None else {}
    value = jnp.zeros((), jnp.float32)
    gradient: dict[str, Any] = {}
    for path, leaf in flatten(trained).items():
        if path not in origin:
            gradient[path] = jnp.zeros(leaf.shape, jnp.float32)
            continue
        moved: jax.Array = leaf.astype(jnp.float32) - origin[path].astype(jnp.float32)
        gradient[path] = weight * moved
        if importance:
            gradient[path] = gradient[path] * importance[path]
        value = value + 0.5 * jnp.sum(gradient[path] * moved)
    return value, unflatten(gradient)
