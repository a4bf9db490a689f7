"""Values that are not finite: a step that ends with some stops the run, or is skipped."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int64

from robust_ft import console, multihost
from robust_ft.data.loader import BatchSource
from robust_ft.errors import Diverged, UserError
from robust_ft.objectives import Teacher
from robust_ft.objectives.penalties import Anchor
from robust_ft.stage import Stage
from robust_ft.train_step import TrainState, TrainStep
from robust_ft.trainable import flatten
from robust_ft.types import Batch, Params, Sums


@runtime_checkable
class CheckedStep(Protocol):
    """As `TrainStep`, and which of the loss and the parameters, by sorted path, are not finite."""

    def __call__(
        self,
        state: TrainState,
        frozen: Params,
        teacher: Teacher | None,
        batch: Batch,
        rng: jax.Array,
        anchor: Anchor | None = None,
    ) -> tuple[TrainState, Sums, Bool[Array, "1+parameters"]]: ...


_SHOWN_PATHS = 3
_SHOWN_EXAMPLES = 64


def checked(train_step: TrainStep, skip: bool) -> CheckedStep:
    """Returns a train step that says what is not finite after it; a pure function to be jitted.

    Args:
        train_step: The step.
        skip: Whether such a step leaves parameters and optimizer as they were, and counts as
            "skipped" in the metric sums, with no other sum. The number of steps goes on, and the
            learning rate with it.
    """

    def checked_step(
        state: TrainState,
        frozen: Params,
        teacher: Teacher | None,
        batch: Batch,
        rng: jax.Array,
        anchor: Anchor | None = None,
    ) -> tuple[TrainState, Sums, Bool[Array, "1+parameters"]]:
        after, sums = train_step(state, frozen, teacher, batch, rng, anchor)
        flags = jnp.stack([*_flags([sums["loss"]]), *_flags(_leaves(after.trainable))])
        if not skip:
            return after, sums, flags
        failed = jnp.any(flags)
        kept: TrainState = jax.tree.map(
            lambda old, new: new if _is_schedule(new) else jnp.where(failed, old, new),
            state,
            after,
            is_leaf=_is_schedule,
        )
        sums = {name: jnp.where(failed, 0.0, value) for name, value in sums.items()}
        sums["skipped"] = failed.astype(jnp.float32)
        return kept._replace(step=after.step), sums, flags

    return checked_step


def _is_schedule(state: Any) -> bool:
    return isinstance(state, optax.ScaleByScheduleState)


@jax.jit
def _flags(leaves: Sequence[Float[Array, "..."]]) -> list[Bool[Array, ""]]:
    return [~jnp.all(jnp.isfinite(leaf)) for leaf in leaves]


def _leaves(params: Params) -> list[jax.Array]:
    return [leaf for _, leaf in sorted(flatten(params).items())]


def check_start(stage: Stage, params: Params, teacher: Teacher | None) -> None:
    """Raises a UserError if a parameter with which a stage starts is not finite."""
    what = f"What stage '{stage.name}' starts from, Stage.restore='{stage.restore}',"
    check(params, what, "give a checkpoint that can be used")
    if teacher is not None:
        what = f"The teacher of stage '{stage.name}', Stage.teacher='{stage.teacher}',"
        check(teacher.params, what, "give a teacher that can be used")


def check(params: Params, what: str, remedy: str) -> None:
    """Raises a UserError if a parameter is not finite.

    Args:
        params: Arrays on the mesh.
        what: Whose they are, for the error message.
        remedy: What to do about it.
    """
    paths = sorted(flatten(params))
    flags = jax.device_get(_flags(_leaves(params)))
    if found := _named(paths, flags):
        raise UserError(f"{what} holds NaN or infinity in {found}; {remedy}.")


def _named(paths: Sequence[str], flags: Iterable[Any]) -> str:
    """Returns which parameters are not finite, in words; "" if all are."""
    found = [path for path, flag in zip(paths, flags, strict=True) if flag]
    if not found:
        return ""
    shown = ", ".join(found[:_SHOWN_PATHS]) + (", ..." if len(found) > _SHOWN_PATHS else "")
    return f"{len(found)} of {len(paths)} parameters ({shown})"


@dataclasses.dataclass
class NonFinite:
    """Stops a stage at the first step whose loss or parameters are not finite, or reports it.

    All processes see the same flags, and call it at the same steps.

    Attributes:
        stage: The stage.
        paths: Those of the parameters that train, sorted.
        batches: Tells examples by their numbers.
        saved: The step of the newest checkpoint, 0 for none.
    """

    stage: Stage
    paths: Sequence[str]
    batches: BatchSource
    saved: int = 0

    def __call__(
        self,
        step: int,
        flags: Bool[np.ndarray, "1+parameters"],
        examples: Int64[np.ndarray, " examples"],
    ) -> None:
        """Does nothing if all is finite.

        Args:
            step: Number of steps done.
            flags: As `checked` returns them.
            examples: The numbers of the batch's examples, `BatchSource.examples`.

        Raises:
            Diverged: Something is not finite, and `Stage.on_nonfinite` is "stop".
        """
        if not flags.any():
            return
        found = ["the loss"] if flags[0] else []
        if parameters := _named(self.paths, flags[1:]):
            found.append(parameters)
        told = f"NaN or infinity in {' and in '.join(found)}, from {self._examples(examples)}"
        if self.stage.on_nonfinite == "skip":
            console.print_line(f"[{self.stage.name}] step {step} skipped: {told}.", "yellow")
            return
        back = f"goes on from checkpoint_{self.saved}" if self.saved else "starts the stage again"
        raise Diverged(
            f"Step {step} of stage '{self.stage.name}' gives {told}; nothing of it is saved, and "
            f"a rerun {back}. Look at the examples, lower Schedule.peak, or set "
            "Stage.on_nonfinite='skip'."
        )

    def _examples(self, numbers: Int64[np.ndarray, " examples"]) -> str:
        """Returns the examples of all processes' batches, in words."""
        parts = multihost.gathered(json.dumps(self.batches.named(numbers)))
        by_task: dict[str, list[int]] = {}
        for task, number in sorted({(task, n) for part in parts for task, n in json.loads(part)}):
            by_task.setdefault(task, []).append(number)
        words, left = [], _SHOWN_EXAMPLES
        for task, positions in by_task.items():
            if shown := positions[:left]:
                words.append(f"{', '.join(map(str, shown))} of '{task}'")
            left -= len(shown)
        count = sum(map(len, by_task.values()))
        more = f" and {count - _SHOWN_EXAMPLES} more" if count > _SHOWN_EXAMPLES else ""
        return f"the examples {' and '.join(words)}{more}"
