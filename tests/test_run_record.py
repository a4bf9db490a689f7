"""A run's record: all that its results depend on, and nothing else."""

import dataclasses
import functools
import json
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from robust_ft import recorded_content, run_record
from robust_ft.data import fingerprints
from robust_ft.data.file_task import FileTask
from robust_ft.errors import UserError
from robust_ft.models.peft import Lora, Prompt
from robust_ft.objectives import CrossEntropy
from robust_ft.objectives.gradients import backprop
from robust_ft.optim import Adafactor, AdamW, Schedule
from robust_ft.partitioning import Partitioner
from robust_ft.recipe import Recipe
from robust_ft.recorded_settings import Flattened, digest
from robust_ft.run_record import Difference, RunRecord, sentence
from robust_ft.vocabulary import ByteVocabulary


def one_stage(directory="run", recipe=None, **changes):
    """Returns a recipe of one stage that evaluates nothing."""
    settings = {"evaluations": (), "final_evaluations": (), **changes}
    return Recipe("toy", str(directory), (toy.stage(**settings),), **(recipe or {}))


def fields(one, other):
    """Returns the fields in which two recipes differ."""
    return [each.field for each in RunRecord.of(one).differences(RunRecord.of(other))]


def model(**changes):
    config = {k: v for k, v in changes.items() if hasattr(toy.CONFIG, k)}
    rest = {k: v for k, v in changes.items() if k not in config}
    return dataclasses.replace(toy.MODEL, config=dataclasses.replace(toy.CONFIG, **config), **rest)


def test_fields_are_attributes():
    settings = RunRecord.of(toy.promot("run")).settings
    assert settings["seed"] == 0
    assert settings["stages"] == ["prompt", "model"]
    assert settings["stages.prompt.optimizer"] == "AdamW"
    assert settings["stages.prompt.optimizer.learning_rate.peak"] == 0.01
    assert settings["stages.model.model.config.num_encoder_layers"] == 1
    assert settings["stages.model.model.peft"] == ["prompt"]
    assert settings["stages.model.gradient"] == "robust_ft.objectives.gradients.backprop"
    assert settings["stages.model.data.vocabulary"].startswith("ByteVocabulary ")
    evaluations = settings["stages.model.final_evaluations"]
    assert evaluations == ["toy:test", "toy_other:test", "toy_other_1shot:test"]
    assert settings["stages.model.evaluations.toy:validation.decoder.max_decode_len"] == 3
    assert settings["data.toy_other_1shot.test.metrics"] == ["accuracy", "exact_match"]
    assert len(settings["data.toy.train.examples"]) == 16


CHANGES = {
    "seed": {"recipe": {"seed": 1}},
    "stages.model.steps": {"steps": 8},
    "stages.model.batch_size": {"batch_size": 8},
    "stages.model.microbatches": {"microbatches": 4},
    "stages.model.trainable": {"trainable": ["all"]},
    "stages.model.optimizer.learning_rate.peak": {"optimizer": AdamW(Schedule(0.02))},
    "stages.model.optimizer": {"optimizer": Adafactor(Schedule(0.01))},
    "stages.model.objective.label_smoothing": {"objective": CrossEntropy(label_smoothing=0.1)},
    "stages.model.model.config.dropout_rate": {"model": model(dropout_rate=0.2)},
    "stages.model.model.config.dtype": {"model": model(dtype="bfloat16")},
    "stages.model.model.peft.prompt.length": {"model": model(peft=(Prompt(length=4),))},
    "stages.model.model.peft": {"model": model(peft=(Lora(rank=2),))},
    "stages.model.data.inputs_length": {"data": dataclasses.replace(toy.DATA, inputs_length=8)},
    "stages.model.data.task": {"data": dataclasses.replace(toy.DATA, task="toy_other")},
    "stages.model.evaluations": {"evaluations": toy.evaluations("validation")},
    "stages.model.gradient": {"gradient": functools.partial(backprop, rng=None)},
}


@pytest.mark.parametrize("field", CHANGES)
def test_each_setting_is_a_difference(field):
    assert fields(one_stage(), one_stage(**CHANGES[field])) == [field]
    assert fields(one_stage(**CHANGES[field]), one_stage()) == [field]


@pytest.mark.parametrize(
    "changes",
    [
        {"directory": "elsewhere"},
        {"recipe": {"partitioner": Partitioner(fully_sharded=-1)}},
        {"recipe": {"compile_effort": -1.0, "tuned_up_to": 3}},
        {"log_period": 7},
        {"model": model(remat="full", attention="xla")},
        {"data": dataclasses.replace(toy.DATA, cache_dir=None)},
    ],
)
def test_what_cannot_change_results_is_none(changes):
    assert fields(one_stage(), one_stage(**changes)) == []


def test_evaluations_are_told_by_their_tasks():
    evaluations = toy.evaluations("validation")
    both, fewer = (one_stage(evaluations=each) for each in (evaluations, evaluations[:2]))
    assert fields(both, fewer) == ["stages.model.evaluations"]
    cheaper = [dataclasses.replace(each, batch_size=2) for each in evaluations]
    assert fields(both, one_stage(evaluations=cheaper)) == []
    limited = dataclasses.replace(evaluations[1], limit=1)
    changed = one_stage(evaluations=(evaluations[0], limited, evaluations[2]))
    assert fields(both, changed) == ["stages.model.evaluations.toy_other:validation.limit"]


# Content, wherever it is.


def file_recipe(file, **changes):
    task = FileTask(name="mine", train=str(file), inputs="{q}", targets="{a}", **changes)
    data = dataclasses.replace(toy.DATA, task="mine", module=None, file_tasks=(task,))
    return one_stage(model=toy.PLAIN, trainable=["all"], data=data)


def test_a_data_file_is_its_content(tmp_path):
    file = tmp_path / "here" / "mine.csv"
    file.parent.mkdir()
    file.write_text("q,a\nx,b\ny,c\n")
    before = RunRecord.of(file_recipe(file))
    moved = shutil.copytree(file.parent, tmp_path / "there") / "mine.csv"
    assert before.differences(RunRecord.of(file_recipe(moved))) == []
    shutil.copystat(file, moved)
    moved.write_text("q,a\nx,b\ny,d\n")
    shutil.copystat(file, moved)  # of the same size and time
    after = RunRecord.of(file_recipe(moved))
    (difference,) = before.differences(after)
    assert difference.field == "data.mine.train.examples"
    said = sentence(difference, before, after)
    assert "'mine', split 'train', has other examples: file 'mine.csv' has another content" in said
    task = RunRecord.of(file_recipe(file, postprocess="")).differences(before)
    assert [each.field for each in task] == ["stages.model.data.file_tasks.mine.postprocess"]


def test_tasks_of_one_name_in_different_files(tmp_path):
    for name, answer in (("a", "b"), ("c", "d")):
        (tmp_path / f"{name}.csv").write_text(f"q,a\nx,{answer}\n")

    def both():
        stages = [file_recipe(tmp_path / f"{name}.csv").stages[0] for name in "ac"]
        return Recipe(
            "toy",
            "run",
            tuple(dataclasses.replace(s, name=n) for s, n in zip(stages, "ac", strict=True)),
        )

    before = RunRecord.of(both())
    for name, field in (("a", "data.mine.train.examples"), ("c", "data.mine.train.examples#2")):
        text = (tmp_path / f"{name}.csv").read_text()
        (tmp_path / f"{name}.csv").write_text(f"q,a\nx,{name}\n")
        after = RunRecord.of(both())
        (difference,) = before.differences(after)
        assert difference.field == field
        assert f"file '{name}.csv' has another content" in sentence(difference, before, after)
        (tmp_path / f"{name}.csv").write_text(text)


def test_a_share_of_a_file_is_a_setting(tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text("q,a\n" + "".join(f"{i},b\n" for i in range(20)))
    few, many = (file_recipe(file, validation=share) for share in (0.2, 0.5))
    assert fields(few, many)[0] == "stages.model.data.file_tasks.mine.validation"
    assert RunRecord.of(few).settings["stages.model.data.file_tasks.mine.train"] == "file"


def test_a_base_is_its_parameters(tmp_path):
    shapes = toy.flat_shapes(toy.PLAIN)
    arrays = {path: np.full(leaf.shape, 0.5, np.float32) for path, leaf in shapes.items()}
    for name in ("a", "b"):
        save_file(arrays, tmp_path / f"{name}.safetensors")
    arrays["encoder/encoder_norm/scale"][3] += 1e-7
    save_file(arrays, tmp_path / "c.safetensors")
    a, b, c = (one_stage(restore=f"{tmp_path}/{name}.safetensors") for name in "abc")
    assert fields(a, b) == []
    records = RunRecord.of(a), RunRecord.of(c)
    (difference,) = records[0].differences(records[1])
    assert difference.field == "stages.model.restore"
    said = sentence(difference, *records)
    assert "(Stage.restore)" in said and "a.safetensors" in said and "c.safetensors" in said
    assert fields(a, one_stage()) == ["stages.model.restore"]


def test_a_base_that_has_not_changed_is_not_read_again(tmp_path, monkeypatch):
    shapes = toy.flat_shapes(toy.PLAIN)
    arrays = {path: np.full(leaf.shape, 0.5, np.float32) for path, leaf in shapes.items()}
    file = tmp_path / "a.safetensors"
    save_file(arrays, file)
    recipe = one_stage(restore=str(file))
    assert RunRecord.of(recipe).times == {str(file): ""}  # it has just been written
    monkeypatch.setattr(fingerprints, "_RECENT_NS", 0)
    known = RunRecord.of(recipe)
    with monkeypatch.context() as patch:
        patch.setattr(recorded_content, "of_place", None)
        assert known.differences(RunRecord.of(recipe, known)) == []
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    arrays["encoder/encoder_norm/scale"][3] = 1
    save_file(arrays, file)
    os.utime(file, ns=times)
    now = RunRecord.of(recipe, known)
    (difference,) = known.differences(now)
    said = sentence(difference, known, now)
    assert said.endswith("a.safetensors' has another content now")


def test_a_prompt_file_is_its_values(tmp_path):
    for name, value in (("a", 1), ("b", 1), ("c", 2)):
        np.save(tmp_path / f"{name}.npy", np.full((3, 16), value, np.float32))
    a, b, c = (
        one_stage(
            model=model(peft=(Prompt(length=3, initialization="file", file=f"{tmp_path}/{n}.npy"),))
        )
        for n in "abc"
    )
    assert fields(a, b) == []
    assert fields(a, c) == ["stages.model.model.peft.prompt.file"]


@pytest.mark.parametrize("different", [True, False])
def test_processes_have_one_record(monkeypatch, different):
    mine, theirs = (RunRecord.of(one_stage(steps=steps)) for steps in (6, 8 if different else 6))
    texts = [json.dumps([r.settings, r.origins], sort_keys=True) for r in (mine, theirs)]
    answers = [[digest(text) for text in texts], texts]
    monkeypatch.setattr(run_record.multihost, "gathered", lambda text: answers.pop(0))
    if not different:
        run_record.check_same_everywhere(mine)
        return
    said = (
        r"Process 1 differs from process 0: stages\.model\.steps \(Stage\.steps\) is 6, now 8; give"
    )
    with pytest.raises(UserError, match=said):
        run_record.check_same_everywhere(mine)


def test_a_vocabulary_is_what_it_makes_of_texts():
    larger = dataclasses.replace(toy.DATA, vocabulary=ByteVocabulary(extra_ids=5))
    assert fields(one_stage(), one_stage(data=larger)) == ["stages.model.data.vocabulary"]


# Objects of users' own.


@dataclasses.dataclass(frozen=True)
class Mine:
    function: object


def scaled(factor):
    return lambda x: factor * x


class Plain:
    def __init__(self, rate):
        self.rate = rate


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (functools.partial(scaled, factor=1), functools.partial(scaled, factor=2)),
        (functools.partial(scaled, 1), functools.partial(scaled, 2)),
        (functools.partial(scaled, factor=1), scaled),
        (scaled(1), scaled(2)),
        (lambda x: x + 1, lambda x: x + 2),
        (Plain(1), Plain(2)),
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, {"a": 1, "b": 1}),
        ({"a", "b"}, {"a"}),
        (np.arange(3), np.arange(4)),
        (jnp.float32, jnp.bfloat16),
        (float("inf"), 1.0),
        ((1, (2, 3)), (1, (2, 4))),
        (None, 0),
    ],
)
def test_values_of_any_kind(one, other):
    records = [RunRecord(Flattened.of(Mine(value)).settings) for value in (one, other, one)]
    assert records[0].differences(records[1]) and records[1].differences(records[0])
    assert records[0].differences(records[2]) == []
    assert json.loads(json.dumps(records[0].settings)) == records[0].settings


SCALARS = st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from([0.5, "a", "b"])
NESTED = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner),
    max_leaves=6,
)


@given(NESTED, NESTED)
def test_settings_that_are_not_equal_have_a_difference(one, other):
    records = [RunRecord(Flattened.of(Mine(value)).settings) for value in (one, other)]
    equal = records[0].settings == records[1].settings
    assert (records[0].differences(records[1]) == []) == equal
    assert json.loads(json.dumps(records[0].settings)) == records[0].settings


# Records of other versions.


def test_a_field_that_only_one_version_knows():
    now = RunRecord.of(one_stage())
    lacks = {f: v for f, v in now.settings.items() if f != "stages.model.packing"}
    assert RunRecord(lacks).differences(now) == []
    packed = RunRecord.of(one_stage(packing=True, model=toy.PLAIN, trainable=["all"]))
    assert Difference("stages.model.packing", None, True) in RunRecord(lacks).differences(packed)
    more = {**now.settings, "stages.model.forgotten": 3, "forgotten": 1}
    assert RunRecord(more).differences(now) == []


def test_a_record_is_read_as_it_was_written(tmp_path):
    record = RunRecord.of(toy.promot("run"))
    (tmp_path / "run.json").write_text(json.dumps(record.as_json()))
    again = RunRecord.read(tmp_path)
    assert again.settings == record.settings and again.differences(record) == []
    (tmp_path / "run.json").write_text('{"name": "a"}')
    assert RunRecord.read(tmp_path) is None
    assert RunRecord.read(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"/a/x.csv": "1"}, {"/b/x.csv": "2"}, "file 'x.csv' has another content"),
        ({"x": "1", "y": "1"}, {"x": "2", "y": "2"}, "'x' has another content, and 1 more"),
        ({"x": "1"}, {"y": "1"}, "of 'x', now of 'y'"),
        ({"x": "1", "y": "1", "z": "1"}, {}, "of 'x' and 2 more, now of 'no file'"),
        ({"x": "1"}, {"x": "1"}, "of the same files, so its code differs"),
        ({}, {}, "of the same files, so its code differs"),
    ],
)
def test_what_other_examples_came_from(before, after, said):
    field = "data.a.b_c.train.examples"
    records = [RunRecord({field: v}, {field: o}) for v, o in (("1", before), ("2", after))]
    (difference,) = records[0].differences(records[1])
    assert "task 'a.b_c', split 'train', has other examples" in sentence(difference, *records)
    assert said in sentence(difference, *records)
