"""Several seeds in one command: complete runs, resumable together, and one report."""

import dataclasses

import pytest
import toy
from test_command_line import TOY, assert_one_sentence, run

from robust_ft import command_line, runner
from robust_ft.errors import UserError
from robust_ft.files import read_json
from robust_ft.seeds import run_seeds
from robust_ft.trainer import Stopped

SHORT = (TOY, "--gin.PROMPT_TRAIN_STEPS=2", "--gin.TRAIN_STEPS=2", "--gin.EVAL_PERIOD=2",
         "--gin.EVAL_LIMIT=4", "--gin.TEST_LIMIT=4")  # fmt: skip


def summaries(folder, seeds):
    return [(folder / f"seed_{seed}" / "summary.json").read_text() for seed in seeds]


@pytest.mark.slow
def test_each_seed_is_the_run_of_its_own_command_and_one_report_is_on_all(tmp_path, capsys):
    flags = (*SHORT, f"--gin.MODEL_DIR={tmp_path / 'runs'}", "--gin.RANDOM_SEED=3", "--seeds=2")
    assert run(*flags) == 0
    shown = capsys.readouterr().out
    assert "Report on 2 seed(s)" in shown and "±" in shown
    seeds = [read_json(tmp_path / "runs" / f"seed_{n}" / "run.json")["seed"] for n in (3, 4)]
    assert seeds == [3, 4]
    assert "±" in (tmp_path / "runs" / "report.md").read_text()
    assert (tmp_path / "runs" / "seed_4" / "report.html").exists()
    # The second is what a command with its seed alone makes.
    alone = f"--gin.MODEL_DIR={tmp_path / 'alone' / 'seed_4'}"
    assert run(*SHORT, alone, "--gin.RANDOM_SEED=4") == 0
    assert summaries(tmp_path / "runs", [4]) == summaries(tmp_path / "alone", [4])
    config = (tmp_path / "runs" / "seed_4" / "config.gin").read_text()
    assert "RANDOM_SEED = 4" in config and "seed_4'" in config
    # Again, nothing trains; the same results are reported.
    before = summaries(tmp_path / "runs", [3, 4])
    assert run(*flags) == 0
    assert summaries(tmp_path / "runs", [3, 4]) == before


def test_mistakes(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    flags = (*SHORT, f"--gin.MODEL_DIR={folder}")
    assert run(*flags, "--seeds=0") == command_line.USER_ERROR
    assert_one_sentence(capsys.readouterr().err, "number of seeds is 0")
    assert run(*flags, "--seeds=two") == command_line.USER_ERROR
    assert_one_sentence(capsys.readouterr().err, "--seeds")
    assert run(*flags, "--seeds=2", "--gin.Recipe.seed=5") == command_line.USER_ERROR
    assert_one_sentence(capsys.readouterr().err, "--seeds sets RANDOM_SEED and MODEL_DIR")
    (folder / "run.json").write_text("{}")
    assert run(*flags, "--seeds=2") == command_line.USER_ERROR
    assert_one_sentence(capsys.readouterr().err, "is the folder of a single run")
    assert [path.name for path in folder.iterdir()] == ["run.json"]


@pytest.mark.slow
def test_from_python_and_resumed(tmp_path, monkeypatch):
    recipe = toy.promot(tmp_path / "runs")
    toy.ScriptedEvaluate(monkeypatch, [float(i % 7) for i in range(200)])
    calls = []

    def stops_once(one, *args):
        calls.append((one.seed, one.model_dir))
        if len(calls) == 2:
            raise Stopped("Stopped at step 1.")
        return runner.run(one, *args)

    monkeypatch.setattr("robust_ft.seeds.run", stops_once)
    with pytest.raises(Stopped):
        run_seeds(recipe, 2)
    assert not (tmp_path / "runs" / "report.html").exists()
    found = run_seeds(recipe, 2)
    assert [seed for seed, _ in calls] == [0, 1, 0, 1] and len(found) == 2
    assert calls[-1][1] == f"{tmp_path}/runs/seed_1"
    assert (tmp_path / "runs" / "report.md").exists()
    with pytest.raises(UserError, match="at least 1"):
        run_seeds(dataclasses.replace(recipe, seed=1), 0)
