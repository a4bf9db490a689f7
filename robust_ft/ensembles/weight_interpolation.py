"""Weight interpolation between a stage's start and its end, selected on validation data.

WiSE-FT (Wortsman et al., 2021, arXiv 2109.01903): parameters (1 - alpha) * pretrained + alpha *
finetuned. The update of a LoRA is scaled by alpha, which is the same of the merged kernels.
"""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp

from robust_ft import buckets, console, export, multihost
from robust_ft.checkpoints_io.stage_record import StageRecord
from robust_ft.checkpoints_io.tokens import Tokens
from robust_ft.ensembles.interpolation import interpolate
from robust_ft.ensembles.mixture_weight import Candidate, SelectedWeight, check_weights, select
from robust_ft.ensembles.selection import Load, check_selection
from robust_ft.errors import UserError
from robust_ft.evaluate import Evaluation
from robust_ft.evaluator import (
    HELD_OUT,
    TARGET,
    EvalContext,
    Result,
    evaluate,
    held_out_rows,
)
from robust_ft.metric_writer import EVALUATIONS
from robust_ft.metrics.norm_avg import norm_avg
from robust_ft.models.peft import Lora
from robust_ft.outcome import Outcome
from robust_ft.predictor import Predictor
from robust_ft.ranges import Share
from robust_ft.stage import SCRATCH, STAGE, Stage
from robust_ft.stage_checkpoints import StageCheckpoints, checkpoint_folder
from robust_ft.summary import KEPT, Summary
from robust_ft.train_step import TrainState
from robust_ft.trainable import flatten, split, unflatten

ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterpolationSelection:
    """A `Selection` of alpha, the weight of what a stage ended with, against what it started from.

    The selected model is kept like a stage, in the selection's folder: a checkpoint, and an export
    where part of the model is as it was.

    Attributes:
        name: Its folder in MODEL_DIR, and its name in summary.json, whose lambda is alpha.
        stage: The stage, `"stage:<name>"`. It trained parameters of the pretrained model, or LoRAs.
        weights: The alphas that are tried, from 0 (the start) to 1 (the end).
        evaluations: Those with the role "target" select; the others are not run.
        final_evaluations: Run for every alpha, to show the trade-off.
    """

    name: str = "wise_ft"
    stage: str
    weights: Sequence[Share] = ALPHAS
    evaluations: Sequence[Evaluation]
    final_evaluations: Sequence[Evaluation] = ()

    def __post_init__(self) -> None:
        for field in ("weights", "evaluations", "final_evaluations"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        check_weights(f"The interpolation '{self.name}'", self.weights)
        check_selection(self.name, self.evaluations, self.final_evaluations)

    @property
    def stages(self) -> tuple[str, ...]:
        return (self.stage.removeprefix(STAGE),)

    def run(self, directory: Path, summary: Summary, load: Load) -> SelectedWeight:
        (stage,) = self.stages
        outcome = Outcome.read(directory / stage)
        assert outcome is not None, "selections follow finished stages"
        step = outcome.step
        ends = load(stage, at_start=True), load(stage)
        selecting = [e for e in self.evaluations if e.role == TARGET]
        candidates = []
        for weight in self.weights:
            model = between(*ends, weight)
            selected = [evaluate(e, model) for e in selecting]
            shown = [evaluate(e, model) for e in self.final_evaluations]
            shown += [_with_loras(e, model) for e in self.final_evaluations if _detaches(e, model)]
            folder = f"{self.name}/lambda_{weight:g}"
            rows = held_out_rows(shown, self.name, step)
            for result in (*selected, *shown):
                if multihost.is_first():
                    result.write(directory / folder / EVALUATIONS, step)
                rows += result.rows(self.name, step)
            summary.add(dataclasses.replace(row, weight=weight) for row in rows)
            score = norm_avg([result.score for result in selected])
            console.print_line(f"[{self.name}] alpha {weight:g}: validation {score:.1f}")
            candidates.append(Candidate(weight, score, folder, step))
        # The lambda of a selection weighs what is closest to the pretrained model.
        by_lambda = {round(1 - each.weight, 9): each for each in candidates}
        best = by_lambda[select({weight: each.score for weight, each in by_lambda.items()})]
        found = SelectedWeight(best.weight, tuple(candidates))
        self._write(directory, ends[0], between(*ends, found.weight), found.selected)
        return found

    def predictor(self, selected: SelectedWeight, load: Load) -> Predictor:
        (stage,) = self.stages
        return between(load(stage, at_start=True), load(stage), selected.weight)

    def check(self, stages: Mapping[str, Stage]) -> None:
        """Raises a UserError if the stage's parameters cannot be interpolated.

        Args:
            stages: All stages of the recipe, by name.
        """
        stage = stages[self.stages[0]]
        if stage.restore == SCRATCH:
            raise UserError(
                f"The interpolation '{self.name}' needs a pretrained model to start from, but its "
                f"stage '{stage.name}' starts from scratch; set Stage.restore."
            )
        before = stages.get(stage.restore.removeprefix(STAGE))
        held = {method.name for method in before.model.peft} if before is not None else set()
        for method in stage.model.peft:
            if not any(map(method.owns, stage.trainable_paths())):
                continue
            what = f"The {type(method).__name__} '{method.name}' of stage '{stage.name}'"
            if not isinstance(method, Lora):
                raise UserError(
                    f"{what} has no pretrained value to interpolate with; the interpolation "
                    f"'{self.name}' is for stages that train the model itself, or a LoRA."
                )
            if method.name in held:
                raise UserError(
                    f"{what} was there before, in stage '{stage.restore}'; the interpolation "
                    f"'{self.name}' scales a LoRA that starts at 0."
                )

    def _write(
        self, directory: Path, start: Predictor, model: Predictor, selected: Candidate
    ) -> None:
        """Writes the selected model into the selection's folder, as a stage leaves its own.

        Args:
            directory: MODEL_DIR.
            start: The model at the stage's start.
            model: The selected one.
            selected: Its result.
        """
        (stage,) = self.stages
        outcome, record = Outcome.read(directory / stage), StageRecord.read(directory / stage)
        assert outcome is not None and record is not None
        folder, paths = directory / self.name, frozenset(outcome.paths)
        _remove(checkpoint_folder(folder, outcome.step))
        trained, _ = split(model.params, paths)
        with StageCheckpoints(folder) as checkpoints:
            state = TrainState(jnp.asarray(outcome.step, jnp.int32), trained, {})
            checkpoints.save(state, {}, selected.score)
        base = export.base_of(start.model, start.params, paths, record.restored_from)
        tokens = Tokens.of(model.model, model.vocabulary)
        place = folder / export.FOLDER
        export.write(place, model.model, model.params, paths, base, tokens, model.partitioner)
        if multihost.is_first():
            record.write(folder)
        dataclasses.replace(outcome, score=selected.score).write(folder)


def between(start: Predictor, end: Predictor, weight: float) -> Predictor:
    """Returns (1 - weight) * start + weight * end, with LoRAs that differ scaled by weight.

    What is the same in both stays so to the last bit.

    Args:
        start: A model as exported.
        end: The same model with other parameters.
        weight: From 0 to 1.
    """
    first, last = flatten(start.params), flatten(end.params)
    owns = end.model.peft_owns
    base = [{path: x for path, x in flat.items() if not owns(path)} for flat in (first, last)]
    mean = flatten(interpolate([unflatten(flat) for flat in base], [1 - weight, weight]))
    params = last | {p: jnp.where(base[0][p] == base[1][p], base[0][p], mean[p]) for p in mean}
    for method in end.model.peft:
        own = [path for path in last if method.owns(path)]
        if isinstance(method, Lora) and any(bool(jnp.any(first[p] != last[p])) for p in own):
            params |= {path: last[path] * weight for path in own if path.endswith("/b")}
    return Predictor(end.model, unflatten(params), end.vocabulary, end.partitioner)


def _detaches(evaluation: Evaluation, model: Predictor) -> bool:
    """Returns whether a held-out task is evaluated without a LoRA."""
    detached = evaluation.detached(model.model)
    loras = [each.name for each in model.model.peft if isinstance(each, Lora)]
    return evaluation.role == HELD_OUT and any(name in detached for name in loras)


def _with_loras(evaluation: Evaluation, model: Predictor) -> Result:
    return dataclasses.replace(evaluation(EvalContext(model)), role=KEPT)


def _remove(folder: Path) -> None:
    """Removes what a killed run has left."""
    if multihost.is_first():
        if buckets.is_bucket(folder):
            buckets.remove(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    multihost.barrier()
