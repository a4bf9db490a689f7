"""A recipe: stages that run in order, each from a checkpoint or an earlier stage."""

import dataclasses
from typing import Annotated

from robust_ft import buckets
from robust_ft.ensembles.selection import Selection
from robust_ft.errors import UserError, nearest
from robust_ft.few_shot import FewShot
from robust_ft.partitioning import Partitioner
from robust_ft.ranges import Count, Integer, Range, check_ranges
from robust_ft.stage import STAGE, Stage
from robust_ft.summary import FEW_SHOT


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A finetuning method as data.

    Attributes:
        name: Name of the run in reports.
        model_dir: The folder of all outputs, MODEL_DIR; may be in a bucket (`gs://bucket/run`).
        stages: Stages, in the order they run; none only where all is few-shot evaluation.
        seed: All randomness comes from it.
        partitioner: The mesh and its partitioning rules.
        selections: Selections of lambda, made when all stages have finished: the weight of an
            ensemble of their models, or one of several students. The last one is the recipe's
            result.
        few_shot: Few-shot prompt tuning and evaluation of many tasks, run after all else; what it
            tunes is no result of the recipe.
        compile_effort: The compiler's effort from -1 to 1, JAX's exec_time_optimization_effort; -1
            for models so deep that compiling would take an hour.
        tuned_up_to: Number of parameters up to which the hyperparameters are known to suit; a run
            with a larger model says so. None for no limit.
    """

    name: str
    model_dir: str
    stages: tuple[Stage, ...]
    seed: Integer = 0
    partitioner: Partitioner = Partitioner()
    selections: tuple[Selection, ...] = ()
    few_shot: FewShot | None = None
    compile_effort: Annotated[float, Range(least=-1, most=1)] = 0.0
    tuned_up_to: Count | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "selections", tuple(self.selections))
        buckets.check(self.model_dir, "Recipe.model_dir")
        check_ranges(self)
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names) or not (names or self.few_shot):
            raise UserError(f"Recipe.stages needs stages with different names, not {names}.")
        self._check_selections(names)
        self._check_few_shot(names)
        for i, stage in enumerate(self.stages):
            for verb, source in (
                ("restores from", stage.restore),
                ("has the teacher", stage.teacher or ""),
            ):
                name = source.removeprefix(STAGE)
                if source.startswith(STAGE) and name not in names[:i]:
                    raise UserError(
                        f"Stage '{stage.name}' {verb} '{source}', but the stages before it are "
                        f"{names[:i]}." + nearest(name, names[:i])
                    )

    def _check_selections(self, names: list[str]) -> None:
        taken = list(names)
        for selection in self.selections:
            if selection.name in taken:
                raise UserError(
                    f"Recipe.selections: the name '{selection.name}' is taken: {taken}."
                )
            taken.append(selection.name)
            for name in selection.stages:
                if name not in names:
                    raise UserError(
                        f"Recipe.selections: '{selection.name}' needs a stage '{name}', but there "
                        f"are {names}." + nearest(name, names)
                    )

    @property
    def parts(self) -> tuple[Stage | FewShot, ...]:
        """What has a model, in the order it runs: the stages and few-shot evaluation."""
        return (*self.stages, *([self.few_shot] if self.few_shot is not None else []))

    @property
    def last(self) -> Stage | FewShot:
        """The last stage, whose model is the recipe's; of a recipe without stages, what it has."""
        return (self.stages or self.parts)[-1]

    @property
    def is_evaluated(self) -> bool:
        """Whether a finished run has results to report."""
        return bool(self.few_shot) or any(stage.final_evaluations for stage in self.stages)

    def _check_few_shot(self, names: list[str]) -> None:
        if self.few_shot is None:
            return
        if FEW_SHOT in [*names, *(selection.name for selection in self.selections)]:
            raise UserError(
                f"Recipe.few_shot writes into the folder '{FEW_SHOT}' of MODEL_DIR; give the stage "
                "or selection of that name another one."
            )
        name = self.few_shot.restore.removeprefix(STAGE)
        if self.few_shot.restore.startswith(STAGE) and name not in names:
            raise UserError(
                f"FewShot.restore='{self.few_shot.restore}', but the stages are {names}."
                + nearest(name, names)
            )

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)
