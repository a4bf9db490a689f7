"""Comparisons on the mini world with rates that sweeps chose: which commands, in which order."""

import sys
import types
from pathlib import Path

import pytest

from robust_ft.errors import UserError
from robust_ft.sweep_file import Sweep, Tried

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import mini_world
import runs


@pytest.fixture
def commands(monkeypatch):
    """The commands that were given; each one's sweep chooses a rate of its own."""
    given = []

    def fake(command, **_):
        given.append(command)
        flags = dict(flag.removeprefix("--").split("=", 1) for flag in command if "=" in flag)
        folder = Path(flags["gin.MODEL_DIR"].strip("'"))
        if "prefix" in folder.name:
            return types.SimpleNamespace(returncode=2)
        folder.mkdir()
        name = "PROMPT_RATE" if "prompt" in folder.name else "RATE"
        tried = (Tried({name: len(given)}, "a", {0: 1.0}),)
        Sweep("recipe", "model", ("data validation",), (0,), tried).write(folder)
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(runs.subprocess, "run", fake)
    return given


def test_what_arms_share_is_chosen_first(tmp_path, commands, monkeypatch):
    reported = []
    monkeypatch.setattr(mini_world.report, "write_report", lambda *args: reported.append(args))
    flags = ["promot", "--seeds=2", "--sweep", f"--output={tmp_path}", "--jobs=1"]
    monkeypatch.setattr(sys, "argv", ["mini_world.py", *flags])
    assert mini_world.main() == 0
    first, *others = commands
    assert "--gin_file=gin_configs/prompt_rte.gin" in first and "robust_ft.sweep" in first
    assert len(others) == 4 and all("--seeds=2" in command for command in commands)
    of_promot = next(c for c in others if "--gin_file=gin_configs/promot_rte.gin" in c)
    assert "--gin.PROMPT_RATE=1" in of_promot
    assert not any("PROMPT_RATE" in flag for c in others if c is not of_promot for flag in c)
    names = mini_world.COMPARISONS["promot"]
    assert reported == [([tmp_path / f"{name}_sweep" for name in names], tmp_path)]
    # All runs of an arm have what was chosen for it.
    chosen = dict(runs.Runner(tmp_path).chosen(runs.arm("promot_rte")))
    assert chosen["PROMPT_RATE"] == 1 and chosen["RATE"] > 1
    assert runs.Runner(tmp_path).chosen(runs.arm("p3_none")) == ()


def test_a_sweep_that_fails(tmp_path, commands, capsys):
    runner = runs.Runner(tmp_path)
    with pytest.raises(UserError, match="1 of 2 sweeps failed; the same command goes on"):
        runner.sweep_all([runs.arm("full_webnlg"), runs.arm("prefix_webnlg")], 1, 1)
    assert "prefix_webnlg: failed, see" in capsys.readouterr().out
