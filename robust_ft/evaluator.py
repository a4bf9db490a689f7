"""What a stage can be evaluated with: an `Evaluation` of a task, or an analysis of your own.

An analysis is an object that follows `Evaluator`, usually a frozen dataclass, listed in
`Stage.evaluations` or `Stage.final_evaluations`. Its values appear in summary.json, metrics.jsonl
and TensorBoard like those of any task.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from robust_ft import task_names
from robust_ft.files import write_json_lines
from robust_ft.metrics.norm_avg import norm_avg
from robust_ft.models.model import LanguageModel
from robust_ft.objectives import Teacher
from robust_ft.predictor import BasePredictor
from robust_ft.summary import KEPT, Row

if TYPE_CHECKING:
    from robust_ft.stage import Stage

# What a task is to the run: the finetuned task, the same task on out-of-distribution data, or
# another task. What is no task has the role ANALYSIS.
TARGET, OOD, HELD_OUT = "target", "ood", "held_out"
OUTSIDE_TRAINING = -1  # the step of what is evaluated after the run


@dataclasses.dataclass(frozen=True)
class EvalContext:
    """What an evaluator sees.

    Attributes:
        predictor: The model with its parameters (`predictor.model`, `predictor.params`), without
            the PEFT methods that the evaluator detaches.
        stage: The stage that trains the model; None outside training.
        step: The stage's step; -1 outside training.
        teacher: The stage's teacher, if its objective needs one.
        pretrained: Loads the model that the recipe started from, without PEFT methods. Every call
            reads it anew and takes the memory of a second model: call it once in an evaluation.
    """

    predictor: BasePredictor
    stage: "Stage | None" = None
    step: int = OUTSIDE_TRAINING
    teacher: Teacher | None = None
    pretrained: Callable[[], BasePredictor] | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of an evaluator.

    Attributes:
        task: Name of the task, without the number of shots, or of the analysis.
        split: The split that was evaluated.
        role: "target", "ood", "held_out", "kept" (see `Row`) or "analysis". Targets select
            checkpoints.
        values: Metric values by name; a task's are 0..100, but `format_share` 0..1. The first one
            is the score, which averages and selects.
        num_examples: Number of examples evaluated.
        predictions: One {"input", "target", "prediction"} for each example, in order, with its
            "references" where these are not the target alone. An analysis may have none.
        shots: Number of exemplars in the input.
        without: Names of the PEFT methods that the model was evaluated without.
    """

    task: str
    split: str
    role: str
    values: dict[str, float]
    num_examples: int
    predictions: Sequence[dict[str, Any]] = ()
    shots: int = 0
    without: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The task with its number of shots, as in file names; of the role "kept" with that."""
        name = task_names.with_shots(self.task, self.shots)
        return f"{name}_{KEPT}" if self.role == KEPT else name

    @property
    def metric(self) -> str:
        """The name of the metric that is the score."""
        return next(iter(self.values))

    @property
    def score(self) -> float:
        return self.values[self.metric]

    def rows(self, stage: str, step: int) -> list[Row]:
        """Returns the rows for `summary.json`, one for each metric."""
        return [
            Row(
                stage, step, self.task, self.role, self.split, self.shots,
                metric, value, self.num_examples, without=self.without,
            )
            for metric, value in self.values.items()
        ]  # fmt: skip

    def write(self, directory: Path, step: int) -> None:
        """Writes inputs, targets and predictions, one JSON object a line; no file without any."""
        if not self.predictions:
            return
        directory.mkdir(parents=True, exist_ok=True)
        # As t5x names them; a final evaluation repeats the step on another split.
        name = self.name + ("" if self.split == "validation" else f"-{self.split}")
        write_json_lines(directory / f"{name}-{step:06}.jsonl", self.predictions)


@runtime_checkable
class Evaluator(Protocol):
    """What the training loop asks of an evaluation or an analysis. Must be hashable."""

    @property
    def task(self) -> str:
        """Name of the task with its number of shots, or of the analysis."""

    @property
    def split(self) -> str:
        """The split that is evaluated."""

    @property
    def role(self) -> str:
        """The role of `Result.role`."""

    def detached(self, model: LanguageModel) -> tuple[str, ...]:
        """Returns the names of the PEFT methods that are removed from the model beforehand.

        If nothing but these trains in a stage, the model is the same at every step: it is evaluated
        once and the result is repeated.
        """

    def __call__(self, context: EvalContext) -> Result:
        """Evaluates the model."""


def evaluate(evaluator: Evaluator, predictor: BasePredictor) -> Result:
    """Evaluates a model outside training, without the PEFT methods that the evaluator detaches."""
    names = evaluator.detached(predictor.model)
    result = evaluator(EvalContext(predictor.without(*names)))
    return dataclasses.replace(result, without=names)


def held_out_rows(results: Sequence[Result], stage: str, step: int) -> list[Row]:
    """Returns rows that aggregate the held-out tasks, for each split and number of shots.

    "norm_avg" is ProMoT's Norm. Avg., the mean of the tasks' scores (0..100), and "format_share"
    the mean share of outputs in the target's format (0..1). Those of the role "kept" are over the
    same tasks, with all methods; there are none if one of these was not evaluated so.
    """
    rows: list[Row] = []
    held_out = [result for result in results if result.role == HELD_OUT]
    kept = {(r.task, r.split, r.shots): r for r in results if r.role == KEPT}
    for split, shots in sorted({(result.split, result.shots) for result in held_out}):
        group = [r for r in held_out if (r.split, r.shots) == (split, shots)]
        with_all = [kept.get((r.task, split, shots), r) for r in group]
        if with_all != group and not any(result.without for result in with_all):
            rows += _mean(with_all, KEPT).rows(stage, step)
        rows += _mean(group, HELD_OUT).rows(stage, step)
    return rows


def _mean(group: Sequence[Result], role: str) -> Result:
    """Returns the mean over held-out tasks of one split and number of shots."""
    values = {"norm_avg": norm_avg([result.score for result in group])}
    shares = [r.values["format_share"] for r in group if "format_share" in r.values]
    if shares:
        values["format_share"] = float(np.mean(shares))
    num_examples = sum(result.num_examples for result in group)
    without = tuple(dict.fromkeys(name for result in group for name in result.without))
    return Result(HELD_OUT, group[0].split, role, values, num_examples, (), group[0].shots, without)
