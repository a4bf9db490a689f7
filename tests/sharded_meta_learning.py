"""Takes FOMAML's and Reptile's train steps on CPU devices; runs in a process of its own.

    python sharded_meta_learning.py OUTPUT.npz

The output has, of each name in CASES, "<case>/loss" and "<case>/<parameter path>", the
meta-gradient.
"""

import sys
from typing import NamedTuple

import jax
import numpy as np
import toy
from every_method import copied
from meta_learning_cases import OPTIMIZERS, PROMPTS, ROWS, RULES, TASKS, Sgd, meta_batch, model_of
from sharded_training import check_sharded, check_state, partitioner_of
from tiny_models import random_params

from robust_ft.objectives import chunked_loss
from robust_ft.restore import place_params
from robust_ft.stage_step import compile_train_step, place_state
from robust_ft.trainable import flatten, split

MESH = {"devices": 8, "fully_sharded": 2, "model_parallel": 2}


class Case(NamedTuple):
    """A rule, and how it is computed.

    Attributes:
        rule: A name in RULES.
        prompt: A name in PROMPTS.
        steps: Of the inner loop.
        groups: Of tasks, one after the other.
        optimizer: Of the inner loop, a name in OPTIMIZERS.
        carries: Whether its state goes on from task to task.
    """

    rule: str
    prompt: str
    steps: int
    groups: int
    optimizer: str = "adam"
    carries: bool = False


# Steps of the inner loop -> groups of tasks, and its optimizer.
STEPS = {1: (1, "adam"), 2: (2, "adafactor"), 7: (TASKS, "adam")}
CASES = [
    *[
        Case(rule, prompt, steps, *how)
        for rule in RULES
        for prompt in PROMPTS
        for steps, how in STEPS.items()
    ],
    Case("fomaml", "shallow", 0, 2),
    Case("reptile", "shallow", 1, 2, "sgd"),
    Case("reptile", "deep", 2, TASKS, carries=True),
]


def gradient_of(case, partitioner):
    """Returns the loss and the gradient that a train step takes, {path: array}."""
    model = model_of(case.prompt)
    inner = OPTIMIZERS[case.optimizer][0]
    stage = toy.stage(
        model=model,
        trainable=[".*"],
        gradient=RULES[case.rule](TASKS, case.steps, inner, carries_state=case.carries),
        # What a step takes away is the gradient.
        optimizer=Sgd(1.0),
        batch_size=ROWS,
        microbatches=case.groups,
    )
    key = jax.random.key(0)
    params = place_params(model, partitioner, flatten(random_params(model)), key, key)
    before = copied(params)
    trained, frozen = split(params, stage.trainable_paths())
    state = place_state(stage, trained, partitioner)
    batch = partitioner.put_batch(meta_batch(case.steps + 1)[0])
    for rows in batch.values():
        check_sharded(rows, ("batch",), partitioner)
    state, sums, flags = compile_train_step(stage, state)(state, frozen, None, batch, key)
    assert not flags.any()
    axes = flatten(model.logical_axes())
    for path, leaf in flatten(state.trainable).items():
        check_sharded(leaf, axes[path], partitioner)
    if case.carries:
        check_state(state._replace(opt_state=state.gradient_state), axes, partitioner)
    gradient = {path: before[path] - leaf for path, leaf in copied(state.trainable).items()}
    return {"loss": float(sums["loss"]) / TASKS, **gradient}


def main(output):
    chunked_loss.MAX_CHUNK_ELEMENTS = 1
    partitioner = partitioner_of(MESH)
    results = {}
    for number, case in enumerate(CASES):
        with partitioner.activate():
            for name, leaf in gradient_of(case, partitioner).items():
                results[f"{number}/{name}"] = leaf
    np.savez(output, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
