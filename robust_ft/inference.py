"""Evaluates a finished recipe again, and predicts with it."""

import dataclasses
from pathlib import Path

from robust_ft import buckets, multihost
from robust_ft.claiming import check_model
from robust_ft.evaluate import Evaluation
from robust_ft.evaluator import OUTSIDE_TRAINING, evaluate, held_out_rows
from robust_ft.files import as_path, write_json_lines
from robust_ft.predictor import BasePredictor, Predictor
from robust_ft.recipe import Recipe
from robust_ft.restore import load_for_model
from robust_ft.runner import final_predictor
from robust_ft.stage_start import place
from robust_ft.summary import Row


@dataclasses.dataclass(frozen=True)
class Inference:
    """The settings of the commands `eval` and `infer`.

    Attributes:
        evaluations: Run by `eval`; `infer` predicts for the first of them.
        checkpoint: A checkpoint with all parameters; by default the recipe's result, which is its
            last selection, or its last stage's model.
        output_dir: Folder of the predictions; by default MODEL_DIR.
    """

    evaluations: tuple[Evaluation, ...]
    checkpoint: str | None = None
    output_dir: str | None = None

    def __post_init__(self) -> None:
        buckets.check(self.output_dir, "Inference.output_dir")


def load(recipe: Recipe, inference: Inference) -> BasePredictor:
    """Returns the recipe's result, or its last stage's model with `inference.checkpoint`.

    Raises:
        UserError: The recipe has not finished, or with other models than the recipe's, or the
            checkpoint does not fit the model.
    """
    if inference.checkpoint is None:
        check_model(recipe)
        return final_predictor(recipe)
    stage = recipe.last
    vocabulary = stage.data.vocabulary
    loaded = load_for_model(stage.model, inference.checkpoint, vocabulary)
    params = place(recipe, stage, loaded)
    return Predictor(stage.model, params, vocabulary, recipe.partitioner)


def evaluate_all(recipe: Recipe, inference: Inference) -> list[Row]:
    """Evaluates; returns rows as in summary.json, with step -1."""
    predictor = load(recipe, inference)
    results = [evaluate(evaluation, predictor) for evaluation in inference.evaluations]
    is_selection = recipe.selections and inference.checkpoint is None
    name = recipe.selections[-1].name if is_selection else recipe.last.name
    rows = held_out_rows(results, name, OUTSIDE_TRAINING)
    return rows + [row for result in results for row in result.rows(name, OUTSIDE_TRAINING)]


def infer(recipe: Recipe, inference: Inference) -> Path:
    """Predicts for the examples of the first evaluation; returns the JSONL file it wrote."""
    evaluation = inference.evaluations[0]
    result = evaluate(evaluation, load(recipe, inference))
    folder = as_path(inference.output_dir or recipe.model_dir)
    file = folder / f"{evaluation.task}-predict.jsonl-00000-of-00001"
    if multihost.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        write_json_lines(file, result.predictions)
    return file
