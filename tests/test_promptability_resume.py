"""Each arm of continued pretraining, killed and started again, ends bit by bit as one that was not.

The arms are the recipes themselves, with few steps, few held-out tasks, and with dropout.
"""

import json
import signal
import subprocess
import sys
import time

import pytest
import toy
from test_continued_pretraining import ARMS
from test_resume import TESTS, start

ARM = """
include 'gin_configs/{arm}.gin'
{deep}
DROPOUT_RATE = 0.1
MTL_TRAIN_STEPS = 6
MTL_CHECKPOINT_PERIOD = 2
META_TRAIN_STEPS = 6
META_CHECKPOINT_PERIOD = 2
mtl/Stage.log_period = 1
mtl/Schedule.warmup_steps = 1
meta/Schedule.warmup_steps = 1
HELD_OUT_TASKS = {{0: ['mini_p3_nli_claim', 'mini_p3_ending_plain', 'mini_p3_cause_when']}}
TEST_LIMIT = 32
FEW_SHOT_SEEDS = 2
FewShot.epochs = 6
FewShot.eval_period = 3
FewShot.side_by_side = 2
"""
DEEP = "include 'gin_configs/methods/deep_prompt.gin'"


def killed_in_few_shot(directory, config, lines):
    """Runs until few-shot evaluation has written so many lines, and kills it."""
    command = [sys.executable, str(TESTS / "killed_run.py"), "nowhere", "-", "0"]
    with subprocess.Popen(
        [*command, str(directory), str(config)], cwd=TESTS.parent, stdout=subprocess.DEVNULL
    ) as process:
        while process.poll() is None and written(directory) < lines:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "ended before it was killed"


def written(directory):
    files = (directory / "few_shot").glob("*.jsonl")
    return sum(file.read_text().count("\n") for file in files)


@pytest.mark.slow
@pytest.mark.parametrize(("arm", "deep"), [*((arm, False) for arm in ARMS), ("p3_reptile", True)])
def test_a_killed_arm_goes_on_exactly(arm, deep, tmp_path):
    config = tmp_path / "arm.gin"
    config.write_text(ARM.format(arm=arm, deep=DEEP if deep else ""))
    runs = whole, broken = tmp_path / "whole", tmp_path / "broken"
    if arm != "p3_none":
        killed = start("saving", "mtl", 4, broken, config)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    # Of 3 tasks at 0 shots and, for two seeds each, the last and the best epoch.
    killed_in_few_shot(broken, config, 5)
    for run in runs:
        ended = start("nowhere", "-", 0, run, config)
        assert ended.returncode == 0, ended.stderr
    if arm != "p3_none":
        toy.assert_same(toy.final(broken, "mtl"), toy.final(whole, "mtl"))
        lines = [toy.read_lines(run / "mtl" / "metrics.jsonl") for run in runs]
        assert lines[0] == lines[1] and len([x for x in lines[0] if "loss" in x]) == 6
    files = sorted(path.name for path in (whole / "few_shot").iterdir())
    assert files == sorted(path.name for path in (broken / "few_shot").iterdir())
    for name in [*(f"few_shot/{file}" for file in files), "summary.json"]:
        assert (whole / name).read_text() == (broken / name).read_text(), name
    rows = json.loads((whole / "summary.json").read_text())
    assert {row["shots"] for row in rows if row["stage"] == "few_shot"} == {0, 16}
    assert written(whole) == 15
