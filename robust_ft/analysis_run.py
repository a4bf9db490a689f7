"""Analyses of a finished run: of each stage's start, and of the checkpoints that it kept."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from robust_ft import console, multihost, stage_start
from robust_ft.analysis import Drift, GradientAlignment, PromptNeighbors
from robust_ft.analysis_results import (
    ALIGNMENT,
    DRIFT,
    NEIGHBORS,
    AnalysisResults,
)
from robust_ft.claiming import check_model
from robust_ft.errors import UserError, nearest
from robust_ft.evaluate import Evaluation, of_tasks
from robust_ft.evaluator import TARGET, EvalContext, Evaluator
from robust_ft.files import as_path
from robust_ft.models.peft import Prompt
from robust_ft.outcome import Outcome
from robust_ft.predictor import BasePredictor, Predictor
from robust_ft.ranges import Count, check_ranges
from robust_ft.recipe import Recipe
from robust_ft.stage import Stage
from robust_ft.stage_checkpoints import saved_steps
from robust_ft.summary import Row


@dataclasses.dataclass(frozen=True)
class AnalysisSettings:
    """How finished runs are analysed.

    Attributes:
        stages: Names of the stages; by default all.
        limit: Number of examples of each task; by default that of its evaluation.
        batch_size: Examples at once; by default those that its evaluation decodes at once.
        last_layer: Whether `alignment` takes the decoder's last layer alone, which needs less
            memory.
        count: Number of neighbours of each vector that `neighbors` lists.
        labels: Class labels that `neighbors` looks for; by default those that the prompt started
            from.
    """

    stages: tuple[str, ...] = ()
    limit: Count | None = None
    batch_size: Count | None = None
    last_layer: bool = False
    count: Count = 5
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_ranges(self)

    def of(self, evaluations: Sequence[Evaluator]) -> list[Evaluation]:
        """Returns the evaluations of tasks as they are analysed."""
        tasks = of_tasks(evaluations)
        if self.limit is None:
            return tasks
        return [dataclasses.replace(each, limit=self.limit) for each in tasks]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an analysis computes in a stage.

    Attributes:
        every: At its start and at all checkpoints.
        selected: At the selected checkpoint, and of the pretrained model: what a table compares.
    """

    every: tuple[Evaluator, ...] = ()
    selected: tuple[Evaluator, ...] = ()


def analyse(
    recipe: Recipe, name: str, settings: AnalysisSettings = AnalysisSettings()
) -> list[Row]:
    """Analyses a finished run; what is in `MODEL_DIR/<name>.json` already is not computed again.

    ```python
    recipe = robust_ft.load_recipe("/tmp/run/config.gin")
    rows = analyse(recipe, "drift")
    ```

    Args:
        recipe: What was run; its models must be the run's.
        name: "drift", "alignment" or "neighbors".
        settings: How to analyse.

    Returns:
        All results, as `MODEL_DIR/<name>.json` has them.

    Raises:
        UserError: There is no such analysis or stage, a stage has not finished, the run has nothing
            to analyse so, or its results are of other settings.
    """
    if name not in PLANS:
        known = ", ".join(PLANS)
        raise UserError(f"There is no analysis '{name}', only {known}.{nearest(name, PLANS)}")
    stages = _stages(recipe, settings.stages)
    plans = {stage.name: PLANS[name].plan(stage, settings) for stage in stages}
    if not any(plan.every or plan.selected for plan in plans.values()):
        raise UserError(f"The run in {recipe.model_dir} has {PLANS[name].needs}.")
    check_model(recipe)
    made_with = PLANS[name].made_with(recipe, settings)
    results = AnalysisResults(recipe.model_dir, name, made_with, multihost.is_first())
    with recipe.partitioner.activate():
        for stage in stages:
            _analyse(recipe, stage, plans[stage.name], results)
    return results.rows


def _stages(recipe: Recipe, names: Sequence[str]) -> list[Stage]:
    known = [stage.name for stage in recipe.stages]
    if not known:
        raise UserError(f"The run in {recipe.model_dir} trains no model, it only evaluates one.")
    for name in names:
        if name not in known:
            raise UserError(
                f"The run in {recipe.model_dir} has no stage '{name}', only {', '.join(known)}."
                + nearest(name, known)
            )
    return [stage for stage in recipe.stages if not names or stage.name in names]


def _analyse(recipe: Recipe, stage: Stage, plan: Plan, results: AnalysisResults) -> None:
    """Computes what is missing of a stage, checkpoint by checkpoint."""
    folder = as_path(recipe.model_dir) / stage.name
    outcome = Outcome.read(folder)
    if outcome is None:
        raise UserError(
            f"Stage '{stage.name}' of '{recipe.model_dir}' has not finished; the same command that "
            "started the run resumes it."
        )
    baseline = recipe.stages[0].name == stage.name  # its start is the pretrained model
    steps = [0, *sorted(saved_steps(folder))]
    missing = {
        step: [
            each
            for each in (*plan.every, *_compared(plan, step, outcome.step, baseline))
            if (stage.name, step, each.task, each.split) not in results
        ]
        for step in steps
    }
    if not any(missing.values()):
        return
    start = stage_start.restore(recipe, stage)

    @functools.cache  # kept for the stage's checkpoints
    def pretrained() -> BasePredictor:
        return stage_start.pretrained(recipe, stage)

    every_method = tuple(method.name for method in stage.model.peft)
    for step in steps:
        params = stage_start.at_step(recipe, stage, start, step) if missing[step] else {}
        predictor = Predictor(stage.model, params, stage.data.vocabulary, recipe.partitioner)
        for each in missing[step]:
            is_pretrained = step == 0 and each not in plan.every
            names = every_method if is_pretrained else each.detached(stage.model)
            context = EvalContext(predictor.without(*names), stage, step, None, pretrained)
            result = dataclasses.replace(each(context), without=names)
            results.add(result, stage.name, step)
            console.print_line(
                f"[{stage.name}] step {step}: {each.task} on {each.split}: {_said(result.values)}"
            )


def _compared(plan: Plan, step: int, selected: int, baseline: bool) -> tuple[Evaluator, ...]:
    """Returns what only the selected and the pretrained model are analysed with."""
    is_compared = step == selected or (baseline and step == 0)
    return tuple(each for each in plan.selected if each not in plan.every) if is_compared else ()


def _said(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items() if "/" not in name)


def _drift(stage: Stage, settings: AnalysisSettings) -> Plan:
    def of(evaluations: Sequence[Evaluator]) -> tuple[Evaluator, ...]:
        by_split: dict[str, list[Evaluation]] = {}
        for each in settings.of(evaluations):
            by_split.setdefault(each.split, []).append(each)
        return tuple(
            Drift(of_split, settings.batch_size or of_split[0].batch_size)
            for of_split in by_split.values()
        )

    every, selected = of(stage.evaluations), of(stage.final_evaluations)
    return Plan(every or selected, selected)


def _alignment(stage: Stage, settings: AnalysisSettings) -> Plan:
    """Takes the first target task, as it is evaluated and, if that differs, without PEFT."""
    evaluations = settings.of((*stage.evaluations, *stage.final_evaluations))
    targets = [each for each in evaluations if each.role == TARGET]
    if not targets:
        return Plan()
    names = tuple(method.name for method in stage.model.peft)
    variants = [targets[0]]
    if names and targets[0].detached(stage.model) != names:
        variants.append(dataclasses.replace(targets[0], detach=names))
    return Plan(
        tuple(
            GradientAlignment(each, not settings.last_layer, settings.batch_size or each.batch_size)
            for each in variants
        )
    )


def _neighbors(stage: Stage, settings: AnalysisSettings) -> Plan:
    if not any(isinstance(method, Prompt) for method in stage.model.peft):
        return Plan()
    return Plan((PromptNeighbors(settings.count, settings.labels),))


@dataclasses.dataclass(frozen=True)
class _Analysis:
    """An analysis of finished runs.

    Attributes:
        plan: What it computes in a stage.
        made_with: What its results depend on beside the run: examples, and settings.
        needs: What is said of a run that has nothing to analyse.
    """

    plan: Callable[[Stage, AnalysisSettings], Plan]
    made_with: Callable[[Recipe, AnalysisSettings], dict[str, Any]]
    needs: str


def _examples(recipe: Recipe, settings: AnalysisSettings) -> dict[str, Any]:
    """Returns the number of examples of each task that a recipe evaluates."""
    return {
        f"examples of {each.task} in {each.split}": "all" if each.limit is None else each.limit
        for stage in recipe.stages
        for each in settings.of((*stage.evaluations, *stage.final_evaluations))
    }


PLANS = {
    DRIFT: _Analysis(_drift, _examples, "no evaluation of a task on which drift is measured"),
    ALIGNMENT: _Analysis(
        _alignment,
        lambda recipe, settings: {
            **_examples(recipe, settings),
            "last_layer": settings.last_layer,
        },
        "no target task whose gradients are compared",
    ),
    NEIGHBORS: _Analysis(
        _neighbors,
        lambda _, settings: {"count": settings.count, "labels": list(settings.labels)},
        "no soft prompt",
    ),
}
