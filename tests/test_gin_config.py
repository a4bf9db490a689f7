"""Every config builds, four are compared with golden files; what wins; what gin is left as.

`pytest tests/test_gin_config.py --update-golden` writes tests/golden anew.
"""

import dataclasses
import re
from pathlib import Path

import gin
import pytest

from robust_ft import gin_config
from robust_ft.checks import untuned
from robust_ft.errors import UserError
from robust_ft.gin_config import CONFIGS, ROOT
from robust_ft.gin_types import fits
from robust_ft.models.peft import METHODS
from robust_ft.optim import Adafactor, AdamW, Schedule
from robust_ft.stage import Stage
from robust_ft.trainable import flatten

GOLDEN = Path(__file__).parent / "golden"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.gin") if path.stem != "common")
ADDED = {
    folder: sorted(path.stem for path in CONFIGS.glob(f"{folder}/*.gin"))
    for folder in ("models", "data", "scale", "methods")
}
# A recipe that each file is for; all others go behind any, such as PROMOT.
FOR = {
    "cocktails_webnlg": "table2_webnlg",
    "cocktails_xsum": "cocktail_xsum",
    "cocktails_openqa": "cocktail_adapters_openqa",
    "deep_prompt": "p3_mtl_tp",
    "mini_p3": "p3_mtl_t",
    "p3_paper": "p3_reptile",
    "t5_large_p3": "p3_mtl_p",
    "t5_xl_p3": "p3_fomaml",
}
BUILT = RECIPES + [
    f"{FOR.get(name, 'promot_rte')}+{folder}/{name}" for folder in ADDED for name in ADDED[folder]
]
# One stage, stages that continue each other, selections, and what scale files add.
GOLDENS = ["pretrain_mini", "promot_rte", "promot_rte+scale/mt5_xxl", "table2_webnlg"]
# Few-shot tuning, and meta-learning at the paper's size.
GOLDENS += ["p3_none", "p3_mtl_t", "p3_fomaml+scale/t5_xl_p3", "p3_mtl_p+scale/t5_large_p3"]
# These change how a recipe's stages train, which stay as they are.
BESIDE = ["asft", "dft", "eaft", "flow", "kl_anchor", "replay", "self_replay", "stm"]
# Not a method, but another form of a recipe's soft prompt.
METHOD_FILES = [name for name in ADDED["methods"] if name not in ("deep_prompt", *BESIDE)]

PROMOT = "gin_configs/promot_rte.gin"
FIELDS = [field.name for field in dataclasses.fields(Stage)]
PEFT, BASE, ALL, SOME_OF_BASE = "peft", "base", "all", "some of base"
# What trains in a stage, by its name; where it is not here, the parameters of PEFT methods.
TRAINS = {
    "bitfit": SOME_OF_BASE,
    "cocktail": BASE,
    "cocktail_adapters": BASE,
    "cocktail_prefix": BASE,
    "freeze_bottom": SOME_OF_BASE,
    "full": BASE,
    "model": BASE,
    "norm_only": SOME_OF_BASE,
    "pretrain": ALL,
    "top_layers": SOME_OF_BASE,
}
# Where methods have stages of the same name.
TRAINS_IN = {
    "fomaml": ALL,
    "joint": ALL,
    "mtl_t": BASE,
    "mtl_tp": ALL,
    "reptile": ALL,
}


def files_of(name):
    recipe, _, added = name.partition("+")
    return [f"gin_configs/{recipe}.gin"] + ([f"gin_configs/{added}.gin"] if added else [])


def trains(stage):
    return stage.trainable_paths()


def load(*bindings, files=(PROMOT,)):
    return gin_config.load(files, bindings).recipe


@pytest.mark.parametrize("name", GOLDENS)
def test_operative_config_is_golden(name, request):
    operative = gin_config.load(files_of(name)).operative
    golden = GOLDEN / f"{name.replace('scale/', '')}.gin"
    if request.config.getoption("--update-golden"):
        golden.write_text(operative)
    assert operative == golden.read_text(), f"see --update-golden in {Path(__file__).name}"


@pytest.mark.parametrize("name", BUILT)
def test_every_config_builds_and_its_operative_config_the_same_again(name, tmp_path):
    first = gin_config.load(files_of(name), ["DROPOUT_RATE=0.1"])
    file = tmp_path / "config.gin"
    file.write_text(first.operative)
    again = gin_config.load([str(file)])
    assert again.recipe == first.recipe
    assert again.operative == first.operative


@pytest.mark.parametrize(
    "name",
    [*RECIPES, *(f"{folder}/{name}" for folder in ADDED for name in ADDED[folder])],
)
def test_a_file_says_what_it_is_for_and_the_command(name):
    comment = (CONFIGS / f"{name}.gin").read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in comment.splitlines())
    if name == "scale/mini" or name.startswith("models/"):  # parts of every recipe
        return
    command = comment[comment.index("python -m robust_ft.train ") :].split("--dry_run")[0]
    files = re.findall(r"--gin_file=(\S+)", command)
    assert files[-1] == f"gin_configs/{name}.gin"
    assert load("DROPOUT_RATE=0.1", files=files).parts


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_named_after_its_file(name):
    recipe = load(files=files_of(name))
    assert (recipe.name, recipe.model_dir) == (name, f"/tmp/robust_ft/{name}")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_includes_five_files_each_once(name):
    """Common, model, data, scale, method; then comes what is its own."""
    text = (CONFIGS / f"{name}.gin").read_text()
    included = re.findall(r"(?m)^include 'gin_configs/(.*)'$", text)
    folders = ["common.gin", *(path.split("/")[0] for path in included[1:])]
    assert [included[0], *folders[1:]] == ["common.gin", "models", "data", "scale", "methods"]
    statements = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(line.startswith("include ") for line in statements[:5])


def test_files_say_nothing_of_what_is_not_theirs():
    for path in CONFIGS.rglob("*.gin"):
        text = path.read_text()
        assert "MODEL_DIR =" not in text and "Recipe.name" not in text, path
        if path.parent.name == "data":
            assert "OPTIMIZER" not in text and "gin_configs/scale/" not in text, path


def paths_of(stage):
    """Returns the paths of a stage's PEFT methods' parameters, and of all others."""
    paths = set(flatten(stage.model.shapes()))
    owned = {path for path in paths if any(method.owns(path) for method in stage.model.peft)}
    return owned, paths - owned


@pytest.mark.parametrize(
    "renamed", [(), [f"{kind.__name__}.name=soft" for kind in METHODS.values()]]
)
@pytest.mark.parametrize("method", ADDED["methods"])
def test_what_trains_is_what_methods_own_or_all_but_that(method, renamed):
    files = ["gin_configs/full_rte.gin", f"gin_configs/methods/{method}.gin"]
    for stage in load(*renamed, files=files).stages:
        owned, base = paths_of(stage)
        name = re.sub(r"_[\d.]+$", "", stage.name)  # of students
        expected = TRAINS_IN.get(method) or TRAINS.get(name, PEFT)
        if expected == SOME_OF_BASE:
            assert trains(stage) < base
        else:
            own = stage.model.without_fixed(owned)
            assert trains(stage) == {PEFT: own, BASE: base, ALL: own | base}[expected]


@pytest.mark.parametrize("method", BESIDE)
def test_a_remedy_leaves_a_recipes_stages_and_what_they_train(method):
    for names in (["promot_rte"], ["full_rte", "methods/lora"]):
        files = [f"gin_configs/{name}.gin" for name in names]
        plain = load(files=files).stages
        other = load(files=[*files, f"gin_configs/methods/{method}.gin"]).stages
        for before, after in zip(plain, other, strict=True):
            changed = {field for field in FIELDS if getattr(before, field) != getattr(after, field)}
            assert changed and changed <= {"objective", "replay", "teacher"}


def test_weights_by_the_pretrained_models_losses_are_not_another_teachers():
    files = ["gin_configs/cocktail_webnlg.gin", "gin_configs/methods/flow.gin"]
    with pytest.raises(UserError, match=r"Flow weighs .* 'cocktail' has the teacher 'stage:pref"):
        load(files=files)
    assert load(files=[files[0], "gin_configs/methods/dft.gin"]).stages


def test_a_renamed_prompt_that_is_fixed_does_not_train():
    recipe = "gin_configs/random_prompt_rte.gin"
    (stage,) = load("Prompt.name=soft", files=[recipe]).stages
    assert paths_of(stage)[0] == {"encoder/soft"} and "encoder/soft" not in trains(stage)


@pytest.mark.parametrize("recipe", ["promot_rte", "table2_webnlg"])
@pytest.mark.parametrize("method", METHOD_FILES)
def test_a_method_can_be_put_behind_any_recipe(method, recipe):
    file = f"gin_configs/methods/{method}.gin"

    def said(recipe):
        built = load(files=[f"gin_configs/{recipe}.gin", file])
        stages = [(stage.name, stage.restore, stage.trainable) for stage in built.stages]
        return stages, [selection.name for selection in built.selections]

    assert said(recipe) == said("full_rte")


@pytest.mark.parametrize("recipe", ["full_rte", "promot_multitask", "table2_webnlg"])
def test_analyses_can_be_put_behind_any_recipe(recipe):
    plain = load(files=[f"gin_configs/{recipe}.gin"])
    both = load(files=[f"gin_configs/{recipe}.gin", "gin_configs/analyses/drift_and_alignment.gin"])
    for stage, before in zip(both.stages, plain.stages, strict=True):
        *evaluations, drift, alignment = stage.evaluations
        assert tuple(evaluations) == before.evaluations == drift.evaluations
        assert alignment.split == drift.split == "validation"
        assert alignment.evaluation.detach == () and alignment.batch_size == drift.batch_size
        *evaluations, drift = stage.final_evaluations
        assert tuple(evaluations) == before.final_evaluations == drift.evaluations


def test_a_run_is_named_after_its_files(tmp_path):
    (tmp_path / "mine.gin").write_text("TRAIN_STEPS = 7\n")
    files = ["gin_configs/full_rte.gin", "gin_configs/methods/lora.gin", str(tmp_path / "mine.gin")]
    recipe = load(files=files)
    assert recipe.name == "full_rte+lora+mine"
    assert recipe.model_dir == "/tmp/robust_ft/full_rte+lora+mine"
    (tmp_path / "mine.gin").write_text("Recipe.name = 'mine'\nMODEL_DIR = '/tmp/mine'\n")
    recipe = load("MODEL_DIR=/tmp/run", files=files)
    assert (recipe.name, recipe.model_dir) == ("mine", "/tmp/run")


def test_promot_is_what_the_paper_says():
    prompt, model = load().stages
    assert prompt.name == "prompt" and trains(prompt) == {"encoder/prompt"}
    assert (model.name, model.restore) == ("model", "stage:prompt")
    for stage in (prompt, model):
        assert stage.data.split == "train"
        for evaluation in (*stage.evaluations, *stage.final_evaluations):
            held_out = evaluation.role == "held_out"
            assert evaluation.detach == ("all" if held_out else ())
        assert {e.data.split for e in stage.evaluations} == {"validation"}
        assert {e.data.split for e in stage.final_evaluations} == {"test"}


def test_the_papers_gpt2_has_a_separator():
    def models(*files):
        return {stage.model.separator_id for stage in load(files=files).stages}

    plain = ("gin_configs/table2_webnlg.gin", "gin_configs/models/gpt2_medium.gin")
    assert models(*plain) == {None}
    assert models(*plain, "gin_configs/models/families/gpt2_separator.gin") == {50258}
    for task, expected in (("webnlg", {50258}), ("openqa", {50258}), ("xsum", {None})):
        recipe = f"gin_configs/cocktail_{task}.gin"
        assert models(recipe, f"gin_configs/scale/cocktails_{task}.gin") == expected


def test_which_hyperparameters_a_recipe_has_for_real_models():
    def stages(*files):
        files = [f"gin_configs/{file}.gin" for file in ("promot_rte", *files)]
        return {stage.name: stage for stage in load(files=files).stages}

    base = stages("scale/base")
    assert base["model"].optimizer == AdamW(
        Schedule(5e-5, warmup_steps=100, decay="linear", decay_steps=1000), clip_norm=1.0
    )
    prompt = Adafactor(Schedule(0.3), multiply_by_parameter_scale=False, weight_decay=1e-5)
    assert base["prompt"].optimizer == prompt
    t5 = stages("scale/base_t5")
    assert t5["model"].optimizer == Adafactor(Schedule(1e-3, decay_steps=1000))
    assert t5["prompt"].optimizer == prompt and t5["model"].model.config.dropout_rate == 0.1
    for scale in ("scale/base", "scale/base_t5"):
        light = stages(scale, "methods/lora")["lora"].optimizer
        assert isinstance(light, AdamW) and light.epsilon == 1e-8
        assert 1e-4 <= light.learning_rate.peak <= 1e-3 and light.learning_rate.warmup_steps == 100


def test_a_toys_hyperparameters_say_so_with_a_larger_model():
    def note(*files):
        files = [f"gin_configs/{file}.gin" for file in ("full_rte", *files)]
        return untuned(load("DROPOUT_RATE=0.0", files=files))

    assert note() is None
    said = note("models/gpt2")
    assert "up to 10,000,000 parameters" in said and "'model' has one of 124,439,808" in said
    assert "\n" not in said
    assert note("models/gpt2", "scale/base") is None
    assert note("models/t5_base", "scale/base_t5") is None
    assert note("models/mt5_xl", "scale/mt5_xl") is None


# What wins.


@pytest.mark.parametrize("name", ["mini_t5", "bart_base", "gpt2", "llama3_2_1b"])
def test_a_value_for_all_families_and_of_one(name):
    def dropout_rate(*bindings):
        files = [PROMOT, f"gin_configs/models/{name}.gin"]
        return load("DROPOUT_RATE=0.25", *bindings, files=files).stages[0].model.config.dropout_rate

    assert dropout_rate() == 0.25
    assert dropout_rate("ModelConfig.dropout_rate=0.5") == 0.5
    families = ("T5Config", "BartConfig", "GPT2Config", "LlamaConfig")
    own = [f"{family}.dropout_rate=0.125" for family in families]
    assert dropout_rate(*own, "ModelConfig.dropout_rate=0.5") == 0.125
    # In a scope, as any other: gin builds MODEL_CONFIG in a scope of its name.
    assert dropout_rate("MODEL_CONFIG/ModelConfig.dropout_rate=0.5") == 0.5
    with pytest.raises(UserError, match=r"no parameter 'droput_rate'.*'dropout_rate'"):
        dropout_rate("ModelConfig.droput_rate=0.5")


def test_later_files_win_over_earlier_ones_and_flags_over_files(tmp_path):
    for name, steps in (("one", 11), ("two", 22)):
        (tmp_path / f"{name}.gin").write_text(f"TRAIN_STEPS = {steps}\nBATCH_SIZE = {steps}\n")
    one, two = (str(tmp_path / f"{name}.gin") for name in ("one", "two"))
    assert load(files=[PROMOT, one, two]).stages[1].steps == 22
    assert load(files=[PROMOT, two, one]).stages[1].steps == 11
    stage = load("TRAIN_STEPS=33", files=[PROMOT, one, two]).stages[1]
    assert (stage.steps, stage.batch_size) == (33, 22)
    assert load("TRAIN_STEPS=1", "TRAIN_STEPS=2").stages[1].steps == 2
    prompt, model = load("model/Stage.log_period=7").stages
    assert (prompt.log_period, model.log_period) == (20, 7)


def test_search_paths(tmp_path):
    (tmp_path / "mine.gin").write_text("TRAIN_STEPS = 7\n")
    config = gin_config.load([PROMOT, "mine.gin"], search_paths=[str(tmp_path)])
    assert config.recipe.stages[1].steps == 7


@pytest.mark.parametrize("quoted", ["'/tmp/a run'", '"/tmp/a run"', "/tmp/a run"])
def test_texts_need_no_quotes_in_flags(quoted):
    assert load(f"MODEL_DIR={quoted}").model_dir == "/tmp/a run"


@pytest.mark.parametrize(
    "text", ["{text} {nope}", "{text}", "Q: {text} (x) :)", "50% {a} @home %X", "it's {a}", "{0}"]
)
def test_texts_with_brackets_are_texts(text):
    assert load(f"CACHE_DIR={text}").stages[0].data.cache_dir == text


@pytest.mark.parametrize("text", ["{text", "[%TRAIN_STEPS", "(a"])
def test_brackets_that_are_not_closed(text):
    with pytest.raises(UserError, match=rf"CACHE_DIR={re.escape(text)} opens a '.' that it never"):
        load(f"CACHE_DIR={text}")


def test_values_with_references_are_no_texts():
    model = load("HELD_OUT_TASKS={0: ['mini_cb', %MIXTURE_OR_TASK_NAME]}").stages[1]
    names = [e.task for e in model.evaluations if e.role == "held_out"]
    assert names == ["mini_cb", "mini_rte"]


def test_other_values_of_flags_are_not_taken_for_texts():
    recipe = load(
        "HELD_OUT_TASKS={0: ['a', 'b'], 1: ['c']}",
        "TEST_LIMIT=None",
        "OPTIMIZER=@prompt/Adafactor()",
        "PROMPT_TRAIN_STEPS=%TRAIN_STEPS",
        "model/Stage.restore=stage:prompt",
        "CACHE_DIR=a=b",
    )
    prompt, model = recipe.stages
    names = [(e.task, e.shots) for e in model.evaluations if e.role == "held_out"]
    assert names == [("a", 0), ("b", 0), ("c_1shot", 1)]
    assert type(model.optimizer).__name__ == "Adafactor"
    assert prompt.steps == model.steps
    assert model.restore == "stage:prompt"
    assert model.data.cache_dir == "a=b"


# How errors name what sets a field.


@pytest.mark.parametrize(
    ("message", "added"),
    [
        ("Stage.packing=True needs none.", "PACKING"),
        ("Stage.steps=0 of stage 'model' is too few.", "TRAIN_STEPS"),
        ("Stage.steps=0 of stage 'prompt' is too few.", "PROMPT_TRAIN_STEPS"),
        ("Stage.steps=0 is too few.", "PROMPT_TRAIN_STEPS, TRAIN_STEPS"),
        ("Stage.restore='x' of stage 'model' is not there.", "model/Stage.restore"),
        ("Stage.restore='x' of stage 'prompt' is not there.", "INITIAL_CHECKPOINT_PATH"),
        ("Recipe.seed and Stage.packing, Recipe.seed.", "RANDOM_SEED, PACKING"),
        ("suite.ood_tasks names none.", "OOD_TASKS"),
        ("stages.prompt.optimizer.x (Schedule.peak) is 1, now 0.3; no.", "PROMPT_LEARNING_RATE"),
        ("stages.model.optimizer.x (Schedule.peak) is 1, now 0.001; no.", "LEARNING_RATE"),
    ],
)
def test_errors_say_what_sets_a_field_in_the_config(message, added):
    error = gin_config.load([PROMOT]).explain(UserError(message))
    assert str(error) == f"{message.removesuffix('.')} (in the config: {added})."


@pytest.mark.parametrize(
    "message", ["Stage.packing is what PACKING says.", "Stage.log_period=0.", "No field.", "x.y"]
)
def test_errors_that_need_no_addition_stay_as_they_are(message):
    assert str(gin_config.load([PROMOT]).explain(UserError(message))) == message


# What is left behind.


def assert_clean():
    assert not gin.config_str().strip() and not gin.operative_config_str().strip()
    with pytest.raises(ValueError, match="macro"):
        gin.query_parameter("%TRAIN_STEPS")


def test_gin_is_clean_after_success_and_failure():
    load("TRAIN_STEPS=3")
    assert_clean()
    for flag in ("Stage.stpes=1", "TRAIN_STEPS=0", "TRAIN_STEPS=ten", "MODEL_DIR=@Nothing()"):
        with pytest.raises(UserError):
            load(flag)
        assert_clean()
    assert load().stages[1].steps != 3


def test_the_config_is_plain_data():
    recipe = load()
    assert hash(recipe) == hash(load())
    assert type(recipe).__module__ == "robust_ft.recipe"
    assert type(recipe.stages[0].optimizer).__module__ == "robust_ft.optim"


def test_methods_are_plugged_in_by_name_and_always_in_the_same_order():
    names = ["adapter", "ia3", "lora", "oplora", "prefix", "prompt"]
    kinds = ["Adapter", "IA3", "Lora", "OPLora", "Prefix", "Prompt"]
    plugged = [f"Model.{name}=@{kind}()" for name, kind in zip(names, kinds, strict=True)]
    stage = load(*plugged, files=["gin_configs/full_rte.gin"]).stages[0]
    assert list(map(type, stage.model.peft)) == list(METHODS.values())
    (stage,) = load(
        *plugged,
        "Model.lora=None",
        "Model.oplora=None",
        "Model.ia3=None",
        "Model.peft=None",
        files=files_of("full_rte"),
    ).stages
    assert [method.name for method in stage.model.peft] == ["prompt", "prefix", "adapter"]
    two = ["Model.peft=[@Lora(), @second/Lora()]", "second/Lora.name=second"]
    (stage,) = load(*two, files=files_of("full_rte")).stages
    assert [method.name for method in stage.model.peft] == ["lora", "second"]
    for wrong, sentence in {
        "Model.lroa=@Lora()": r"Model has no parameter 'lroa' .*Did you mean 'lora'",
        "Model.lora=@Lroa()": r"Configs know no 'Lroa' .*Did you mean 'Lora'",
        "Model.lora=8": r"Model.lora=8 must be of type Lora or None",
        "T5Config.pad_id=3": r"'pad_id'.* Model.pad_id is the id that",
        "Model.pad_idd=8": r"Model has no parameter 'pad_idd' .*Did you mean 'pad_id'",
    }.items():
        with pytest.raises(UserError, match=sentence):
            load(wrong)


def test_prompts_of_every_kind():
    vocabulary = "Prompt.vocabulary=%VOCABULARY"
    labels = ["PROMPT_INITIALIZATION=class_labels", "Prompt.labels=['True', 'False']", vocabulary]
    stage = load(*labels).stages[0]
    (prompt,) = stage.model.peft
    assert prompt.labels == ("True", "False") and prompt.vocabulary == stage.data.vocabulary
    assert hash(prompt) == hash(load(*labels).stages[0].model.peft[0])
    stage.model.check()
    text = load("PROMPT_INITIALIZATION=text", "Prompt.text='True False'", vocabulary).stages[0]
    text.model.check()
    files = load(
        "PROMPT_INITIALIZATION=file",
        "Prompt.file=['a.npy', 'b.npy']",
        "Prompt.tasks=['a', 'b']",
        "Prompt.position=infix",
    )
    (prompt,) = files.stages[0].model.peft
    assert (prompt.file, prompt.tasks) == (("a.npy", "b.npy"), ("a", "b"))
    for wrong, sentence in {
        "Prompt.labels=True": "Prompt.labels=True must be a list of texts",
        "Prompt.tasks='a'": "Prompt.tasks='a' must be a list of texts",
        "Prompt.vocabulary='t5'": r"Prompt.vocabulary='t5' must be of type Vocabulary or None",
        "Prompt.low=None": "Prompt.low=None must be a number",
        "Prompt.labels=['a']": "Prompt.labels is for Prompt.initialization='class_labels'",
    }.items():
        with pytest.raises(UserError, match=sentence):
            load(wrong)


def test_evaluations_stand_beside_a_suite():
    both = "[@test/suite(), @target/Evaluation(), @validation/suite()]"
    stage = load(f"Stage.final_evaluations={both}").stages[0]
    plain = load().stages[0]
    extra = [e for e in stage.final_evaluations if e not in plain.final_evaluations]
    assert len(stage.final_evaluations) == 2 * len(plain.final_evaluations) + 1
    assert set(extra) >= set(plain.evaluations)


def test_included_files_can_be_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load().name == "promot_rte"
    assert load(files=[str(ROOT / PROMOT)]).name == "promot_rte"


@pytest.mark.parametrize(
    ("value", "hint", "fit"),
    [
        (1, int, True),
        (True, int, False),
        (1.0, int, False),
        (1, float, True),
        (True, float, False),
        ("x", float, False),
        (None, int | None, True),
        ("x", int | None, False),
        (["a"], tuple[str, ...], True),
        ("a", tuple[str, ...], False),
        (["a", 1], tuple[str, ...], False),
        ([1, "a"], tuple[int, str], True),
        ([1], tuple[int, str], False),
    ],
)
def test_types(value, hint, fit):
    assert fits(value, hint) is fit
