"""A run that is killed and started again ends bit by bit where an uninterrupted one ends."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import toy

from robust_ft import train
from robust_ft.command_line import RESUME
from robust_ft.errors import INTERRUPTED, UserError

TESTS = Path(__file__).parent
# One after the other, on one run.
INTERRUPTIONS = [
    ("step", "prompt", 1),  # before the first checkpoint
    ("saving", "prompt", 2),  # its folder is there, but not complete
    ("saved", "prompt", 4),
    ("evaluated", "prompt", 0),  # all done but the note that it is done
    ("step", "model", 3),
    ("saving", "model", 8),
    ("interrupted_twice", "model", 9),  # before it is saved
    ("interrupted", "model", 10),
    ("terminated", "model", 11),
    ("saved", "model", 12),
    ("interrupted_outside", "model", 0),
]
FEW = [each for each in INTERRUPTIONS if each[:2] == ("saved", "prompt")]
STATUS = {
    "terminated": RESUME,
    "interrupted": RESUME,
    "interrupted_twice": INTERRUPTED,
    "interrupted_outside": INTERRUPTED,
}


def start(where, stage, step, directory, config="toy_promot.gin"):
    command = [sys.executable, str(TESTS / "killed_run.py"), where, stage, str(step)]
    command += [str(directory), str(TESTS / config)]
    return subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent, check=False)


def assert_refused(directory):
    """Asserts that a run that was killed does not go on with another learning rate."""
    before = {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    flags = [f"--gin_file={TESTS / 'toy_promot.gin'}", f"--gin.MODEL_DIR={directory}"]
    with pytest.raises(UserError, match=r"holds an unfinished run, .*, now 0\.5; .*--allow_change"):
        train.main([*flags, "--gin.LEARNING_RATE=0.5"])
    assert before == {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(FEW, id="few"),
        pytest.param(INTERRUPTIONS, id="everywhere", marks=pytest.mark.slow),
    ],
)
def runs(tmp_path_factory, request):
    """The folders of an uninterrupted run and of one that was interrupted."""
    folder = tmp_path_factory.mktemp("resume")
    whole = start("nowhere", "-", 0, folder / "whole")
    assert whole.returncode == 0, whole.stderr
    broken = folder / "broken"
    for where, stage, step in request.param:
        ended = start(where, stage, step, broken)
        wanted = STATUS.get(where, -signal.SIGKILL)
        assert ended.returncode == wanted, (where, stage, step, ended.stdout, ended.stderr)
        if where.startswith("interrupted"):
            assert "Traceback" not in ended.stdout + ended.stderr
            last = (ended.stderr if wanted == INTERRUPTED else ended.stdout).splitlines()[-1]
            again = "Run the same command" if wanted == RESUME else "the same command goes on"
            assert again in last
        if (where, stage) == ("saved", "prompt"):
            assert_refused(broken)
        if where == "saving":
            assert not (broken / stage / f"checkpoint_{step}").exists(), "killed too late"
    last = start("nowhere", "-", 0, broken)
    assert last.returncode == 0, last.stderr
    return folder / "whole", broken


@pytest.mark.parametrize("stage", ["prompt", "model"])
def test_parameters_and_selected_steps(runs, stage):
    whole, broken = runs
    assert (broken / stage / "outcome.json").read_text() == (
        whole / stage / "outcome.json"
    ).read_text()
    toy.assert_same(toy.final(broken, stage), toy.final(whole, stage))
    steps = [sorted(p.name for p in (run / stage).glob("checkpoint_*")) for run in runs]
    assert steps[0] == steps[1]


def test_the_run_is_worth_comparing(runs):
    rows = json.loads((runs[0] / "summary.json").read_text())
    target = [r for r in rows if r["stage"] == "model" and r["task"] == "toy"]
    accuracy = {
        r["step"]: r["value"]
        for r in target
        if r["split"] == "validation" and r["metric"] == "accuracy"
    }
    assert accuracy[0] == 0 < max(accuracy.values())
    losses = [x["loss"] for x in toy.read_lines(runs[0] / "model" / "metrics.jsonl") if "loss" in x]
    assert len(losses) == 12 and losses[-1] < losses[0] / 2


def test_results_and_predictions(runs):
    files = [
        sorted(
            str(path.relative_to(run))
            for path in run.rglob("*")
            if path.suffix in (".json", ".jsonl", ".gin", ".md", ".txt")
            and not any(part.startswith("checkpoint_") for part in path.parts)
        )
        for run in runs
    ]
    assert files[0] == files[1] and len(files[0]) > 20
    for name in files[0]:
        texts = [(run / name).read_text() for run in runs]
        if name.endswith("metrics.jsonl"):
            # Final evaluations that were cut short are there twice.
            texts = [list(dict.fromkeys(text.splitlines())) for text in texts]
        elif name == "config.gin" or name.endswith("robust_ft_adapter.json"):
            texts = [text.replace(str(run), "") for text, run in zip(texts, runs, strict=True)]
        assert texts[0] == texts[1], name


def test_a_finished_run_only_reports_again(runs):
    whole, _ = runs
    checkpoints = {p: p.stat().st_mtime_ns for p in whole.rglob("checkpoint_*")}
    summary = (whole / "summary.json").read_text()
    os.remove(whole / "report.html")
    again = start("nowhere", "-", 0, whole)
    assert again.returncode == 0, again.stderr
    assert "step 2 was selected" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("checkpoint_*")} == checkpoints
    assert (whole / "summary.json").read_text() == summary
    assert (whole / "report.html").exists()


def test_a_finished_run_refuses_another_setting(runs):
    whole, _ = runs
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    flags = [f"--gin_file={TESTS / 'toy_promot.gin'}", f"--gin.MODEL_DIR={whole}"]
    with pytest.raises(UserError, match=r"\(Schedule\.peak\) is .*, now 0\.5.*LEARNING_RATE"):
        train.main([*flags, "--gin.LEARNING_RATE=0.5"])
    assert train.main([*flags, "--gin.Stage.log_period=7"]) == 0
    after = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    assert {p for p in after if before.get(p) != after[p]} <= {
        whole / name for name in ("report.html", "report.png", "report.md")
    }


@pytest.mark.slow
def test_a_student_learns_on_from_its_teacher(tmp_path):
    for run, where in (("whole", "nowhere"), ("broken", "step"), ("broken", "nowhere")):
        ended = start(where, "cocktail", 3, tmp_path / run, "toy_cocktail.gin")
        assert ended.returncode == (0 if where == "nowhere" else -signal.SIGKILL), ended.stderr
    whole, broken = (toy.final(tmp_path / run, "cocktail") for run in ("whole", "broken"))
    toy.assert_same(broken, whole)
    lines = [
        toy.read_lines(tmp_path / run / "cocktail" / "metrics.jsonl") for run in ("whole", "broken")
    ]
    assert lines[0] == lines[1] and sum("kl" in line for line in lines[0]) == 6
