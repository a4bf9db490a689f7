"""The command line of sweeps: grids, their defaults, and one sentence for every mistake."""

import types
from pathlib import Path

import pytest
from test_command_line import TOY, assert_one_sentence, run

from robust_ft import claiming, command_line, sweep, sweeps
from robust_ft.trainer import Stopped

GRIDS = {
    "LEARNING_RATE=3e-4,1e-3": {"LEARNING_RATE": [3e-4, 1e-3]},
    "prompt/Schedule.peak=0.3, 1": {"prompt/Schedule.peak": [0.3, 1]},
    "TRAINABLE=['a,b'],['c']": {"TRAINABLE": [["a,b"], ["c"]]},
    "OPTIMIZER=@a/AdamW(),@Adafactor()": {"OPTIMIZER": ["@a/AdamW()", "@Adafactor()"]},
    "TASK=rte,'a,b',None,True": {"TASK": ["rte", "a,b", None, True]},
    "S=(1, 2),(3, 4)": {"S": [[1, 2], [3, 4]]},
}


@pytest.mark.parametrize(("flag", "grid"), GRIDS.items(), ids=GRIDS)
def test_values_are_read_as_gin_reads_them(flag, grid):
    assert sweep.parse_grid([flag]) == grid


def test_several_flags():
    assert sweep.parse_grid(["A=1,2", "B=3,4"]) == {"A": [1, 2], "B": [3, 4]}
    assert sweep.parse_grid([]) == {}


MISTAKES = {
    "no values": (("--grid=LEARNING_RATE",), "write --grid=NAME=VALUE,VALUE"),
    "an empty value": (("--grid=LEARNING_RATE=1e-3,,1",), "has an empty value"),
    "a name twice": (("--grid=A=1,2", "--grid=A=3,4"), "names A twice"),
    "MODEL_DIR": (("--grid=MODEL_DIR=/a,/b",), "runs of a sweep have folders"),
    "RANDOM_SEED": (("--grid=RANDOM_SEED=0,1",), "see --seeds"),
    "one value": (("--grid=LEARNING_RATE=1e-3",), "one value of LEARNING_RATE, 0.001"),
    "misspelt": (("--grid=LEARNING_RTE=1,2",), "'LEARNING_RTE'", "mean 'LEARNING_RATE'"),
    "no number": (("--grid=LEARNING_RATE=1e-3,fast",), "Schedule.peak='fast' must be a number"),
    "below 0": (("--grid=LEARNING_RATE=1e-3,-1",), "Schedule.peak=-1"),
    "of another stage": (
        ("--grid=LIGHT_LEARNING_RATE=1e-3,1e-2",),
        "make the same run, as nothing that 'model' of toy_promot depends on changes",
    ),
    "by": (("--by=modle",), "by 'modle'", "mean 'model'"),
    "seeds": (("--grid=LEARNING_RATE=1e-3,1e-2", "--seeds=0"), "at least 1"),
    "other macros": (
        ("--grid=LEARNING_RATE=1e-3,1e-2", "--seeds=2", "--gin.Recipe.seed=5"),
        "A sweep sets RANDOM_SEED and MODEL_DIR",
    ),
    "no rate": (("--gin.OPTIMIZER=@AdamW()", "--gin.Schedule.peak=0.0"), "say what to try with"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake, tmp_path, capsys):
    flags, *parts = MISTAKES[mistake]
    folder = f"--gin.MODEL_DIR={tmp_path / 'sweep'}"
    assert run(TOY, folder, *flags, main=sweep.main) == command_line.USER_ERROR
    assert_one_sentence(capsys.readouterr().err, *parts)
    assert not list(tmp_path.iterdir())


def grid_of(*flags):
    """Returns the grid that a recipe has without --grid."""
    arguments = command_line.parse("sweep", "", flags)
    return sweep.rates(arguments, command_line.load_config(arguments))


def test_by_default_the_rates_of_what_is_chosen_by_are_tried(tmp_path, capsys):
    # Of ProMoT's two stages the last, as of full finetuning's one.
    assert grid_of(TOY) == {"LEARNING_RATE": [0.009, 0.03, 0.09]}
    assert grid_of(TOY, "--by=prompt") == {"PROMPT_LEARNING_RATE": [0.09, 0.3, 0.9]}
    assert grid_of(TOY, "--gin.Schedule.peak=1e-5") == {"Schedule.peak": [3e-6, 1e-5, 3e-5]}
    folder = tmp_path / "sweep"
    assert run(TOY, f"--gin.MODEL_DIR={folder}", "--seeds=2", "--dry_run", main=sweep.main) == 0
    shown = capsys.readouterr().out
    for part in ("0.009, 0.03, 0.09", "6, 2 seeds each", "validation of 'model': toy validation"):
        assert part in shown
    assert f"{folder}/LEARNING_RATE_0.09/seed_1" in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("recipe", "grid"),
    [
        ("full_rte", {"LEARNING_RATE": [3e-4, 1e-3, 3e-3]}),
        ("adapters_webnlg", {"LIGHT_LEARNING_RATE": [1.5e-3, 5e-3, 1.5e-2]}),
    ],
)
def test_grids_of_recipes(recipe, grid):
    rates = {name: str(values[1]) for name, values in grid.items()}
    flags = [f"--gin.{name}={rate}" for name, rate in rates.items()]
    assert grid_of(f"--gin_file=gin_configs/{recipe}.gin", *flags) == grid


def test_runs_are_validated_with_their_configs_beside_them(tmp_path, capsys, monkeypatch):
    validated = []

    def scored(recipe, by, callbacks):
        validated.append(recipe.stage(by).optimizer.learning_rate.peak)
        if len(validated) == 2:
            raise Stopped("Stopped at step 1.")
        return 100 * validated[-1]

    def claim(recipe):
        Path(recipe.model_dir).mkdir(parents=True, exist_ok=True)
        return True

    monkeypatch.setattr(sweeps, "gc", types.SimpleNamespace(collect=lambda: None))  # is slow
    monkeypatch.setattr(claiming, "claim", claim)
    monkeypatch.setattr(sweeps, "validate", scored)
    monkeypatch.setattr(sweeps, "run_claimed", lambda *_: None)
    monkeypatch.setattr(sweeps.report, "write_report", lambda *_: None)
    flags = (TOY, f"--gin.MODEL_DIR={tmp_path}", "--grid=LEARNING_RATE=0.01,0.02")
    assert run(*flags, main=sweep.main) == command_line.RESUME
    assert "Run the same command to resume." in capsys.readouterr().out
    monkeypatch.setattr(sweeps.report, "write_report", lambda *_: sweeps.report.Report("r", "r"))
    assert run(*flags, main=sweep.main) == 0
    assert validated == [0.01, 0.02, 0.02]
    config = (tmp_path / "LEARNING_RATE_0.02" / "seed_0" / "config.gin").read_text()
    assert "LEARNING_RATE = 0.02" in config and "LEARNING_RATE_0.02/seed_0'" in config
    shown = capsys.readouterr().out
    assert "LEARNING_RATE 0.02 is chosen, with 2.0" in shown and "extend the grid" in shown
