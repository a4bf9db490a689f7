"""A model of a few thousand parameters and runs of a few steps on `toy_tasks`."""

import dataclasses
import json
import threading
from collections.abc import Callable

import jax
import numpy as np

from robust_ft.data.cache import TaskData
from robust_ft.decoding import Decoder
from robust_ft.evaluate import Evaluation, suite
from robust_ft.evaluator import HELD_OUT, TARGET, Result
from robust_ft.models.model import Model
from robust_ft.models.peft import Prompt
from robust_ft.models.t5 import T5Config
from robust_ft.optim import AdamW, Schedule
from robust_ft.outcome import Outcome
from robust_ft.partitioning import Partitioner
from robust_ft.recipe import Recipe
from robust_ft.restore import load_params
from robust_ft.run_context import Callback, RunContext
from robust_ft.stage import Stage
from robust_ft.summary import Summary
from robust_ft.trainable import flatten
from robust_ft.vocabulary import ByteVocabulary

PROMPT = "encoder/prompt"
CONFIG = T5Config(
    vocab_size=264,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=16,
    num_encoder_layers=1,
    num_decoder_layers=1,
    logits_via_embedding=True,
    dropout_rate=0.1,
)
MODEL = Model(CONFIG, peft=(Prompt(length=3),))
PLAIN = Model(CONFIG)
DATA = TaskData(
    task="toy",
    module="toy_tasks",
    inputs_length=12,
    targets_length=4,
    vocabulary=ByteVocabulary(extra_ids=0),
)
DECODER = Decoder(max_decode_len=3)
TARGET_EVALUATION = Evaluation(DATA, DECODER, batch_size=4, target_format="[ab]")
HELD_OUT_EVALUATION = dataclasses.replace(
    TARGET_EVALUATION,
    role=HELD_OUT,
    detach="all",
)


def evaluations(split, held_out=True):
    return suite(
        split,
        TARGET_EVALUATION,
        HELD_OUT_EVALUATION if held_out else None,
        {0: ["toy_other"], 1: ["toy_other"]},
    )


def stage(name="model", **changes):
    settings = {
        "name": name,
        "model": MODEL,
        "restore": "scratch",
        "trainable": [f"(?!{PROMPT}$).*"],
        "data": DATA,
        "steps": 6,
        "batch_size": 4,
        "microbatches": 2,
        "optimizer": AdamW(Schedule(0.01)),
        "evaluations": evaluations("validation"),
        "final_evaluations": evaluations("test"),
        "eval_period": 2,
        "log_period": 1,
    }
    return Stage(**{**settings, **changes})


def prompt_stage(**changes):
    return stage("prompt", **{"trainable": [PROMPT], **changes})


def promot(directory, prompt=None, model=None, seed=0):
    """Returns ProMoT in small: first the prompt trains, then the model under it."""
    stages = (
        prompt_stage(**(prompt or {})),
        stage(**{"restore": "stage:prompt", **(model or {})}),
    )
    return Recipe("toy_promot", str(directory), stages, seed)


def shared(directory, seed=0, baseline=False):
    return RunContext(
        directory, Partitioner(), seed, Summary(directory), threading.Event(), baseline
    )


@dataclasses.dataclass
class Call:
    """One call of an `Evaluation`; `params` are copies, {path: array}."""

    evaluation: Evaluation
    params: dict
    detached: bool


class ScriptedEvaluate:
    """Replaces what `Evaluation` does: decodes nothing and gives the target scripted scores.

    Args:
        scores: of the target on the validation split, evaluation by evaluation; then 0.
    """

    def __init__(self, monkeypatch, scores=()):
        self.scores = list(scores)
        self.calls = []
        monkeypatch.setattr(Evaluation, "__call__", lambda *arguments: self(*arguments))

    def __call__(self, evaluation, context):
        model, params = context.predictor.model, flat(context.predictor.params)
        self.calls.append(Call(evaluation, params, detached=not model.peft))
        validated = evaluation.role == TARGET and evaluation.split == "validation"
        score = self.scores.pop(0) if validated and self.scores else 0.0
        predictions = [{"input": "i", "target": "t", "prediction": "p"}]
        task, split, role = evaluation.data.task, evaluation.split, evaluation.role
        values = {"accuracy": score}
        return Result(task, split, role, values, 1, predictions, evaluation.shots)


@dataclasses.dataclass
class At(Callback):
    """Calls a function when a stage has done a step.

    Attributes:
        stage: Name of the stage.
        step: The step.
        action: What to call.
    """

    stage: str
    step: int
    action: Callable[[], None]

    def on_step(self, stage, step, state, sums):
        if (stage.name, step) == (self.stage, self.step):
            self.action()


def raising(error):
    """Returns a function that raises an error."""

    def fail():
        raise error

    return fail


def flat(params):
    """Returns copies as {path: array}; donated buffers cannot be read later."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {"/".join(k.key for k in path): np.array(leaf) for path, leaf in leaves}


def flat_shapes(model):
    return flatten(model.shapes())


def final(directory, stage_name):
    """Returns what a finished stage's selected checkpoint holds, {path: array}."""
    folder = directory / stage_name
    return load_params(str(folder / f"checkpoint_{Outcome.read(folder).step}"))


def assert_same(left, right):
    """Asserts that two {path: array} are equal bit by bit."""
    assert left.keys() == right.keys()
    for path, array in left.items():
        assert array.dtype == right[path].dtype, path
        assert array.tobytes() == right[path].tobytes(), path


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]
