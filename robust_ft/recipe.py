"""What a recipe is: stages one after the other, each starting where an earlier one ended."""

import dataclasses

from robust_ft.ensembles.selection import Selection
from robust_ft.errors import UserError, nearest
from robust_ft.partitioning import Partitioner
from robust_ft.stage import STAGE, Stage


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A finetuning method as data.

    Attributes:
        name: What the report calls the run.
        model_dir: Where everything is written.
        stages: Run in this order.
        seed: All randomness comes from it.
        partitioner: The mesh and the rules that place arrays on it.
        selections: Made when all stages have finished: of the weight of an ensemble of their
            models, or among students that were trained with different weights. The last one is
            what the recipe ends with.
        compile_effort: Of the compiler, from -1, for models of so many layers that it would take
            an hour, to 1; JAX's exec_time_optimization_effort.
    """

    name: str
    model_dir: str
    stages: tuple[Stage, ...]
    seed: int = 0
    partitioner: Partitioner = Partitioner()
    selections: tuple[Selection, ...] = ()
    compile_effort: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "selections", tuple(self.selections))
        if not -1 <= self.compile_effort <= 1:
            raise UserError(f"Recipe.compile_effort={self.compile_effort} must be from -1 to 1.")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names) or not names:
            raise UserError(f"Recipe.stages needs stages with different names, not {names}.")
        self._check_selections(names)
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

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)
