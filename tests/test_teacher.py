"""Teachers of stages: which model, in which type its parameters are kept, and what is refused."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from tiny_models import assert_trees_close, random_batch, random_params

from robust_ft import checks, claiming, gin_config, runner, stage_start, stage_step
from robust_ft.checkpoints_io import native, sources
from robust_ft.checkpoints_io.tensors import Checkpoint, Tensor
from robust_ft.errors import UserError
from robust_ft.models.model import Model
from robust_ft.models.peft import Lora, Prefix, Prompt
from robust_ft.objectives import Cocktail, CrossEntropy, KlAnchor, Teacher
from robust_ft.optim import AdamW, Schedule
from robust_ft.outcome import Outcome
from robust_ft.preflight import programs
from robust_ft.recipe import Recipe
from robust_ft.trainable import flatten, split, trainable_paths, unflatten

CONFIG = str(Path(__file__).parent / "toy_cocktail.gin")
LIGHT = dataclasses.replace(toy.PLAIN, peft=(Prefix(length=2, mid_dim=3),))


def light_stage(**changes):
    settings = {"model": LIGHT, "trainable": [".*prefix.*"], "steps": 4, "microbatches": 1}
    return toy.stage("light", **{**settings, **changes})


def student_stage(mixed=0.5, **changes):
    settings = {
        "model": toy.PLAIN,
        "trainable": [".*"],
        "objective": Cocktail(mixed),
        "teacher": "stage:light",
        "final_evaluations": (),
    }
    return toy.stage("student", **{**settings, **changes})


def write_base(folder):
    """Writes a model directory and returns its path."""
    folder.mkdir()
    flat = flatten(random_params(toy.PLAIN))
    tensors = {path: Tensor.of(np.asarray(leaf), path) for path, leaf in flat.items()}
    vocabulary = {"kind": "ByteVocabulary", "extra_ids": 0}
    ids = {"pad": 0, "eos": 1, "start": 0}
    native.write(Checkpoint("toy", "t5", toy.CONFIG, tensors, ids, vocabulary), folder)
    return str(folder)


def recipe(directory, student, light=None):
    return Recipe("toy_cocktail", str(directory), (light or light_stage(), student))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The recipe of a finished run."""
    folder = tmp_path_factory.mktemp("teacher")
    base = write_base(folder / "base")
    light, student = light_stage(restore=base), student_stage(restore=base)
    finished = recipe(folder / "run", student, light)
    with pytest.MonkeyPatch.context() as patch:
        toy.ScriptedEvaluate(patch, [0.0, 9.0, 5.0])  # the light stage's best is at step 2
        runner.run(finished)
    return finished


def test_the_teacher_is_what_the_stage_selected_in_its_own_type(run):
    student = run.stages[1]
    teacher = stage_start.teacher(run, student)
    assert teacher.model == stage_start.teacher_model(run, student)
    assert teacher.model.peft == (Prefix(length=2),)  # without the MLP of training
    found, shapes = flatten(teacher.params), flatten(teacher.model.shapes())
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in found.items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in shapes.items()
    }
    assert found["token_embedder/embedding"].dtype == jnp.bfloat16
    light = stage_start.finished(run, "light")
    rounded = {path: leaf.astype(jnp.bfloat16) for path, leaf in toy.flat(light).items()}
    base = {path for path in found if "prefix" not in path}
    toy.assert_same({p: np.asarray(found[p]) for p in base}, {p: rounded[p] for p in base})
    assert int(Outcome.read(Path(run.model_dir) / "light").step) == 2


def test_the_teacher_may_be_kept_in_float32(run):
    student = dataclasses.replace(run.stages[1], teacher_dtype="float32")
    teacher = stage_start.teacher(run, student)
    expected = LIGHT.export(stage_start.finished(run, "light"))
    assert_trees_close(teacher.params, expected, rtol=1e-6)


def test_no_teacher_is_loaded_that_has_no_weight(run):
    assert stage_start.teacher(run, run.stages[0]) is None
    assert stage_start.teacher(run, student_stage(0.0)) is None


def test_the_student_learns_from_both(run):
    metrics = toy.read_lines(Path(run.model_dir) / "student" / "metrics.jsonl")
    steps = [line for line in metrics if "kl" in line]
    assert len(steps) == 6 and all(line["cross_entropy"] > 0 for line in steps)
    for line in steps:
        mixed = 0.5 * line["kl"] + 0.5 * line["cross_entropy"]
        assert line["loss"] == pytest.approx(mixed, rel=1e-5)


def test_a_model_directory_with_an_export_is_a_teacher(run):
    light, student = run.stages
    expected = stage_start.teacher(run, student)
    export = Path(run.model_dir) / "light" / "export"
    student = dataclasses.replace(student, teacher=f"{light.restore},{export}")
    teacher = stage_start.teacher(run, student)
    toy.assert_same(toy.flat(teacher.params), toy.flat(expected.params))
    assert teacher.model.shapes() == stage_start.teacher_model(run, student).shapes()
    alone = stage_start.teacher(run, dataclasses.replace(student, teacher=light.restore))
    assert not alone.model.peft and alone.params.keys() == toy.PLAIN.shapes().keys()


def test_without_weight_of_the_teacher_training_is_full_finetuning(run, tmp_path, monkeypatch):
    base, finals = run.stages[0].restore, []
    for name, changes in {
        "cocktail": {"objective": Cocktail(0.0), "teacher": base},
        "full": {"objective": CrossEntropy(), "teacher": None},
    }.items():
        toy.ScriptedEvaluate(monkeypatch)
        student = student_stage(restore=base, steps=2, microbatches=1, **changes)
        runner.run(Recipe(name, str(tmp_path / name), (student,)))
        finals.append(toy.final(tmp_path / name, "student"))
    toy.assert_same(*finals)


def test_cocktails_and_teachers_come_together():
    with pytest.raises(UserError, match="stage 'student' is a Cocktail, which needs a teacher"):
        student_stage(teacher=None)
    with pytest.raises(UserError, match="has the teacher 'stage:light', from which its objective"):
        student_stage(objective=CrossEntropy())
    for field in ("teacher_dtype", "gradient_dtype"):
        with pytest.raises(UserError, match=rf"{field}='bfloat61'.*'bfloat16'\?"):
            student_stage(**{field: "bfloat61"})


def test_teachers_come_before_their_students(tmp_path):
    with pytest.raises(UserError, match=r"has the teacher 'stage:ligt', .*'light'\?"):
        recipe(tmp_path, student_stage(teacher="stage:ligt"))
    with pytest.raises(UserError, match="'student' has the teacher 'stage:student', but"):
        recipe(tmp_path, student_stage(teacher="stage:student"))


# --- The pretrained model as the teacher


def promot_with_teacher(directory, base, **changes):
    """Returns ProMoT whose second stage also learns from the pretrained model."""
    settings = {"model": toy.MODEL, "restore": "stage:prompt", "trainable": ["base"]}
    student = student_stage(**settings, **{"teacher": "pretrained", "steps": 2, **changes})
    return recipe(directory, student, toy.prompt_stage(restore=base, steps=2))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("stage", [0, 1], ids=["from a checkpoint", "from an earlier stage"])
def test_the_pretrained_teacher_is_the_base_bit_for_bit(tmp_path, stage, dtype):
    base = write_base(tmp_path / "base")
    promot = promot_with_teacher(tmp_path / "run", base)
    student = dataclasses.replace(
        promot.stages[stage], objective=Cocktail(), teacher="pretrained", teacher_dtype=dtype
    )
    teacher = stage_start.teacher(promot, student)
    assert teacher.model == stage_start.teacher_model(promot, student)
    assert not teacher.model.peft
    expected = {p: np.asarray(a).astype(dtype) for p, a in native_params(base).items()}
    if stage == 0:  # only the prompt trains: the base is held once, as it is
        assert teacher.params == {} and teacher.shared == expected.keys()
        teacher = teacher.with_shared(stage_start.restore(promot, student))
        expected = native_params(base)
    toy.assert_same(toy.flat(teacher.params), expected)


def anchored(name, model, patterns, **changes):
    settings = {"objective": KlAnchor(), "teacher": "pretrained", "microbatches": 1}
    return toy.stage(name, model=model, trainable=patterns, **settings | changes)


LORA = dataclasses.replace(toy.PLAIN, peft=(Lora(),))
TOP = r"decoder/.*"
BEHIND = {"restore": "stage:first"}


@pytest.mark.parametrize(
    ("stages", "kept"),
    [
        ([anchored("last", LORA, ["peft"])], ()),
        ([anchored("last", toy.PLAIN, [".*"])], [".*"]),
        ([anchored("last", toy.PLAIN, [TOP])], [TOP]),
        # What an earlier stage has trained is no longer the pretrained model's.
        (
            [
                toy.stage("first", model=toy.PLAIN, trainable=[TOP]),
                anchored("last", LORA, ["peft"], **BEHIND),
            ],
            [TOP],
        ),
        (
            [
                toy.stage("first", model=toy.MODEL, trainable=["peft"]),
                anchored("last", toy.MODEL, ["peft"], **BEHIND),
            ],
            (),
        ),
    ],
    ids=["lora", "full", "top", "lora behind top", "prompt twice"],
)
def test_what_stays_frozen_is_kept_once(tmp_path, stages, kept):
    """The step's arguments hold each array once: counted in what a preflight traces."""
    run = Recipe("toy", str(tmp_path), tuple(stages))
    last = stages[-1]
    alone = dataclasses.replace(last, objective=CrossEntropy(), teacher=None)
    traced, without = (programs.train_step(run, stage) for stage in (last, alone))
    shapes = flatten(toy.PLAIN.shapes())
    paths = trainable_paths(toy.PLAIN.shapes(), kept) if kept else ()
    added = sum(2 * shapes[path].size for path in paths)  # in bfloat16
    assert traced.parameter_bytes - without.parameter_bytes == added
    leaves = [len(jax.tree.leaves(each.traced.in_avals)) for each in (traced, without)]
    assert leaves[0] - leaves[1] == len(paths)


@pytest.mark.slow
def test_a_shared_teacher_gives_the_steps_of_one_that_is_copied(tmp_path):
    """LoRA's base as the teacher, shared and as a copy in float32."""
    # With the usual epsilon, Adam would blow up what rounding leaves of gradients of 0.
    optimizer = AdamW(Schedule(0.01), epsilon=1e-2)
    stage = anchored("lora", LORA, ["peft"], steps=2, optimizer=optimizer)
    run = Recipe("toy", str(tmp_path), (stage,))
    params = stage_start.restore(run, stage)
    shared = stage_start.teacher(run, stage)
    assert shared.params == {}
    bare = jax.tree.map(jnp.copy, shared.with_shared(params).params)
    assert not any("lora" in path for path in flatten(bare))
    trained, frozen = split(params, stage.trainable_paths())
    batch = random_batch(0, [5] * 4, [3] * 4)
    ended = []
    for teacher in (shared, Teacher(shared.model, bare)):
        state = stage_step.place_state(stage, jax.tree.map(jnp.copy, trained), run.partitioner)
        step = stage_step.compile_train_step(stage, state)
        for _ in range(2):
            state, sums, _ = step(state, frozen, teacher, batch, jax.random.key(0))
        ended.append((toy.flat(state.trainable), float(sums["kl"])))
    assert_trees_close(*(unflatten(leaves) for leaves, _ in ended), rtol=1e-6)
    assert ended[0][1] == pytest.approx(ended[1][1], rel=1e-5) and ended[0][1] > 0


def test_a_teacher_in_float32_is_not_the_students_bfloat16(tmp_path):
    config = dataclasses.replace(toy.CONFIG, param_dtype="bfloat16")
    model = dataclasses.replace(LORA, config=config)
    for dtype, count in (("bfloat16", len(flatten(toy.PLAIN.shapes()))), ("float32", 0)):
        stage = anchored("lora", model, ["peft"], teacher_dtype=dtype)
        run = Recipe("toy", str(tmp_path), (stage,))
        assert len(stage_start.shared_with_teacher(run, stage)) == count


def native_params(base):
    return {path: np.asarray(tensor.load()) for path, tensor in sources.read(base).tensors.items()}


def test_the_pretrained_teacher_is_not_rounded_by_the_students_type(tmp_path):
    base = write_base(tmp_path / "base")
    config = dataclasses.replace(toy.CONFIG, param_dtype="bfloat16")
    student = student_stage(
        model=Model(config), restore=base, teacher="pretrained", teacher_dtype="float32"
    )
    teacher = stage_start.teacher(Recipe("toy", str(tmp_path), (student,)), student)
    toy.assert_same(toy.flat(teacher.params), native_params(base))


def test_the_pretrained_teacher_of_a_model_from_scratch_is_what_its_stage_draws(tmp_path):
    promot = promot_with_teacher(tmp_path, "scratch", teacher_dtype="float32")
    drawn = toy.flat(stage_start.restore(promot, promot.stages[0]))
    del drawn[toy.PROMPT]
    toy.assert_same(toy.flat(stage_start.teacher(promot, promot.stages[1]).params), drawn)


def test_the_pretrained_teacher_leaves_out_what_is_laid_over_its_checkpoint(run, tmp_path):
    base = run.stages[0].restore
    export = Path(run.model_dir) / "light" / "export"
    student = student_stage(
        model=dataclasses.replace(toy.PLAIN, peft=(Prefix(length=2),)),
        restore=f"{base},{export}",
        teacher="pretrained",
        teacher_dtype="float32",
    )
    teacher = stage_start.teacher(Recipe("toy", str(tmp_path), (student,)), student)
    toy.assert_same(toy.flat(teacher.params), native_params(base))


def test_a_stage_learns_from_the_pretrained_model(tmp_path, monkeypatch):
    toy.ScriptedEvaluate(monkeypatch)
    promot = promot_with_teacher(tmp_path / "run", write_base(tmp_path / "base"))
    runner.run(promot)
    metrics = toy.read_lines(tmp_path / "run" / "student" / "metrics.jsonl")
    assert [line["kl"] > 0 for line in metrics if "kl" in line] == [True, True]


def test_preflight_traces_a_step_with_the_pretrained_teacher(tmp_path):
    base = write_base(tmp_path / "base")
    promot = promot_with_teacher(tmp_path / "run", base)
    checks.check(promot)
    student = promot.stages[1]
    alone = dataclasses.replace(student, objective=CrossEntropy(), teacher=None)
    unused = dataclasses.replace(student, objective=Cocktail(0.0))
    with_teacher, without, with_unused = (
        programs.train_step(promot, stage).parameter_bytes for stage in (student, alone, unused)
    )
    shapes = flatten(toy.PLAIN.shapes())
    assert with_teacher - without == sum(2 * leaf.size for leaf in shapes.values())
    assert with_unused == without


def larger(model):
    config = dataclasses.replace(model.config, vocab_size=300)
    return dataclasses.replace(model, config=config)


@pytest.mark.parametrize(
    ("light", "student", "message"),
    [
        ({"model": larger(LIGHT)}, {}, "has 300 tokens and its student 264"),
        (
            {
                "model": dataclasses.replace(toy.PLAIN, peft=(Prompt(length=2, tasks=("toy",)),)),
                "trainable": [".*prompt.*"],
            },
            {},
            "prompts for the tasks toy, but its student has not",
        ),
        (
            {"model": toy.MODEL, "trainable": [".*prompt"]},
            {"packing": True, "evaluations": ()},
            "packs examples, but a soft prompt",
        ),
    ],
    ids=["vocabulary", "tasks", "packing"],
)
def test_teachers_fit_their_students(tmp_path, light, student, message):
    with pytest.raises(UserError, match=message):
        claiming.claim(recipe(tmp_path / "run", student_stage(**student), light_stage(**light)))
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_does_not_exist_is_refused_before_training(tmp_path):
    student = student_stage(teacher=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere"):
        claiming.claim(recipe(tmp_path / "run", student))


def test_configs_say_who_teaches_and_how_much():
    light, student = gin_config.load([CONFIG], ["LAMBDA=0.25", "Z_LOSS=0.1"]).recipe.stages
    assert (light.name, light.teacher) == ("prefix", None)
    assert light.model.peft and not student.model.peft
    assert student.teacher == "stage:prefix" and student.restore == light.restore
    assert student.objective == Cocktail(0.25, cross_entropy=CrossEntropy(z_loss=0.1))
    assert student.steps == 6 and student.optimizer != light.optimizer
    with pytest.raises(UserError, match=r"teacher_weight=1.5 must be from 0 to 1"):
        gin_config.load([CONFIG], ["LAMBDA=1.5"])
