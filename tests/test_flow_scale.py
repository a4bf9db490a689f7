"""The median loss that FLOW's weights are relative to: measured once, and kept with the run."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
import toy
from tiny_models import random_params

from robust_ft import flow_scale, stage_step
from robust_ft.errors import UserError
from robust_ft.objectives import CrossEntropy, Flow, KlAnchor, Teacher
from robust_ft.objectives.meta_learning import Reptile
from robust_ft.partitioning import Partitioner
from robust_ft.preflight import programs
from robust_ft.recipe import Recipe
from robust_ft.run_context import RunContext

WIDE = dataclasses.replace(toy.DATA, inputs_length=40, targets_length=12)
OBJECTIVE = CrossEntropy(token_weights=Flow(examples=8))


def prepared(folder, **changes):
    """Returns (stage, its parameters, its context)."""
    settings = {"model": toy.PLAIN, "objective": OBJECTIVE, "teacher": "pretrained"}
    stage = toy.stage("flow", **settings | {"trainable": ["decoder/.*"]} | changes)
    params, partitioner = random_params(toy.PLAIN), Partitioner()
    teacher = Teacher(toy.PLAIN, params)
    return stage, params, RunContext(folder, partitioner, 0, None, None, teacher=teacher)


@pytest.mark.parametrize("packing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_median_is_that_of_examples(tmp_path, packing):
    stage, params, run = prepared(tmp_path, packing=packing, data=WIDE if packing else toy.DATA)
    measured = flow_scale.measured(stage, params, run)
    tau = measured.objective.token_weights.tau
    assert json.loads((tmp_path / "flow" / "flow.json").read_text()) == {"tau": tau}
    batches, losses = stage_step.train_batches(stage, run.partitioner, run.seed), []
    logits_of = jax.jit(toy.PLAIN.logits)
    for batch in itertools.islice(batches, 2):
        logits = np.asarray(logits_of(params, batch), np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        segments = batch.get("decoder_segment_ids", np.ones_like(batch["decoder_target_tokens"]))
        for row, targets in enumerate(batch["decoder_target_tokens"]):
            counted = batch["decoder_loss_weights"][row] > 0
            for segment in np.unique(segments[row][counted]):
                places = np.flatnonzero(counted & (segments[row] == segment))
                losses.append(-log_p[row, places, targets[places]].mean())
    batches.close()
    assert len(losses) > 8 if packing else len(losses) == 8
    assert tau == pytest.approx(np.median(losses), rel=1e-3)
    # A run that goes on reads it, and nothing else.
    assert flow_scale.measured(stage, params, run._replace(teacher=None)) == measured


def test_a_scale_that_is_given_stays_and_parts_of_objectives_are_found(tmp_path):
    stage = toy.stage(objective=KlAnchor(0.1, OBJECTIVE), teacher="pretrained")
    given = flow_scale.with_tau(stage, 2.5)
    assert given.objective == KlAnchor(0.1, CrossEntropy(token_weights=Flow(2.5, examples=8)))
    assert flow_scale.with_tau(given, 1.0) is given
    plain = toy.stage()
    assert flow_scale.with_tau(plain, 1.0) is plain
    assert programs.train_step(Recipe("toy", str(tmp_path), (stage,)), stage)


def test_what_cannot_be_measured_is_refused():
    rule = Reptile(tasks=1, inner_steps=1)
    stage = dataclasses.replace(
        toy.stage(microbatches=1, objective=OBJECTIVE, teacher="pretrained"), gradient=rule
    )
    with pytest.raises(UserError, match=r"Flow.tau=None of stage 'model' is not measured"):
        flow_scale.measured(stage, {}, None)
