"""A used MODEL_DIR goes on with what its results were made with, and with nothing else."""

import dataclasses
import json
import os
import shutil
import types

import numpy as np
import pytest
import toy
from safetensors.numpy import save_file

from robust_ft import claiming, inference, runner
from robust_ft.data.file_task import FileTask
from robust_ft.errors import UserError
from robust_ft.models.peft import Lora
from robust_ft.optim import AdamW, Schedule
from robust_ft.recipe import Recipe
from robust_ft.run_record import RunRecord

RATE = "stages.lora.optimizer.learning_rate.peak"


class World:
    """A folder with data files, two bases and MODEL_DIR."""

    def __init__(self, folder):
        self.folder, self.directory = folder, folder / "run"
        self.write("train", "aabb")
        self.write("test", "ab")
        shapes = toy.flat_shapes(toy.PLAIN)
        for name, seed in (("base", 0), ("other", 1)):
            rng = np.random.default_rng(seed)
            arrays = {p: rng.normal(size=leaf.shape) for p, leaf in shapes.items()}
            arrays = {path: array.astype(np.float32) for path, array in arrays.items()}
            save_file(arrays, folder / f"{name}.safetensors")

    def write(self, split, answers):
        rows = [f"{i},{answer}\n" for i, answer in enumerate(answers)]
        (self.folder / f"{split}.csv").write_text("".join(["q,a\n", *rows]))

    def recipe(self, seed=0, rate=0.01, alpha=8.0, name="toy", base="base", **changes):
        files = {split: f"{self.folder}/{split}.csv" for split in ("train", "test")}
        task = FileTask(name="mine", inputs="{q}", targets="{a}", **files)
        other = dataclasses.replace(task, name="yours")
        data = dataclasses.replace(toy.DATA, task="mine", module=None, file_tasks=(task, other))
        evaluation = dataclasses.replace(
            toy.TARGET_EVALUATION, data=dataclasses.replace(data, split="test")
        )
        settings = {
            "model": dataclasses.replace(toy.MODEL, peft=(Lora(rank=2, alpha=alpha),)),
            "restore": f"{self.folder}/{base}.safetensors",
            "trainable": ["peft"],
            "data": data,
            "steps": 4,
            "optimizer": AdamW(Schedule(rate)),
            "evaluations": (),
            "final_evaluations": (evaluation,),
        }
        stage = toy.stage("lora", **{**settings, **changes})
        return Recipe(name, str(self.directory), (stage,), seed)

    def files(self):
        found = (path for path in self.directory.rglob("*") if path.is_file())
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run and one that ended after step 3, with a checkpoint of step 2."""
    worlds = {}
    with pytest.MonkeyPatch.context() as patch:
        toy.ScriptedEvaluate(patch)
        for name in ("finished", "killed"):
            world = worlds[name] = World(tmp_path_factory.mktemp(name))
            if name == "finished":
                runner.run(world.recipe())
            else:
                with pytest.raises(RuntimeError):
                    runner.run(world.recipe(), [toy.At("lora", 3, toy.raising(RuntimeError))])
                assert (world.directory / "lora" / "checkpoint_2").is_dir()
    return types.SimpleNamespace(**worlds)


@pytest.fixture
def killed(made, tmp_path, monkeypatch):
    """A copy of the killed run, to go on with."""
    toy.ScriptedEvaluate(monkeypatch)
    world = World(tmp_path)
    shutil.copytree(made.killed.directory, world.directory)
    return world


def other_text(world):
    file = world.folder / "train.csv"
    stat = file.stat()
    world.write("train", "aaba")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def of_task(name):
    def changed(recipe):
        stage = recipe.stages[0]
        data = dataclasses.replace(stage.data, task=name)
        return dataclasses.replace(recipe, stages=(dataclasses.replace(stage, data=data),))

    return changed


# What differs -> how the sentence names it.
DIFFERENT = [
    ({"rate": 0.5}, rf"{RATE} \(Schedule\.peak\) is 0\.01, now 0\.5"),
    ({"seed": 1}, r"seed \(Recipe\.seed\) is 0, now 1"),
    ({"name": "full"}, r"name \(Recipe\.name\) is 'toy', now 'full'"),
    ({"alpha": 64.0}, r"stages\.lora\.model\.peft\.lora\.alpha \(Lora\.alpha\) is 8\.0, now 64\.0"),
    ({"base": "other"}, r"\(Stage\.restore\) is '.*base\.safetensors', now '.*other\.safetensors'"),
    ({"steps": 8}, r"stages\.lora\.steps \(Stage\.steps\) is 4, now 8"),
    ({"batch_size": 2}, r"stages\.lora\.batch_size \(Stage\.batch_size\) is 4, now 2"),
    ({"final_evaluations": ()}, r"stages\.lora\.final_evaluations .* is \['mine:test'\], now \[\]"),
    (of_task("yours"), r"stages\.lora\.data\.task \(TaskData\.task\) is 'mine', now 'yours'"),
    (other_text, r"task 'mine', split 'train', has other examples: file 'train\.csv' has another"),
]


def different(world, change):
    """Returns the recipe with a change, or of a world that is changed until the test's end."""
    if isinstance(change, dict):
        return world.recipe(**change)
    if change is other_text:
        other_text(world)
        return world.recipe()
    return change(world.recipe())


@pytest.mark.parametrize("run", ["finished", "killed"])
@pytest.mark.parametrize(("change", "said"), DIFFERENT, ids=[said for _, said in DIFFERENT])
def test_a_difference_is_refused_by_name(made, run, change, said):
    world = getattr(made, run)
    before = world.files()
    state = {"finished": "a finished run", "killed": "an unfinished run"}[run]
    try:
        with pytest.raises(UserError, match=f"holds {state}, made with other settings: .*{said}"):
            runner.run(different(world, change))
    finally:
        world.write("train", "aabb")
    assert world.files() == before


def test_a_finished_run_is_left_as_it_is(made, monkeypatch):
    before = made.finished.files()
    monkeypatch.setattr(runner, "fit", None)
    assert claiming.claim(made.finished.recipe()) is False
    assert made.finished.files() == before
    with pytest.raises(UserError, match=r"or start with the recorded settings\.$"):
        claiming.claim(made.finished.recipe(rate=0.5), [RATE])
    evaluations = made.finished.recipe().stages[0].final_evaluations
    with pytest.raises(UserError, match=r"robust_ft\.eval evaluates a finished run on more\.$"):
        claiming.claim(made.finished.recipe(evaluations=evaluations))
    assert claiming.claim(made.finished.recipe(log_period=3)) is False


def test_the_same_recipe_goes_on(killed, made):
    runner.run(killed.recipe())
    toy.assert_same(toy.final(killed.directory, "lora"), toy.final(made.finished.directory, "lora"))
    assert RunRecord.read(killed.directory).changes == ()


@pytest.mark.parametrize("name", [RATE, "stages.lora.optimizer", "stages.lora", "Schedule.peak"])
def test_a_change_that_is_allowed_is_recorded(killed, made, name, capsys):
    with pytest.raises(
        UserError, match=f"--allow_change={RATE} lets it go on from step 2 of 'lora"
    ):
        runner.run(killed.recipe(rate=0.5))
    runner.run(killed.recipe(rate=0.5), allow_change=[name])
    assert f"From step 2 of 'lora' on: {RATE} (Schedule.peak) is 0.01, now 0.5." in "".join(
        capsys.readouterr().out.split("\n")
    )
    record = RunRecord.read(killed.directory)
    assert [tuple(each) for each in record.changes] == [(RATE, 0.01, 0.5, "lora", 2)]
    assert record.settings[RATE] == 0.5
    changed, same = (toy.final(w.directory, "lora") for w in (killed, made.finished))
    assert any((changed[path] != same[path]).any() for path in same)
    # Now these are its settings.
    assert claiming.claim(killed.recipe(rate=0.5)) is False
    with pytest.raises(UserError, match=r"0\.5, now 0\.01"):
        claiming.claim(killed.recipe())


def test_only_what_is_named_is_allowed(killed):
    with pytest.raises(UserError, match="settings: seed") as error:
        claiming.claim(killed.recipe(rate=0.5, seed=1), [RATE])
    assert RATE not in str(error.value)
    with pytest.raises(
        UserError, match=r"'stages\.lora\.optimiser', which is no field.* mean 'stages\.l"
    ):
        claiming.claim(killed.recipe(rate=0.5), ["stages.lora.optimiser"])


def test_what_differs_alike_is_said_once(killed):
    task = killed.recipe().stages[0].final_evaluations[0]
    copies = [dataclasses.replace(task, data=toy.DATA, shots=k) for k in range(6)]
    made = killed.recipe(final_evaluations=[dataclasses.replace(e, limit=1) for e in copies])
    fields = RunRecord.of(made, with_data=False)
    now = RunRecord.of(killed.recipe(final_evaluations=copies), with_data=False)
    said = claiming._said(fields.differences(now), fields, now)
    assert said.endswith("limit (Evaluation.limit) is 1, now None (and 5 more like it)")


def test_more_data_are_read_from_the_start(killed, capsys):
    killed.write("train", "aabbab")
    runner.run(killed.recipe(), allow_change=["data.mine.train"])
    assert "So its data are read from the start." in " ".join(capsys.readouterr().out.split())
    (change,) = RunRecord.read(killed.directory).changes
    assert change.field == "data.mine.train.examples" and change.step == 2


def test_a_run_without_any_result_is_begun_anew(killed):
    shutil.rmtree(killed.directory / "lora")
    (killed.directory / "summary.json").unlink(missing_ok=True)
    runner.run(killed.recipe(rate=0.5))
    record = RunRecord.read(killed.directory)
    assert record.changes == () and record.settings[RATE] == 0.5


def test_stages_that_have_finished_cannot_change(made, tmp_path, monkeypatch):
    toy.ScriptedEvaluate(monkeypatch)
    small = {"steps": 2, "evaluations": (), "final_evaluations": ()}
    with pytest.raises(RuntimeError):
        stop = toy.At("model", 1, toy.raising(RuntimeError))
        runner.run(toy.promot(tmp_path, small, small), [stop])
    with pytest.raises(UserError, match=r"stages\.prompt\.steps .* stage 'prompt' has finished\.$"):
        changed = toy.promot(tmp_path, small | {"steps": 4}, small)
        claiming.claim(changed, ["stages.prompt.steps"])
    assert claiming.claim(toy.promot(tmp_path, small, small | {"steps": 4}), ["Stage.steps"])


# Runs of earlier versions.


def without_record(world):
    file = world.directory / "run.json"
    about = json.loads(file.read_text())
    for field in ("settings", "origins", "times", "changes"):
        del about[field]
    file.write_text(json.dumps(about))


def test_an_unfinished_run_without_a_record_goes_on(killed, capsys):
    without_record(killed)
    with pytest.raises(UserError, match="belongs to a run with seed 0, not 1"):
        claiming.claim(killed.recipe(seed=1))
    runner.run(killed.recipe(rate=0.5))
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "did not record its settings; those of now are recorded from step 2 of 'lora' on." in said
    )
    assert [each.field for each in RunRecord.read(killed.directory).changes] == ["settings"]


def test_a_finished_run_without_a_record_stays_without(made, tmp_path):
    world = World(tmp_path)
    shutil.copytree(made.finished.directory, world.directory)
    without_record(world)
    before = world.files()
    assert claiming.claim(world.recipe()) is False
    assert world.files() == before


# What evaluates a finished run.


def test_a_run_is_evaluated_on_its_own_base(made, monkeypatch):
    toy.ScriptedEvaluate(monkeypatch)
    evaluations = made.finished.recipe().stages[0].final_evaluations
    settings = inference.Inference(evaluations)
    for change, said in (
        ({"base": "other"}, "other.safetensors"),
        ({"alpha": 64.0}, "8.0, now 64"),
    ):
        with pytest.raises(UserError, match=f"was made with other settings: .*{said}"):
            inference.evaluate_all(made.finished.recipe(**change), settings)
    recipe = made.finished.recipe(final_evaluations=(), rate=0.5, steps=9)
    assert inference.evaluate_all(recipe, settings)
