"""What the stages of a run share, and the callbacks that follow its training loop."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from robust_ft import multihost
from robust_ft.evaluator import Result
from robust_ft.objectives import Teacher
from robust_ft.partitioning import Partitioner
from robust_ft.predictor import BasePredictor
from robust_ft.stage import Stage
from robust_ft.summary import Summary
from robust_ft.train_step import TrainState
from robust_ft.types import Sums


@runtime_checkable
class Callback(Protocol):
    """Follows the training loop; inherit from it and override what you need.

    Every process calls it. An exception ends the run, which resumes from its newest checkpoint.
    """

    def on_step(self, stage: Stage, step: int, state: TrainState, sums: Sums) -> None:
        """Called after every training step.

        Args:
            stage: The stage.
            step: Number of steps done.
            state: The state after the step; the next step donates its arrays, so copy what you
                keep.
            sums: The step's metric sums. They are on the device: reading one waits for the step.
        """

    def on_evaluation(self, stage: Stage, step: int, results: Sequence[Result]) -> None:
        """Called after every evaluation, when its results have been written."""

    def on_checkpoint(self, stage: Stage, step: int) -> None:
        """Called when a checkpoint has been copied from the devices; writing goes on behind."""


class RunContext(NamedTuple):
    """What `fit` is given beside the stage and its parameters.

    Attributes:
        directory: MODEL_DIR.
        partitioner: The mesh and its rules.
        seed: All randomness comes from it and the stage's name.
        summary: Collects evaluation results.
        stop: Set from outside (SIGTERM) to save a checkpoint and stop.
        baseline: Whether to evaluate the parameters before the first step as the pretrained model.
        origin: Where the parameters of the stage's base come from, recorded in its export.
        teacher: The stage's teacher, its parameters on the mesh.
        pretrained: Loads the model that the recipe started from, for evaluators.
        callbacks: Called from the training loop.
        tests: Whether to run final evaluations; else they are left to `trainer.test`.
        changed: Whether a setting was changed after the run had begun, so that a position in the
            data may be one in other data.
    """

    directory: Path
    partitioner: Partitioner
    seed: int
    summary: Summary
    stop: multihost.Stop
    baseline: bool = False
    origin: str = ""
    teacher: Teacher | None = None
    pretrained: Callable[[], BasePredictor] | None = None
    callbacks: Sequence[Callback] = ()
    tests: bool = True
    changed: bool = False
