"""Analyses and callbacks hook into the training loop: a file of their own, and nothing else."""

import dataclasses
import itertools
import json

import jax
import optax
import pytest
import toy

from robust_ft import runner
from robust_ft.evaluator import Evaluator, Result
from robust_ft.run_context import Callback
from robust_ft.stage_step import train_batches
from robust_ft.summary import ANALYSIS
from robust_ft.trainable import flatten, merge, split


@dataclasses.dataclass(frozen=True)
class GradientNorm:
    """The norm of the objective's gradient on a training batch, with respect to what trains."""

    task: str = "gradient_norm"
    split: str = "train"
    role: str = ANALYSIS

    def detached(self, model):
        return ()

    def __call__(self, context):
        predictor, stage = context.predictor, context.stage
        batch = predictor.partitioner.put_batch(
            next(train_batches(stage, predictor.partitioner, 0))
        )
        trained, frozen = split(predictor.params, stage.trainable_paths())

        def loss(trained):
            params = merge(trained, frozen)
            total, weight, _ = stage.objective(
                stage.model, params, batch, jax.random.key(0), context.teacher
            )
            return total / weight

        norm = optax.tree.norm(jax.grad(loss)(trained))
        values = {"norm": float(norm)}
        return Result(self.task, self.split, self.role, values, stage.batch_size)


@dataclasses.dataclass(frozen=True)
class Distance:
    """How far the base parameters are from the pretrained ones."""

    task: str = "distance"
    split: str = "none"
    role: str = ANALYSIS

    def detached(self, model):
        return tuple(method.name for method in model.peft)

    def __call__(self, context):
        pretrained = flatten(context.pretrained().params)
        now = flatten(context.predictor.params)
        distance = optax.tree.norm({path: now[path] - pretrained[path] for path in pretrained})
        return Result(self.task, self.split, self.role, {"l2": float(distance)}, 0)


@dataclasses.dataclass
class Recorder(Callback):
    """Records what the loop reports."""

    events: list = dataclasses.field(default_factory=list)
    losses: list = dataclasses.field(default_factory=list)

    def on_step(self, stage, step, state, sums):
        assert int(state.step) == step and set(flatten(state.trainable)) == stage.trainable_paths()
        self.events.append((stage.name, "step", step))
        self.losses.append(float(sums["loss"] / sums["weight"]))

    def on_evaluation(self, stage, step, results):
        self.events.append((stage.name, "evaluation", step, len(results)))

    def on_checkpoint(self, stage, step):
        self.events.append((stage.name, "checkpoint", step))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two stages with both analyses: its folder, its rows and its recorder."""
    directory = tmp_path_factory.mktemp("analyses") / "run"
    evaluations = (*toy.evaluations("validation", held_out=False), GradientNorm(), Distance())
    settings = {"evaluations": evaluations, "final_evaluations": (Distance(),), "steps": 4}
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        toy.ScriptedEvaluate(patch, [0.0, 5.0, 3.0])
        summary = runner.run(toy.promot(directory, settings, settings), [recorder])
    return directory, summary.rows, recorder


def values(rows, stage, task):
    return {row.step: row.value for row in rows if (row.stage, row.task) == (stage, task)}


def test_analyses_are_evaluators():
    for evaluator in (toy.TARGET_EVALUATION, GradientNorm(), Distance()):
        assert isinstance(evaluator, Evaluator)


@pytest.mark.slow
def test_analyses_are_rows_like_those_of_tasks(run):
    directory, rows, _ = run
    entries = json.loads((directory / "summary.json").read_text())
    assert {
        "stage": "model", "step": 2, "task": "gradient_norm", "role": "analysis", "split": "train",
        "shots": 0, "metric": "norm", "value": values(rows, "model", "gradient_norm")[2],
        "num_examples": 4,
    } in entries  # fmt: skip
    lines = toy.read_lines(directory / "model" / "metrics.jsonl")
    curve = {line["step"]: line["norm"] for line in lines if line.get("task") == "gradient_norm"}
    assert curve == values(rows, "model", "gradient_norm") and set(curve) == {0, 2, 4}
    assert all(norm > 0 for norm in curve.values()) and len(set(curve.values())) == 3
    # They select no checkpoint, and have no predictions.
    assert json.loads((directory / "prompt" / "outcome.json").read_text())["score"] == 5.0
    outputs = directory / "model" / "inference_eval"
    assert not list(outputs.glob("distance-0*.jsonl")) and list(outputs.glob("toy-0*.jsonl"))


@pytest.mark.slow
def test_analyses_see_the_pretrained_model_and_run_once_where_nothing_changes(run):
    _, rows, _ = run
    # Initialized in another program, which rounds differently in the last bit.
    distances = values(rows, "prompt", "distance")
    assert set(distances) == {0, 2, 4} and len(set(distances.values())) == 1
    assert distances[0] == pytest.approx(0, abs=1e-5)
    distances = values(rows, "model", "distance")
    assert distances[0] == pytest.approx(0, abs=1e-5) and 1e-3 < distances[2] < distances[4]


@pytest.mark.slow
def test_callbacks_follow_the_loop(run):
    *_, recorder = run
    per_stage = {
        name: [event[1:] for event in events]
        for name, events in itertools.groupby(recorder.events, lambda event: event[0])
    }
    loop = [
        ("step", 1), ("step", 2), ("evaluation", 2, 3), ("checkpoint", 2),
        ("step", 3), ("step", 4), ("evaluation", 4, 3), ("checkpoint", 4),
    ]  # fmt: skip
    baseline, before = ("evaluation", 0, 1), ("evaluation", 0, 3)
    assert per_stage["prompt"] == [before, baseline, *loop, ("evaluation", 2, 1)]
    assert per_stage["model"] == [before, *loop, ("evaluation", 2, 1)]


@pytest.mark.slow
def test_callbacks_see_the_metrics_of_each_step(run):
    directory, _, recorder = run
    logged = [
        line["loss"]
        for stage in ("prompt", "model")
        for line in toy.read_lines(directory / stage / "metrics.jsonl")
        if "loss" in line
    ]
    assert recorder.losses == pytest.approx(logged)
