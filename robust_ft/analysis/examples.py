"""What analyses share: a task's examples with their targets, and the model they are for."""

from collections.abc import Iterator, Sequence

import numpy as np

from robust_ft.data import loader, records
from robust_ft.data.loader import EvalExample
from robust_ft.errors import UserError
from robust_ft.evaluate import Evaluation
from robust_ft.evaluator import EvalContext
from robust_ft.predictor import Predictor
from robust_ft.types import Batch


def predictor(context: EvalContext, analysis: str) -> Predictor:
    """Returns the context's predictor, which must be of one model.

    Raises:
        UserError: It is an ensemble, which has no parameters of its own.
    """
    if not isinstance(context.predictor, Predictor):
        raise UserError(f"{analysis} is of one model, not of an ensemble; analyse its members.")
    return context.predictor


def read(evaluation: Evaluation) -> list[EvalExample]:
    """Returns an evaluation's examples, in the order of the split."""
    return loader.eval_examples(evaluation.task_data, evaluation.limit)


def targets(examples: Sequence[EvalExample]) -> list[np.ndarray]:
    """Returns the tokens of each example's target."""
    return [example.targets for example in examples]


def batches(
    evaluation: Evaluation,
    inputs: Sequence[EvalExample],
    target_tokens: Sequence[np.ndarray],
    predictor: Predictor,
    batch_size: int,
) -> Iterator[Batch]:
    """Yields inputs and targets as training batches on the predictor's mesh, all of one shape.

    Args:
        evaluation: The task.
        inputs: The examples whose inputs to take.
        target_tokens: A target for each.
        predictor: Whose decoder inputs and task indices these are.
        batch_size: Rows of each batch. The last one is filled up with its first example, of which
            no target counts.
    """
    data, model = evaluation.task_data, predictor.model
    rows = [example.inputs for example in inputs]
    for start in range(0, len(rows), batch_size):
        chunk = slice(start, start + batch_size)
        filler = batch_size - len(rows[chunk])
        batch = records.model_batch(
            [*rows[chunk], *[rows[start]] * filler],
            [*target_tokens[chunk], *[target_tokens[start]] * filler],
            data.inputs_length,
            data.targets_length,
            pad_id=data.vocabulary.pad_id,
            start=model.decoder_start,
        )
        batch["decoder_loss_weights"][batch_size - filler :] = 0.0
        if model.tasks:
            index = model.task_index(evaluation.task)
            batch["task_index"] = np.full(batch_size, index, np.int32)
        with predictor.partitioner.activate():
            shared = predictor.partitioner.share_batch(batch)
        yield shared


def check_batch_size(predictor: Predictor, batch_size: int, analysis: str) -> None:
    """Raises a UserError unless batches of an analysis divide over the devices."""
    predictor.partitioner.check_batch(f"{analysis}.batch_size", batch_size, "the analysis")
