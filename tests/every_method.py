"""Every finetuning method: what is plugged into a model, and which parameters train."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tiny_families import batch_of, model_of

from robust_ft.models.model import Model
from robust_ft.models.peft import IA3, Adapter, Lora, OPLora, Peft, Prefix, Prompt
from robust_ft.models.peft.adapter import PFEIFFER, SITES
from robust_ft.objectives import CrossEntropy
from robust_ft.optim import AdamW, Schedule
from robust_ft.train_step import TrainState, init_state, make_train_step
from robust_ft.trainable import flatten, split, top_layers, trainable_paths

# Small gradients keep small steps, so that rounding errors in them do not matter.
OPTIMIZER = AdamW(Schedule(0.02), epsilon=1e-3)
# By a method's name, its parameters.
PATTERNS = {
    "prompt": ".*/prompt",
    "prefix": "(.*/)?prefix/.*",
    "adapter": ".*/adapter_.*",
    "lora": ".*/lora/.*",
    "ia3": ".*/ia3",
    "oplora": ".*/oplora/(a|b)",
}


class Method(NamedTuple):
    """A finetuning method.

    Attributes:
        peft: What is plugged in.
        trainable: From a model's config to patterns, by default those of what is plugged in.
    """

    peft: tuple[Peft, ...] = ()
    trainable: Callable[[Any], Sequence[str]] | None = None

    def patterns(self, config: Any) -> Sequence[str]:
        if self.trainable is None:
            return [PATTERNS[method.name] for method in self.peft]
        return self.trainable(config)


def biases(config: Any) -> Sequence[str]:
    """BitFit; models without biases have the norms' scales."""
    return [".*/bias"] if hasattr(config, "activation") else [".*/scale"]


PLUGGED = {
    "prompt": Method((Prompt(length=3),)),
    "infix": Method((Prompt(length=3, position="infix"),)),
    "task prompts": Method((Prompt(length=3, tasks=("one", "two")),)),
    "prefix": Method((Prefix(length=2),)),
    "prefix mlp": Method((Prefix(length=2, mid_dim=8),)),
    "houlsby": Method((Adapter(size=4),)),
    "pfeiffer": Method((Adapter(size=4, sites=PFEIFFER),)),
    "lora": Method((Lora(rank=2, alpha=3.0),)),
    "ia3": Method((IA3(),)),
    "oplora": Method((OPLora(rank=2, alpha=3.0, directions=5),)),
    "prompt and lora": Method((Prompt(length=3), Lora(rank=2))),
    "prefix and adapter": Method((Prefix(length=2, counted=True), Adapter(size=4, sites=SITES))),
    "prompt and ia3": Method((Prompt(length=3), IA3())),
    "all together": Method(
        (
            Prompt(length=3, tasks=("one", "two")),
            Prefix(length=2, mid_dim=8),
            Adapter(size=4),
            Lora(rank=2, dropout_rate=0.1),
            IA3(),
        )
    ),
}
METHODS = PLUGGED | {
    "bitfit": Method(trainable=biases),
    "norm only": Method(trainable=lambda config: [".*norm.*/(scale|bias)"]),
    "top layers": Method(trainable=lambda config: top_layers(Model(config), 1)),
    "full": Method(trainable=lambda config: [".*"]),
    "joint": Method((Prompt(length=3),), lambda config: [".*"]),
    # ProMoT's second stage, and full finetuning under a random prompt.
    "under a prompt": Method((Prompt(length=3),), lambda config: [r"(?!.*/prompt$).*"]),
}


def small(family, *peft, **changes):
    """Returns a model in which one layer of a stack has to do where there are two stacks."""
    model = model_of(family, *peft)
    if hasattr(model.config, "num_decoder_layers"):
        changes["num_decoder_layers"] = 1
    return dataclasses.replace(model, config=dataclasses.replace(model.config, **changes))


def batch_of_tasks(length=7):
    """Two examples of at most so many tokens, each of another task."""
    batch = {name: rows[:, :length] for name, rows in batch_of().items()}
    return batch | {"task_index": np.array([1, 0], np.int32)}


class Trained(NamedTuple):
    """What training did; parameters are {path: array}."""

    before: dict[str, np.ndarray]
    frozen: dict[str, np.ndarray]
    frozen_before: dict[str, np.ndarray]
    state: TrainState
    memory: Any

    @property
    def after(self):
        return copied(self.state.trainable)


def train(model, patterns, params, batch, microbatches=1, steps=3):
    """Returns what some steps, dropout included, make of parameters."""
    trained, frozen = split(params, trainable_paths(params, patterns))
    before, frozen_before = copied(trained), copied(frozen)
    state = init_state(OPTIMIZER, trained)
    step = make_train_step(model, CrossEntropy(), OPTIMIZER, microbatches=microbatches)
    arguments = (frozen, None, batch, jax.random.key(0))
    compiled = jax.jit(step, donate_argnums=0).lower(state, *arguments).compile()
    for _ in range(steps):
        state, _ = compiled(state, *arguments)
    memory = compiled.memory_analysis()
    return Trained(before, copied(frozen), frozen_before, state, memory)


def copied(params):
    return {path: np.array(leaf) for path, leaf in flatten(params).items()}
