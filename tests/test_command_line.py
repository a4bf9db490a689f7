"""What users meet: flags, exit codes, and one helpful sentence for every mistake."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import toy
from safetensors.numpy import save_file

from robust_ft import claiming, command_line, runner, train
from robust_ft.trainer import Stopped

TOY = f"--gin_file={Path(__file__).parent / 'toy_promot.gin'}"


def run(*flags, main=train.main):
    """Runs a command line in this process; returns its exit status."""
    with pytest.raises(SystemExit) as ended:
        command_line.run(main, list(flags))
    return ended.value.code


def start(*flags, module="robust_ft.train"):
    command = [sys.executable, "-m", module, *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def assert_one_sentence(stderr, *parts):
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("Error: ") and "Traceback" not in lines[0]
    for part in parts:
        assert part in lines[0]


# Flag (or flags) and what the sentence says: the place and the nearest valid choice.
MISTAKES = {
    "misspelt macro": ("--gin.TRAIN_STPES=10", "'TRAIN_STPES'", "mean 'TRAIN_STEPS'"),
    "macro without value": ("--gin.TRAIN_STEPS", "write --gin.TRAIN_STEPS=VALUE"),
    "unknown flag": ("--gin_flie=x", "no flag '--gin_flie'", "mean '--gin_file'"),
    "flag without value": ("--gin_file", "--gin_file", "expected one argument"),
    "unknown file": ("--gin_file=gin_configs/promot_rt.gin", "mean 'gin_configs/promot_rte.gin'"),
    "misspelt configurable": ("--gin.Stagee.steps=3", "'Stagee'", "mean 'Stage'"),
    "misspelt reference": ("--gin.OPTIMIZER=@AdanW()", "'AdanW'", "mean 'AdamW'"),
    "misspelt parameter": ("--gin.Stage.stpes=3", "Stage", "'stpes'", "mean 'steps'"),
    "misspelt scope": ("--gin.modle/Stage.steps=3", "'modle/'", "mean 'model'"),
    "steps=0": ("--gin.TRAIN_STEPS=0", "Stage.steps=0", "'model'", "(in the config: TRAIN_STEPS)"),
    "wrong type": (
        "--gin.TRAIN_STEPS=ten",
        "Stage.steps='ten'",
        "a whole number (in the config: TRAIN_STEPS).",
    ),
    "fraction": ("--gin.BATCH_SIZE=2.5", "Stage.batch_size=2.5", "a whole number"),
    "microbatches": ("--gin.MICROBATCHES=3", "microbatches=3", "batch_size=4"),
    "no optimizer": ("--gin.OPTIMIZER=adamw", "Stage.optimizer='adamw'"),
    "decay": ("--gin.Schedule.decay=lineer", "'lineer'", "mean 'linear'"),
    "prompt": ("--gin.Prompt.initialization=sampled", "mean 'sampled_vocabulary'"),
    "empty prompt": ("--gin.PROMPT_LENGTH=0", "Prompt.length=0"),
    "limit": ("--gin.EVAL_LIMIT=0", "suite.limit=0", "(in the config: EVAL_LIMIT)"),
    "no patterns": ("--gin.model/Stage.trainable=[]", "'model' trains nothing"),
    "restore": ("--gin.model/Stage.restore=stage:promt", "'stage:promt'", "mean 'prompt'"),
    "pattern": ("--gin.model/Stage.trainable=['decodr/.*']", "'decodr/.*'", "none of the"),
    "regex": ("--gin.model/Stage.trainable=['(']", "'('", "no valid regex"),
    "packing": ("--gin.PACKING=True", "set Stage.packing", "(in the config: PACKING)"),
    "devices": ("--gin.MODEL_PARALLEL=3", "model_parallel=3", "choose one of"),
    "missing checkpoint": ("--gin.INITIAL_CHECKPOINT_PATH=/no/model", "'/no/model'"),
    "missing asset": ("--gin.INITIAL_CHECKPOINT_PATH=asset:mini/x", "'asset:mini/x'"),
    "module": ("--gin.MIXTURE_OR_TASK_MODULE=toy_taks", "'toy_taks'", "mean 'toy_tasks'"),
    "task": ("--gin.MIXTURE_OR_TASK_NAME=toyy", "'toyy'", "mean 'toy'"),
    "split": ("--gin.train/TaskData.split=trian", "'trian'", "mean 'train'"),
    "evaluation's split": ("--gin.EVAL_SPLIT=validate", "'validate'", "mean 'validation'"),
    "lengths": (
        "--gin.TASK_FEATURE_LENGTHS={'inputs': 8}",
        "'inputs' and 'targets' (in the config: ",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(mistake, tmp_path, capsys):
    flag, *parts = MISTAKES[mistake]
    model_dir = tmp_path / "run"
    assert run(TOY, f"--gin.MODEL_DIR={model_dir}", flag) == command_line.USER_ERROR
    assert_one_sentence(capsys.readouterr().err, *parts)
    assert not list(tmp_path.rglob("checkpoint_*"))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Stage.steps == 3\n", ["line 1", "Stage.steps == 3"]),
        ("# fine\nTRAIN_STEPS = \n", ["line 2", "TRAIN_STEPS ="]),
        ("TRAIN_STEPS = (1,\n", ["bad.gin"]),
        ("TRAIN_STPES = 3\n", ["'TRAIN_STPES'", "mean 'TRAIN_STEPS'"]),
        ("Stage.stpes = 3\n", ["bad.gin", "line 1", "mean 'steps'"]),
        ("include 'gin_configs/modles/mini_t5.gin'\n", ["mean 'gin_configs/models/mini_t5.gin'"]),
        ("include 'bad.gin'\n", ["bad.gin", "includes itself"]),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence(text, parts, tmp_path, capsys):
    (tmp_path / "bad.gin").write_text(text)
    search = f"--gin_search_paths={tmp_path}"
    assert run(TOY, "--gin_file=bad.gin", search, "--dry_run") == command_line.USER_ERROR
    assert_one_sentence(capsys.readouterr().err, *parts)


def test_no_file_names_the_recipes(capsys):
    assert run() == command_line.USER_ERROR
    assert_one_sentence(capsys.readouterr().err, "--gin_file=gin_configs/NAME.gin", "promot_rte")


def test_a_value_that_is_missing(capsys):
    assert run("--gin_file=gin_configs/common.gin") == command_line.USER_ERROR
    assert_one_sentence(capsys.readouterr().err, "value for the macro INITIAL_CHECKPOINT_PATH")


def test_a_checkpoint_of_another_shape(tmp_path, capsys):
    config = dataclasses.replace(toy.CONFIG, mlp_dim=8)
    shapes = toy.flat_shapes(dataclasses.replace(toy.PLAIN, config=config))
    file = tmp_path / "other.safetensors"
    save_file({path: np.zeros(leaf.shape) for path, leaf in shapes.items()}, file)
    flags = [f"--gin.MODEL_DIR={tmp_path / 'run'}", f"--gin.INITIAL_CHECKPOINT_PATH={file}"]
    assert run(TOY, *flags) == command_line.USER_ERROR
    assert_one_sentence(capsys.readouterr().err, "other.safetensors", "wi_0/kernel", "(16, 8)")


def test_a_folder_of_another_recipe_keeps_all_it_has(tmp_path, capsys):
    claiming.claim(dataclasses.replace(toy.promot(tmp_path), name="other"))
    (tmp_path / "config.gin").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert run(TOY, f"--gin.MODEL_DIR={tmp_path}") == command_line.USER_ERROR
    assert_one_sentence(capsys.readouterr().err, "'other'", "'toy_promot'", "MODEL_DIR")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_where_the_folder_should_be(tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    assert run(TOY, f"--gin.MODEL_DIR={tmp_path / 'run'}") == command_line.USER_ERROR
    assert_one_sentence(
        capsys.readouterr().err, "Recipe.model_dir=", "cannot be written", "MODEL_DIR)"
    )
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize(
    "flags",
    [
        ["--gin_file=gin_configs/promot_rte.gin", "--gin.TRAIN_STPES=10"],
        ["--gin_file=gin_configs/promot_rte.gin", "--gin.MIXTURE_OR_TASK_NAME=x", "--nope"],
    ],
)
def test_a_mistake_in_a_process(flags):
    ended = start(*flags)
    assert ended.returncode == command_line.USER_ERROR and not ended.stdout
    assert_one_sentence(ended.stderr)


def test_sigterm_has_its_own_exit_code(tmp_path, monkeypatch, capsys):
    def stopped(recipe, callbacks):
        raise Stopped("Stopped at step 3 of stage 'model'.")

    monkeypatch.setattr(runner, "run_claimed", stopped)
    assert run(TOY, f"--gin.MODEL_DIR={tmp_path}") == command_line.RESUME == 75
    assert "step 3 of stage 'model'. Run the same command to resume." in capsys.readouterr().out


def test_a_recipe_is_checked_once(tmp_path, monkeypatch):
    def stopped(*_):
        raise Stopped("Stopped before the first stage.")

    def counting(recipe):
        checked.append(recipe.name)
        check(recipe)

    checked, check = [], claiming.check
    monkeypatch.setattr(claiming, "check", counting)
    monkeypatch.setattr(runner, "restore", stopped)
    assert run(TOY, f"--gin.MODEL_DIR={tmp_path}") == command_line.RESUME
    assert checked == ["toy_promot"] and (tmp_path / "config.gin").is_file()


def test_help_is_instant_and_imports_nothing_heavy():
    code = "import sys; from robust_ft import command_line, train\n"
    code += "try: command_line.run(train.main, ['--help'])\n"
    code += "finally: print([m for m in ('jax', 'gin', 'seqio', 'numpy') if m in sys.modules])"
    started = time.process_time()
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert time.process_time() - started < 1
    assert ended.returncode == 0 and "--gin.NAME VALUE" in ended.stdout
    assert ended.stdout.rstrip().endswith("[]")


def test_dry_run_trains_nothing_and_writes_nothing(tmp_path, capsys):
    assert run(TOY, f"--gin.MODEL_DIR={tmp_path / 'run'}", "--dry_run") == 0
    out = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    for part in ("TRAIN_STEPS = 12", "encoder/prompt", "trainable", "inputs [4, 12]"):
        assert part in out
    assert "evaluate toy_other_1shot validation without prompt" in out
