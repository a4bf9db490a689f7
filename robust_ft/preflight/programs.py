"""The programs that a recipe's stages run, traced with shapes and shardings instead of arrays.

They are the same as in a run: the train step that `trainer.fit` jits and the decoding that
`Predictor` jits.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from robust_ft import flow_scale, predictor, stage_anchor, trainable
from robust_ft.evaluate import Evaluation, of_tasks
from robust_ft.models.model import Model
from robust_ft.objectives import Teacher
from robust_ft.objectives.meta_learning import MetaLearning
from robust_ft.partitioning import Partitioner
from robust_ft.recipe import Recipe
from robust_ft.stage import Stage
from robust_ft.stage_start import shared_with_teacher, teacher_model
from robust_ft.stage_step import compile_train_step, state_shardings
from robust_ft.types import Params


class Program(NamedTuple):
    """One program of a stage.

    Attributes:
        name: "train_step", "decode_step" (decoding while the optimizer's state is in memory, as
            during training) or "infer_step" (the same without it).
        traced: The program, not compiled yet.
        parameter_bytes: Bytes per device of all parameters that it reads, a teacher's included.
        optimizer_bytes: Bytes per device of the optimizer's state, and of what a gradient rule
            or an average of parameters carries from step to step.
        trips: The most iterations of its while loops.
    """

    name: str
    traced: jax.stages.Traced
    parameter_bytes: int
    optimizer_bytes: int
    trips: int = 1


def train_step(recipe: Recipe, stage: Stage) -> Program:
    """Traces the stage's train step on the recipe's mesh."""
    stage = flow_scale.with_tau(stage, 1.0)  # a number, which no program's shape depends on
    partitioner, model = recipe.partitioner, stage.model
    params = _placed_params(partitioner, model)
    paths = stage.trainable_paths()
    trained, frozen = trainable.split(params, paths)
    shapes, shardings = state_shardings(stage, trained, partitioner)
    state = _placed(shapes, shardings)
    teacher = None
    model_of_teacher = teacher_model(recipe, stage) if stage.objective.needs_teacher else None
    if model_of_teacher is not None:
        shared = shared_with_teacher(recipe, stage)
        _, own = trainable.split(_placed_params(partitioner, model_of_teacher), shared)
        teacher = Teacher(model_of_teacher, own, shared)
    key = jax.eval_shape(lambda: jax.random.key(0))
    held = stage_anchor.shapes(stage, trained)
    arguments = (state, frozen, teacher, _train_batch(stage, partitioner), key, held)
    with partitioner.activate():
        traced: Any = compile_train_step(stage, state)
        traced = traced.trace(*arguments)
    read = [params, *([] if teacher is None else [teacher.params]), held]
    carried = bytes_a_device((state.opt_state, state.gradient_state, state.average))
    return Program("train_step", traced, sum(map(bytes_a_device, read)), carried)


def decode_step(recipe: Recipe, stage: Stage) -> Program | None:
    """Traces the largest of the stage's evaluations; None if it has none.

    The program decodes one batch: prefill and all decode steps.
    """
    evaluations = of_tasks((*stage.evaluations, *stage.final_evaluations))
    largest = max(evaluations, key=_decoded_tokens, default=None)
    if largest is None:
        return None
    partitioner = recipe.partitioner
    params = _placed_params(partitioner, stage.model)
    paths = stage.trainable_paths()
    shapes, shardings = state_shardings(stage, trainable.split(params, paths)[0], partitioner)
    state = _placed(shapes, shardings)
    model = stage.model.without(*largest.detached(stage.model)).exported()
    read = _placed_params(partitioner, model)
    inputs = (largest.batch_size, largest.data.inputs_length)
    batch = {
        "encoder_input_tokens": _tokens(partitioner, np.int32, *inputs),
        "encoder_input_mask": _tokens(partitioner, np.bool_, *inputs),
    }
    if model.tasks:
        batch["task_index"] = _tokens(partitioner, np.int32, largest.batch_size)
    with partitioner.activate():
        traced: Any = predictor.decode
        traced = traced.trace(model, largest.decoder, read, batch, None)
    carried = bytes_a_device((state.opt_state, state.gradient_state, state.average))
    trips = largest.decoder.max_decode_len
    return Program("decode_step", traced, bytes_a_device(read), carried, trips)


def bytes_a_device(tree: Any) -> int:
    """Returns the bytes per device of a tree of arrays, or of shapes with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _decoded_tokens(evaluation: Evaluation) -> int:
    length = evaluation.data.inputs_length + evaluation.decoder.max_decode_len
    return evaluation.batch_size * evaluation.decoder.beam_size * length


def _train_batch(stage: Stage, partitioner: Partitioner) -> dict[str, Any]:
    data, rows = stage.rows, [stage.batch_size]
    if isinstance(stage.gradient, MetaLearning):
        rows += [stage.gradient.tasks, stage.gradient.batches]
    names = {
        "encoder_input_tokens": data.inputs_length,
        "decoder_input_tokens": data.targets_length,
        "decoder_target_tokens": data.targets_length,
    }
    if stage.packing:
        names["encoder_segment_ids"] = data.inputs_length
        names["decoder_segment_ids"] = data.targets_length
    batch = {name: _tokens(partitioner, np.int32, *rows, length) for name, length in names.items()}
    batch["decoder_loss_weights"] = _tokens(partitioner, np.float32, *rows, data.targets_length)
    if not stage.packing:
        batch["encoder_input_mask"] = _tokens(partitioner, np.bool_, *rows, data.inputs_length)
    if stage.model.tasks:
        batch["task_index"] = _tokens(partitioner, np.int32, *rows)
    if stage.prompts_are_left_out:
        batch["without_prompt"] = _tokens(partitioner, np.bool_, *rows)
    return batch


def _tokens(partitioner: Partitioner, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=partitioner.batch_sharding)


def _placed_params(partitioner: Partitioner, model: Model) -> Params:
    params: Params = _placed(model.shapes(), partitioner.shardings(model.logical_axes()))
    return params


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
