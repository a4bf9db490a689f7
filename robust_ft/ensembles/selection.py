"""Selections of lambda among the ensembles or cocktails of a recipe's finished stages.

An ensemble needs no training: its members decode together, once for each lambda. A cocktail has a
student for each lambda, trained in a stage of its own (Ensembles and Cocktails, sections 6 and 7).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from robust_ft import console, multihost
from robust_ft.ensembles.mixture_weight import GRID, Candidate, SelectedWeight, check_weights
from robust_ft.ensembles.predictor import Ensemble
from robust_ft.errors import UserError
from robust_ft.evaluate import Evaluation
from robust_ft.evaluator import OOD, TARGET, evaluate
from robust_ft.metric_writer import EVALUATIONS
from robust_ft.metrics.norm_avg import norm_avg
from robust_ft.objectives import Cocktail
from robust_ft.outcome import Outcome
from robust_ft.predictor import BasePredictor, Predictor
from robust_ft.ranges import Share
from robust_ft.stage import STAGE, Stage
from robust_ft.summary import Summary
from robust_ft.vocabulary.base import same_vocabulary


@runtime_checkable
class Load(Protocol):
    """From a stage's name to a predictor."""

    def __call__(self, name: str, at_start: bool = False) -> Predictor:
        """Returns the stage's model with the parameters that it ended with, or started from."""
        ...


@runtime_checkable
class Selection(Protocol):
    """A selection of lambda after a recipe's last stage: a frozen dataclass of its settings."""

    @property
    def name(self) -> str:
        """Its folder in MODEL_DIR, and its name in summary.json."""
        ...

    @property
    def weights(self) -> Sequence[float]:
        """The lambdas that are tried."""
        ...

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of the stages that it needs."""
        ...

    def run(self, directory: Path, summary: Summary, load: Load) -> SelectedWeight:
        """Scores every lambda on in-distribution validation data and selects one.

        Args:
            directory: MODEL_DIR.
            summary: Gets a row for each lambda and metric.
            load: Loads a stage's model.
        """
        ...

    def predictor(self, selected: SelectedWeight, load: Load) -> BasePredictor:
        """Returns the model of the selected lambda."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnsembleSelection:
    """A `Selection` among ensembles of a lightweight and a full model.

    At each token p = lambda * p_light + (1 - lambda) * p_full (Ensembles and Cocktails, eq. 4).

    Attributes:
        name: Its folder in MODEL_DIR, and its name in summary.json.
        light: The lightweight model, `"stage:<name>"`; its weight is lambda.
        full: The full model, `"stage:<name>"`; its weight is 1 - lambda.
        weights: The lambdas that are tried.
        evaluations: Those with the role "target" select; the others are not run.
        final_evaluations: Run for every lambda, to show the trade-off between in-distribution and
            out-of-distribution data.
    """

    name: str = "ensemble"
    light: str
    full: str
    weights: Sequence[Share] = GRID
    evaluations: Sequence[Evaluation]
    final_evaluations: Sequence[Evaluation] = ()

    def __post_init__(self) -> None:
        for field in ("weights", "evaluations", "final_evaluations"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        check_weights(f"The ensemble '{self.name}'", self.weights)
        check_selection(self.name, self.evaluations, self.final_evaluations)

    @property
    def stages(self) -> tuple[str, ...]:
        return self.light.removeprefix(STAGE), self.full.removeprefix(STAGE)

    def run(self, directory: Path, summary: Summary, load: Load) -> SelectedWeight:
        ensemble = Ensemble([load(name) for name in self.stages])
        full = Outcome.read(directory / self.stages[1])
        step = full.step if full else 0
        selecting = [e for e in self.evaluations if e.role == TARGET]
        candidates = []
        for weight in self.weights:
            weighted = ensemble.weighted(weight, 1 - weight)
            results = [evaluate(e, weighted) for e in (*selecting, *self.final_evaluations)]
            folder = f"{self.name}/lambda_{weight:g}"
            for result in results:
                if multihost.is_first():
                    result.write(directory / folder / EVALUATIONS, step)
                rows = result.rows(self.name, step)
                summary.add(dataclasses.replace(row, weight=weight) for row in rows)
            score = norm_avg([result.score for result in results[: len(selecting)]])
            console.print_line(f"[{self.name}] lambda {weight:g}: validation {score:.1f}")
            candidates.append(Candidate(weight, score, folder, step))
        return SelectedWeight.of(candidates, self.stages)

    def predictor(self, selected: SelectedWeight, load: Load) -> Ensemble:
        members = [load(name) for name in self.stages]
        return Ensemble(members, (selected.weight, 1 - selected.weight))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CocktailSelection:
    """A `Selection` among students that were distilled with different weights of the teacher.

    Nothing is decoded: each student has the validation score with which its checkpoint was
    selected.

    Attributes:
        name: Its folder in MODEL_DIR, and its name in summary.json.
        student: The students are the stages `"<student>_<lambda>"`, as `students` names them.
        full: The student of lambda 0, `"stage:<name>"`, which is full finetuning.
        weights: The lambdas that are tried.
    """

    name: str = "cocktail"
    student: str
    full: str
    weights: Sequence[Share] = GRID

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(self.weights))
        check_weights(f"The cocktail '{self.name}'", self.weights)

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of the students' stages, one for each lambda."""
        full = self.full.removeprefix(STAGE)
        return tuple(_student(self.student, w) if w else full for w in self.weights)

    def run(self, directory: Path, summary: Summary, load: Load) -> SelectedWeight:
        candidates = []
        for weight, stage in zip(self.weights, self.stages, strict=True):
            outcome = Outcome.read(directory / stage)
            if outcome is None or outcome.score is None:
                raise UserError(
                    f"The cocktail '{self.name}' is selected by validation scores, but stage "
                    f"'{stage}' has none; give it evaluations on the target."
                )
            # The selected checkpoint's rows once more, under the cocktail's name and with lambda.
            rows = [r for r in summary.rows if (r.stage, r.step) == (stage, outcome.step)]
            summary.add(dataclasses.replace(r, stage=self.name, weight=weight) for r in rows)
            candidates.append(Candidate(weight, outcome.score, stage, outcome.step))
        return SelectedWeight.of(candidates)

    def predictor(self, selected: SelectedWeight, load: Load) -> Predictor:
        return load(selected.selected.folder)


def students(stage: Stage, weights: Sequence[Share] = GRID) -> tuple[Stage, ...]:
    """Returns a stage for each lambda but 0, which is full finetuning and a stage of its own.

    Args:
        stage: Has a `Cocktail` objective and a teacher. Students are named `"<its name>_<lambda>"`.
        weights: The lambdas.
    """
    check_weights(f"students of stage '{stage.name}'", weights)
    objective = stage.objective
    if not isinstance(objective, Cocktail):
        raise UserError(f"students of stage '{stage.name}' need the objective Cocktail.")
    return tuple(
        dataclasses.replace(
            stage,
            name=_student(stage.name, weight),
            objective=dataclasses.replace(objective, teacher_weight=weight),
        )
        for weight in weights
        if weight
    )


def _student(name: str, weight: float) -> str:
    return f"{name}_{weight:g}"


def without_final_evaluations(selection: Selection) -> Selection:
    """Returns a selection that evaluates no more than what selects; some have nothing else."""
    if not hasattr(selection, "final_evaluations"):
        return selection
    settings: Any = selection
    found: Selection = dataclasses.replace(settings, final_evaluations=())
    return found


def check_vocabularies(selection: Selection, stages: Mapping[str, Stage]) -> None:
    """Raises a UserError if the stages of a selection have different vocabularies.

    An ensemble mixes probabilities token by token, and a cocktail's students differ in nothing but
    their lambda.

    Args:
        selection: The selection.
        stages: All stages of the recipe, by name.
    """
    first, *others = (stages[name] for name in selection.stages)
    for other in others:
        sizes = [stage.model.config.vocab_size for stage in (first, other)]
        same = same_vocabulary(first.data.vocabulary, other.data.vocabulary)
        if not same or sizes[0] != sizes[1]:
            raise UserError(
                f"'{selection.name}' needs stages with one vocabulary, but '{first.name}' and "
                f"'{other.name}' have different vocabularies, of {sizes[0]} and {sizes[1]} tokens."
            )


def check_selection(
    name: str, evaluations: Sequence[Evaluation], final_evaluations: Sequence[Evaluation]
) -> None:
    """Raises a UserError if no evaluation would select, or one on out-of-distribution data.

    Args:
        name: The selection's name.
        evaluations: Those with the role "target" select.
        final_evaluations: With `evaluations`, they tell which data are out of distribution.
    """
    selecting = [e.data.task for e in evaluations if e.role == TARGET]
    if not selecting:
        raise UserError(
            f"'{name}' is selected by in-distribution validation data; give it an evaluation with "
            f"the role '{TARGET}'."
        )
    ood = {e.data.task for e in (*evaluations, *final_evaluations) if e.role == OOD}
    for task in selecting:
        if task in ood:
            raise UserError(
                f"'{name}' would be selected on '{task}', which another evaluation has with the "
                f"role '{OOD}'; out-of-distribution data are for reporting only."
            )
