"""The scale of FLOW's weights: the median loss of the pretrained model on a stage's examples."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from robust_ft import console, multihost
from robust_ft.errors import UserError
from robust_ft.files import read_json, write_json
from robust_ft.objectives import Flow, Teacher, cross_entropy_of
from robust_ft.objectives.chunked_loss import logit_statistics
from robust_ft.objectives.meta_learning import MetaLearning
from robust_ft.objectives.token_weights import example_losses
from robust_ft.run_context import RunContext
from robust_ft.stage import Stage
from robust_ft.stage_step import train_batches
from robust_ft.types import Batch, Params

FILE = "flow.json"


def measured(stage: Stage, params: Params, run: RunContext) -> Stage:
    """Returns the stage with `Flow.tau` measured, if its objective has a `Flow` without one.

    The first examples that the stage trains on are read once more before its first step. The result
    is kept beside the stage's checkpoints, and a run that resumes reads it.

    Args:
        stage: The stage.
        params: All parameters at its start.
        run: Has the teacher.

    Raises:
        UserError: Training is on meta-batches, or the median is 0.
    """
    rule = _rule(stage)
    if rule is None or rule.tau is not None:
        return stage
    if isinstance(stage.gradient, MetaLearning):
        raise UserError(
            f"Flow.tau=None of stage '{stage.name}' is not measured on the meta-batches of a "
            f"{type(stage.gradient).__name__}; set it to a loss."
        )
    file = run.directory / stage.name / FILE
    found = read_json(file, default=None)
    if found is None:
        assert run.teacher is not None  # `Stage` asks for one
        found = {"tau": _median(stage, run.teacher.with_shared(params), rule.examples, run)}
        if multihost.is_first():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, found)
    console.print_line(f"[{stage.name}] the pretrained model's median loss is {found['tau']:g}.")
    return with_tau(stage, found["tau"])


def with_tau(stage: Stage, tau: float) -> Stage:
    """Returns the stage with a value of `Flow.tau`, if its objective has a `Flow` without one."""
    rule, objective = _rule(stage), stage.objective
    if rule is None or rule.tau is not None:
        return stage
    hard: Any = cross_entropy_of(objective)
    part = dataclasses.replace(hard, token_weights=dataclasses.replace(rule, tau=tau))
    if hard is not objective:
        whole: Any = objective
        part = dataclasses.replace(whole, cross_entropy=part)
    return dataclasses.replace(stage, objective=part)


def _rule(stage: Stage) -> Flow | None:
    hard = cross_entropy_of(stage.objective)
    rule = None if hard is None else hard.token_weights
    return rule if isinstance(rule, Flow) else None


def _median(stage: Stage, teacher: Teacher, examples: int, run: RunContext) -> float:
    batches = train_batches(stage, run.partitioner, run.seed)
    losses: list[float] = []
    for _ in range(-(-examples // stage.batch_size)):
        batch = run.partitioner.put_batch(next(batches))
        names = ("decoder_loss_weights", "decoder_segment_ids")
        read = {name: batch[name] for name in names if name in batch}
        found, arrays = multihost.whole((_losses(teacher, batch), read))
        losses += _of_examples(np.asarray(found), *map(np.asarray, arrays.values()))
    batches.close()
    # Rounded, so that it is the same on every mesh.
    median = float(f"{np.median(losses):.4g}") if losses else 0.0
    if not median > 0:
        raise UserError(
            f"Flow.tau=None of stage '{stage.name}' is the pretrained model's median loss, which "
            "is 0; choose another rule, or set it."
        )
    return median


@jax.jit
def _losses(teacher: Teacher, batch: Batch) -> Float[Array, "batch target"]:
    return example_losses(batch, logit_statistics(teacher.model, teacher.params, batch, None))


def _of_examples(
    losses: Float[np.ndarray, "batch target"],
    weights: Float[np.ndarray, "batch target"],
    segments: Int[np.ndarray, "batch target"] | None = None,
) -> list[float]:
    """Returns one loss of each example that has target tokens."""
    rows = np.broadcast_to(np.arange(len(losses))[:, None], losses.shape)
    segments = np.zeros_like(rows) if segments is None else segments
    found = zip(rows[weights > 0], segments[weights > 0], losses[weights > 0], strict=True)
    return list({(row, segment): float(loss) for row, segment, loss in found}.values())
