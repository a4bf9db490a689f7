"""Few-shot evaluation runs: as a stage would, exactly again, and all of it on disk."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import sharded_training
import toy
import toy_few_shot

import robust_ft
from robust_ft import runner, stage_start
from robust_ft.checks import check
from robust_ft.data.in_memory import rows_task
from robust_ft.errors import UserError
from robust_ft.evaluator import evaluate
from robust_ft.few_shot_results import Results
from robust_ft.few_shot_tasks import drawn
from robust_ft.few_shot_tuning import Tuner, divisor, training_batch
from robust_ft.partitioning import Partitioner
from robust_ft.recipe import Recipe
from robust_ft.report.promptability import make_promptability
from robust_ft.report.runs import load_run
from robust_ft.summary import Summary
from robust_ft.trainable import flatten, split
from robust_ft.trainer import fit


def lines(directory):
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted((directory / "few_shot").glob("*.jsonl"))
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run, and its recipe."""
    directory = tmp_path_factory.mktemp("runs") / "few_shot"
    made = toy_few_shot.recipe(directory)
    runner.run(made)
    return directory, made


def test_what_is_on_disk(finished):
    directory, _ = finished
    found = lines(directory)
    assert list(found) == ["toy_one", "toy_two"]
    for name, of_task in found.items():
        keys = [(line["seed"], line["which"], line["shots"]) for line in of_task]
        tuned = [(seed, which, 4) for seed in (0, 1) for which in ("last", "best")]
        assert keys == [(None, "zero", 0), *tuned]
        for line in of_task:
            assert (line["task"], line["dataset"], line["split"]) == (name, "toy", "validation")
            assert line["accuracy"] == pytest.approx(100 * np.mean(line["correct"]))
            assert len(line["correct"]) == 9
            # Of two and three choices in turn, two first.
            assert line["random_accuracy"] == pytest.approx((5 * 50 + 4 * 100 / 3) / 9)
        assert [line["epoch"] for line in of_task if line["which"] != "best"] == [0, 7, 7]
        best = [line for line in of_task if line["which"] == "best"]
        assert all(line["epoch"] in (3, 6, 7) for line in best)
        last = [line for line in of_task if line["which"] == "last"]
        assert all(b["accuracy"] >= e["accuracy"] for b, e in zip(best, last, strict=True))
    ids = json.loads((directory / "few_shot" / "examples.json").read_text())
    assert [len(set(draw)) for draws in ids.values() for draw in draws] == [4] * 4


def test_the_report_reads_what_a_run_writes(finished):
    directory, made = finished
    found = make_promptability([load_run(directory)])
    random = (5 * 50 + 4 * 100 / 3) / 9
    assert [(t.task, t.dataset, t.num_examples) for t in found.templates] == [
        ("toy_one", "toy", 9), ("toy_two", "toy", 9)
    ]  # fmt: skip
    assert all(t.random_accuracy == pytest.approx(random) and t.examples for t in found.templates)
    for setting in found.settings:
        accuracies = [
            line["accuracy"] for of_task in lines(directory).values() for line in of_task
            if line["which"] == setting.which
        ]  # fmt: skip
        gain = found.cells[made.name, setting].gain
        assert gain.mean == pytest.approx(100 * (np.mean(accuracies) - random) / random)
    assert (found.best_on, found.notes, found.seeds) == (("split",), (), (1, 2))
    assert made.is_evaluated


def test_rows_of_the_summary_are_means_over_seeds(finished):
    directory, _ = finished
    rows = Summary(directory).rows
    found = {(r.task, r.shots, r.metric): r for r in rows}
    for name, of_task in lines(directory).items():
        for shots, which, metric, step in (
            (0, "zero", "accuracy", 0),
            (4, "last", "accuracy", 7),
            (4, "best", "accuracy_of_best_epoch", 7),
        ):
            row = found[name, shots, metric]
            values = [line["accuracy"] for line in of_task if line["which"] == which]
            assert row.value == pytest.approx(np.mean(values))
            assert (row.stage, row.step) == ("few_shot", step)
            assert row.without == (() if shots else ("prompt",))


def test_a_tuning_is_that_of_a_stage(finished, tmp_path):
    """A stage on the same examples ends with the same prompt, and is as good."""
    directory, made = finished
    few = made.few_shot
    evaluation = few.evaluations[0]
    examples = drawn(few, evaluation, made.seed, 0)
    same = [{"text": each.inputs_text, "right": each.targets_text} for each in examples]
    only = rows_task(
        "drawn", same, inputs="{text}", targets="{right}", cache_dir=str(tmp_path / "data")
    )
    stage = toy.stage(
        "few_shot/0",  # the name by which the first tuning's fresh values are drawn
        model=few.model,
        trainable=few.trainable,
        data=dataclasses.replace(few.data, task="drawn", file_tasks=(only,)),
        steps=few.epochs,
        eval_period=few.epochs,
        microbatches=1,
        optimizer=few.optimizer,
        select_best=False,
        evaluations=(),
        final_evaluations=(evaluation,),
    )
    run = Recipe("stage", str(tmp_path / "stage"), [stage])
    with run.partitioner.activate():
        params = fit(stage, stage_start.restore(run, stage), toy.shared(tmp_path / "stage"))

    paths = few.trainable_paths()
    start, frozen = split(stage_start.restore(run, stage), paths)
    (lengths,) = {(few.data.inputs_length, few.data.targets_length)}
    assert divisor(few, [(len(each.inputs), len(each.targets)) for each in examples]) == 1, lengths
    kept = Tuner(few, frozen, Partitioner()).tune(
        {path: np.stack([x] * 2) for path, x in flatten(start).items()},
        [training_batch(few, examples, 1)] * 2,
        [jax.random.key(0)] * 2,  # of dropout, which is off
    )
    for path, tuned in flatten(split(params, paths)[0]).items():
        assert np.abs(tuned - flatten(start)[path]).max() > 0.1
        for each in kept.prompts[path][:, -1]:
            np.testing.assert_allclose(each, tuned, rtol=0, atol=1e-5)
    [row] = [r for r in Summary(tmp_path / "stage").rows if r.metric == "accuracy"]
    line = lines(directory)["toy_one"][1]
    assert (line["seed"], line["which"]) == (0, "last")
    assert row.value == pytest.approx(line["accuracy"])


@pytest.mark.slow
def test_interrupted_runs_end_with_the_same_files(finished, tmp_path, monkeypatch):
    directory, made = finished
    again = dataclasses.replace(made, model_dir=str(tmp_path / "run"))
    add, stopped = Results.add, [1, 4, 7]

    class Killed(Exception):
        pass

    def add_until(results, new):
        add(results, new)
        if stopped and len(results) >= stopped[0]:
            stopped.pop(0)
            raise Killed

    monkeypatch.setattr(Results, "add", add_until)
    for _ in range(3):
        with pytest.raises(Killed):
            runner.run(again)
    runner.run(again)
    for name in ("toy_one.jsonl", "toy_two.jsonl", "examples.json"):
        texts = [(f / "few_shot" / name).read_text() for f in (directory, tmp_path / "run")]
        assert texts[0] == texts[1], name
    assert Summary(tmp_path / "run").rows == Summary(directory).rows


def test_a_used_folder_refuses_other_settings(finished):
    _, made = finished
    for field, value in (("epochs", 8), ("seeds", 3), ("best_on", "examples")):
        other = dataclasses.replace(made.few_shot, **{field: value})
        with pytest.raises(UserError, match=rf"few_shot\.{field} \(FewShot\.{field}\) is"):
            runner.run(dataclasses.replace(made, few_shot=other))
    # How many run side by side changes nothing.
    wider = dataclasses.replace(made.few_shot, side_by_side=4)
    runner.run(dataclasses.replace(made, few_shot=wider))


@pytest.mark.parametrize(
    ("row", "sizes", "message"),
    [
        (
            {},
            {"train": 3},
            "Task 'bad' has 3 examples in its split 'train', fewer than the FewShot",
        ),
        ({"choices": ["odd", "odd"]}, {}, "example 0 .* has the answer choice 'odd' twice"),
    ],
)
def test_tasks_that_cannot_be_ranked_are_refused_before_anything_runs(
    tmp_path, row, sizes, message
):
    bad = toy_few_shot.task(tmp_path / "data", "bad", row, **sizes)
    with pytest.raises(UserError, match=message):
        runner.run(toy_few_shot.recipe(tmp_path / "run", tasks=[bad], datasets=["bad"]))
    assert not (tmp_path / "run").exists()


def test_a_task_without_choices_is_refused(tmp_path):
    data = dataclasses.replace(toy.DATA, split="validation")
    plain = [dataclasses.replace(toy.TARGET_EVALUATION, data=data)]
    with pytest.raises(UserError, match="example 0 of split 'validation' has no answer choices"):
        runner.run(toy_few_shot.recipe(tmp_path / "run", evaluations=plain))


def test_values_drawn_at_random_are_not_evaluated_at_0_shots(tmp_path):
    plain = toy.stage("mtl", model=toy.Model(toy_few_shot.CONFIG), trainable=["base"])
    few = toy_few_shot.few_shot(tmp_path / "data", restore="stage:mtl", zero_shot_without=())
    with pytest.raises(UserError, match=r"lacks 'prompt', whose 'encoder/prompt' no stage has"):
        check(Recipe("toy", str(tmp_path / "run"), [plain], few_shot=few))
    with pytest.raises(UserError, match=r"FewShot\.zero_shot_without lacks 'prompt'"):
        runner.run(toy_few_shot.recipe(tmp_path / "run", zero_shot_without=()))


@pytest.mark.slow
def test_a_prompt_that_a_stage_trained_is_where_tunings_start(tmp_path):
    few = toy_few_shot.few_shot(tmp_path / "data", restore="stage:mtl", zero_shot_without=())
    mtl = toy.stage(
        "mtl",
        model=few.model,
        trainable=["base", "peft"],
        data=few.training_data(few.evaluations[0]),
        evaluations=(),
        final_evaluations=(),
    )
    made = Recipe("toy_arm", str(tmp_path / "run"), [mtl], few_shot=few)
    runner.run(made)
    # The run's result is the stage's model, by which tasks are ranked at 0 shots.
    loaded = robust_ft.load(made.model_dir, vocabulary=few.data.vocabulary)
    for evaluation in few.evaluations:
        zero, *tuned = lines(tmp_path / "run")[evaluation.task]
        result = evaluate(evaluation, loaded)
        assert zero["correct"] == [int(p["prediction"] == p["target"]) for p in result.predictions]
        assert [line["which"] for line in tuned] == ["last", "best"] * 2
    # Both draws start from the same prompt, and the finished run is left as it is.
    before = lines(tmp_path / "run")
    runner.run(made)
    assert lines(tmp_path / "run") == before


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "processes"), [(8, 1), (4, 2)])
def test_meshes_and_several_processes_give_the_same(finished, tmp_path, devices, processes):
    directory, _ = finished
    sharded_training.run(
        "sharded_few_shot.py", tmp_path / "run", devices=devices, processes=processes
    )
    for name, of_task in lines(directory).items():
        for one, other in zip(of_task, lines(tmp_path / "run")[name], strict=True):
            assert one == other
    assert [r.value for r in Summary(tmp_path / "run").rows] == [
        r.value for r in Summary(directory).rows
    ]
