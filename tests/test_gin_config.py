"""Every config is built and compared with a golden file; what wins; what gin is left as.

`pytest tests/test_gin_config.py --update-golden` writes tests/golden anew.
"""

from pathlib import Path

import gin
import pytest

from robust_ft import gin_config
from robust_ft.errors import UserError
from robust_ft.gin_config import CONFIGS, ROOT
from robust_ft.gin_types import fits

GOLDEN = Path(__file__).parent / "golden"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.gin") if path.stem != "common")
SCALES = sorted(path.stem for path in CONFIGS.glob("scale/*.gin"))
# Every recipe as it is, and every scale with a recipe that it is for.
FOR = {
    "cocktails_webnlg": "table2_webnlg",
    "cocktails_xsum": "cocktail_xsum",
    "cocktails_openqa": "cocktail_adapters_openqa",
}
BUILT = RECIPES + [f"{FOR.get(scale, 'promot_rte')}+{scale}" for scale in SCALES]

PROMOT = "gin_configs/promot_rte.gin"


def files_of(name):
    recipe, _, scale = name.partition("+")
    return [f"gin_configs/{recipe}.gin"] + ([f"gin_configs/scale/{scale}.gin"] if scale else [])


def trains(stage):
    return stage.trainable_paths()


def load(*bindings, files=(PROMOT,)):
    return gin_config.load(files, bindings).recipe


@pytest.mark.parametrize("name", BUILT)
def test_operative_config_is_golden(name, request):
    operative = gin_config.load(files_of(name)).operative
    golden = GOLDEN / f"{name}.gin"
    if request.config.getoption("--update-golden"):
        golden.write_text(operative)
    assert operative == golden.read_text(), f"see --update-golden in {Path(__file__).name}"


def test_no_golden_file_is_left_over():
    assert sorted(path.stem for path in GOLDEN.glob("*.gin")) == sorted(BUILT)


@pytest.mark.parametrize("name", BUILT)
def test_operative_config_builds_the_same_again(name, tmp_path):
    first = gin_config.load(files_of(name))
    file = tmp_path / "config.gin"
    file.write_text(first.operative)
    again = gin_config.load([str(file)])
    assert again.recipe == first.recipe
    assert again.operative == first.operative


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_say_what_they_are_and_how_to_run_them(name):
    comment = (CONFIGS / f"{name}.gin").read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in comment.splitlines())
    assert f"python -m robust_ft.train --gin_file=gin_configs/{name}.gin" in comment
    recipe = load(files=files_of(name))
    assert recipe.name == name and Path(recipe.model_dir).name == name


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


# What wins.


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
        "Prompt.labels=True": r"Prompt.labels=True must be of type tuple\[str",
        "Prompt.tasks='a'": r"Prompt.tasks='a' must be of type tuple\[str",
        "Prompt.vocabulary='t5'": r"Prompt.vocabulary='t5' must be of type Vocabulary or None",
        "Prompt.low=None": "Prompt.low=None must be a number",
        "Prompt.labels=['a']": "Prompt.labels is for Prompt.initialization='class_labels'",
    }.items():
        with pytest.raises(UserError, match=sentence):
            load(wrong)


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
