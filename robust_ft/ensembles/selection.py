"""Ensembles and cocktails of a recipe's finished stages: one for each weight, and which is best.

Ensembles need no training: members are decoded together once for each weight. Of cocktails there
is a student for each weight, a stage of its own (Ensembles and Cocktails, sections 6 and 7).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from robust_ft import console
from robust_ft.ensembles.mixture_weight import GRID, Candidate, SelectedWeight, check_weights
from robust_ft.ensembles.predictor import Ensemble
from robust_ft.errors import UserError
from robust_ft.evaluate import OOD, TARGET, Evaluation, evaluate
from robust_ft.metric_writer import EVALUATIONS
from robust_ft.metrics.norm_avg import norm_avg
from robust_ft.objectives import Cocktail
from robust_ft.outcome import Outcome
from robust_ft.predictor import Predictor
from robust_ft.stage import STAGE, Stage
from robust_ft.summary import Summary

# From a stage's name to a predictor with the parameters that the stage ended with.
Load = Callable[[str], Predictor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnsembleSelection:
    """Decodes a lightweight and a full model together with each weight, and chooses one.

    At each token p = lambda * p_light + (1 - lambda) * p_full (Ensembles and Cocktails, eq. 4).

    Attributes:
        name: Its folder in MODEL_DIR and what summary.json calls it.
        light: "stage:<name>" of the stage whose model has the weight lambda.
        full: Of the stage whose model has the rest.
        weights: All lambdas that are tried.
        evaluations: Of these, the ones on the target choose; the others are left out.
        final_evaluations: Run with every weight, to show the trade-off between data like that of
            training and other data.
    """

    name: str = "ensemble"
    light: str
    full: str
    weights: tuple[float, ...] = GRID
    evaluations: tuple[Evaluation, ...]
    final_evaluations: tuple[Evaluation, ...] = ()

    def __post_init__(self) -> None:
        for field in ("weights", "evaluations", "final_evaluations"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        check_weights(f"The ensemble '{self.name}'", self.weights)
        check_selection(self.name, self.evaluations, self.final_evaluations)

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of the stages that have to finish before."""
        return self.light.removeprefix(STAGE), self.full.removeprefix(STAGE)

    def run(self, directory: Path, summary: Summary, load: Load) -> SelectedWeight:
        """Decodes with each weight, writes what was said and how good it is, and chooses.

        Args:
            directory: MODEL_DIR.
            summary: Gets a row for each weight and metric.
            load: Gives a stage's model.
        """
        ensemble = Ensemble([load(name) for name in self.stages])
        full = Outcome.read(directory / self.stages[1])
        step = full.step if full else 0
        chosen_by = [e for e in self.evaluations if e.role == TARGET]
        candidates = []
        for weight in self.weights:
            weighted = ensemble.weighted(weight, 1 - weight)
            results = [evaluate(e, weighted) for e in (*chosen_by, *self.final_evaluations)]
            folder = f"{self.name}/lambda_{weight:g}"
            for result in results:
                result.write(directory / folder / EVALUATIONS, step)
                summary.add(row | {"lambda": weight} for row in result.rows(self.name, step))
            score = norm_avg([result.score for result in results[: len(chosen_by)]])
            console.print_line(f"[{self.name}] lambda {weight:g}: validation {score:.1f}")
            candidates.append(Candidate(weight, score, folder, step))
        return SelectedWeight.of(candidates)

    def predictor(self, selection: SelectedWeight, load: Load) -> Ensemble:
        """Returns the chosen ensemble."""
        members = [load(name) for name in self.stages]
        return Ensemble(members, (selection.weight, 1 - selection.weight))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CocktailSelection:
    """Chooses among students that were trained with different weights.

    Attributes:
        name: Its folder in MODEL_DIR and what summary.json calls it.
        student: The students are the stages "<student>_<lambda>", as `students` names them.
        full: "stage:<name>" of the student of weight 0, which is full finetuning.
        weights: All lambdas.
    """

    name: str = "cocktail"
    student: str
    full: str
    weights: tuple[float, ...] = GRID

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(self.weights))
        check_weights(f"The cocktail '{self.name}'", self.weights)

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of the stages that have to finish before, one for each weight."""
        full = self.full.removeprefix(STAGE)
        return tuple(_student(self.student, w) if w else full for w in self.weights)

    def run(self, directory: Path, summary: Summary, load: Load) -> SelectedWeight:
        """Chooses by the score that each student's checkpoint was selected with.

        Args:
            directory: MODEL_DIR.
            summary: Gets the chosen checkpoints' rows once more, under this name with their weight.
            load: Not needed; nothing is decoded.
        """
        candidates = []
        for weight, stage in zip(self.weights, self.stages, strict=True):
            outcome = Outcome.read(directory / stage)
            if outcome is None or outcome.score is None:
                raise UserError(
                    f"The cocktail '{self.name}' is chosen by validation scores, but stage "
                    f"'{stage}' has none; give it evaluations on the target."
                )
            rows = [r for r in summary.rows if (r["stage"], r["step"]) == (stage, outcome.step)]
            summary.add(row | {"stage": self.name, "lambda": weight} for row in rows)
            candidates.append(Candidate(weight, outcome.score, stage, outcome.step))
        return SelectedWeight.of(candidates)

    def predictor(self, selection: SelectedWeight, load: Load) -> Predictor:
        """Returns the chosen student."""
        return load(selection.selected.folder)


def students(stage: Stage, weights: Sequence[float] = GRID) -> tuple[Stage, ...]:
    """Returns a stage for each weight but 0, which is full finetuning and a stage of its own.

    Args:
        stage: With a `Cocktail` objective and a teacher; its name is what the students' begin with.
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


def check_vocabularies(
    selection: EnsembleSelection | CocktailSelection, stages: Mapping[str, Stage]
) -> None:
    """Raises a UserError if the stages of a selection have different vocabularies.

    An ensemble mixes probabilities token by token, and a cocktail's students differ in nothing but
    their lambda.

    Args:
        selection: An ensemble or a cocktail.
        stages: All of the recipe, by name.
    """
    first, *others = (stages[name] for name in selection.stages)
    for other in others:
        one, another = first.data.vocabulary, other.data.vocabulary
        sizes = [stage.model.config.vocab_size for stage in (first, other)]
        # A fingerprint needs the files, which preflight can do without.
        same = one == another or one.fingerprint == another.fingerprint
        if not same or sizes[0] != sizes[1]:
            raise UserError(
                f"'{selection.name}' needs stages with one vocabulary, but '{first.name}' and "
                f"'{other.name}' have different vocabularies, of {sizes[0]} and {sizes[1]} tokens."
            )


def check_selection(
    name: str, evaluations: Sequence[Evaluation], final_evaluations: Sequence[Evaluation]
) -> None:
    """Raises a UserError if nothing or out-of-distribution data would choose.

    Args:
        name: Of what is chosen.
        evaluations: Those with the role "target" choose.
        final_evaluations: They say which other data are out of distribution.
    """
    selecting = [e.data.task for e in evaluations if e.role == TARGET]
    if not selecting:
        raise UserError(
            f"'{name}' is chosen by in-distribution validation data; give it an evaluation with "
            f"the role '{TARGET}'."
        )
    ood = {e.data.task for e in (*evaluations, *final_evaluations) if e.role == OOD}
    for task in selecting:
        if task in ood:
            raise UserError(
                f"'{name}' would be chosen on '{task}', which OOD_TASKS names as out of "
                "distribution; such data is for reporting only."
            )
