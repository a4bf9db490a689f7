"""What an objective is: a rule from logits to loss, as sums over the positions that count."""

import dataclasses
from typing import Protocol

import jax
from jaxtyping import Array, Float

from robust_ft.models.model import Model
from robust_ft.types import Batch, Params, Sums


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Teacher:
    """A model that another one learns from.

    A pytree of its parameters, so that it goes into a jitted step as one argument.

    Attributes:
        model: The model with its PEFT methods, as after training.
        params: All of its parameters.
    """

    model: Model = dataclasses.field(metadata={"static": True})
    params: Params


class Objective(Protocol):
    """A frozen dataclass of the loss's settings."""

    @property
    def takes_teacher(self) -> bool:
        """Whether its stage has a teacher (`Stage.teacher`)."""
        ...

    @property
    def needs_teacher(self) -> bool:
        """Whether it is called with the teacher; one without weight need not be loaded."""
        ...

    def __call__(
        self,
        model: Model,
        params: Params,
        batch: Batch,
        rng: jax.Array | None,
        teacher: Teacher | None = None,
    ) -> tuple[Float[Array, ""], Float[Array, ""], Sums]:
        """Returns the loss summed over target positions, their summed weights, and other sums.

        Args:
            model: What turns parameters and a batch into logits.
            params: All parameters.
            batch: `decoder_loss_weights` says which target positions count.
            rng: A key for dropout, or None for none.
            teacher: The model to learn from, if `needs_teacher`.
        """
        ...
