"""The protocol of objectives: from a model's logits to a loss, as sums over target positions."""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robust_ft import trainable
from robust_ft.models.model import Model
from robust_ft.types import Batch, Params, Sums

# (loss summed over target positions, sum of the positions' weights, sums of metrics)
LossSums = tuple[Float[Array, ""], Float[Array, ""], Sums]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen model whose distribution a student learns from.

    A pytree of its parameters, so that a jitted step takes it as one argument.

    Attributes:
        model: The model with its PEFT methods, as exported after training.
        params: Its parameters that are not `shared`.
        shared: The paths of those that the student has too, frozen: they are kept once.
    """

    model: Model = dataclasses.field(metadata={"static": True})
    params: Params
    shared: frozenset[str] = dataclasses.field(default=frozenset(), metadata={"static": True})

    def with_shared(self, params: Params) -> "Teacher":
        """Returns it with all of its parameters, the shared ones out of the student's."""
        if not self.shared:
            return self
        shared, _ = trainable.split(params, self.shared)
        return Teacher(self.model, trainable.merge(self.params, shared))


@runtime_checkable
class Objective(Protocol):
    """What a stage minimizes: a frozen dataclass of the loss's settings."""

    @property
    def takes_teacher(self) -> bool:
        """Whether its stage has a teacher (`Stage.teacher`)."""
        ...

    @property
    def needs_teacher(self) -> bool:
        """Whether it is called with the teacher; one of weight 0 need not be loaded."""
        ...

    def __call__(
        self,
        model: Model,
        params: Params,
        batch: Batch,
        rng: jax.Array | None,
        teacher: Teacher | None = None,
    ) -> LossSums:
        """Returns the summed loss, the summed weights and sums of metrics, see `weighted_sums`.

        Args:
            model: The model that trains.
            params: All of its parameters.
            batch: `decoder_loss_weights` says which target positions count.
            rng: A key for dropout, or None for none.
            teacher: The teacher, if `needs_teacher`.
        """
        ...


def weighted_sums(
    batch: Batch, loss: Float[Array, "batch target"], **metrics: Float[Array, "batch target"]
) -> LossSums:
    """Sums a loss and metrics over target positions, weighted by `decoder_loss_weights`."""
    weights = batch["decoder_loss_weights"]  # [batch, target]
    sums = {name: jnp.sum(values * weights) for name, values in metrics.items()}
    return jnp.sum(loss * weights), jnp.sum(weights), sums
