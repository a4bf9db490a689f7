"""What is done with a finished recipe: evaluating it again, and predicting."""

import dataclasses
from pathlib import Path
from typing import Any

from robust_ft import multihost
from robust_ft.evaluate import Evaluation, evaluate, held_out_rows
from robust_ft.files import write_json_lines
from robust_ft.predictor import BasePredictor, Predictor
from robust_ft.recipe import Recipe
from robust_ft.restore import load_for_model
from robust_ft.runner import final_predictor
from robust_ft.stage_start import place


@dataclasses.dataclass(frozen=True)
class Inference:
    """What to load and what to run it on.

    Attributes:
        evaluations: What `eval` evaluates; `infer` predicts for the first of them.
        checkpoint: A checkpoint with all parameters, or None for what the recipe ended with: its
            last selection, or its last stage's model.
        output_dir: Where predictions go; by default MODEL_DIR.
    """

    evaluations: tuple[Evaluation, ...]
    checkpoint: str | None = None
    output_dir: str | None = None


def load(recipe: Recipe, inference: Inference) -> BasePredictor:
    """Returns what the recipe ends with, or its last stage's model with `inference.checkpoint`.

    Raises:
        UserError: The recipe has not finished, or the checkpoint does not fit the model.
    """
    if inference.checkpoint is None:
        return final_predictor(recipe)
    stage = recipe.stages[-1]
    params = place(recipe, stage, load_for_model(stage.model, inference.checkpoint))
    return Predictor(stage.model, params, stage.data.vocabulary, recipe.partitioner)


def evaluate_all(recipe: Recipe, inference: Inference) -> list[dict[str, Any]]:
    """Evaluates; returns rows as in summary.json, with step -1 for "not while training"."""
    predictor = load(recipe, inference)
    results = [evaluate(evaluation, predictor) for evaluation in inference.evaluations]
    chosen = recipe.selections and inference.checkpoint is None
    name = (recipe.selections if chosen else recipe.stages)[-1].name
    rows = held_out_rows(results, name, step=-1)
    return rows + [row for result in results for row in result.rows(name, step=-1)]


def infer(recipe: Recipe, inference: Inference) -> Path:
    """Predicts for the first evaluation's examples; returns the JSONL file it wrote."""
    evaluation = inference.evaluations[0]
    result = evaluate(evaluation, load(recipe, inference))
    folder = Path(inference.output_dir or recipe.model_dir)
    file = folder / f"{evaluation.task}-predict.jsonl-00000-of-00001"
    if multihost.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        write_json_lines(file, result.predictions)
    return file
