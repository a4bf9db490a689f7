"""The main recipe on SuperGLUE's official files: nothing in its path knows of the mini world."""

import json
import os

import pytest

from robust_ft import train

pytestmark = pytest.mark.skipif(
    "ROBUST_FT_DATA_DIR" not in os.environ, reason="needs the official files: ROBUST_FT_DATA_DIR"
)


@pytest.mark.slow
def test_promot_on_rte_with_cb_held_out_over_bytes(tmp_path):
    lengths = "{'inputs': 96, 'targets': 8}"
    status = train.main(
        [
            "--gin_file=gin_configs/promot_rte.gin",
            "--gin_file=gin_configs/models/mini_byt5.gin",
            "--gin_file=gin_configs/data/rte.gin",
            f"--gin.MODEL_DIR={tmp_path / 'run'}",
            f"--gin.TASK_FEATURE_LENGTHS={lengths}",
            f"--gin.HELD_OUT_FEATURE_LENGTHS={lengths}",
            "--gin.HELD_OUT_TASKS={0: ['cb']}",
            "--gin.PROMPT_TRAIN_STEPS=3",
            "--gin.PROMPT_EVAL_PERIOD=3",
            "--gin.TRAIN_STEPS=3",
            "--gin.EVAL_PERIOD=3",
            "--gin.BATCH_SIZE=4",
            "--gin.EVAL_LIMIT=4",
            "--gin.TEST_LIMIT=4",
            "--gin.EVAL_BATCH_SIZE=4",
            "--gin.MAX_DECODE_LENGTH=8",
            "--gin.held_out/Decoder.max_decode_len=8",
        ]
    )
    assert status == 0
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())
    found = {(row["stage"], row["task"], row["metric"]) for row in rows if row["step"] == 3}
    for stage in ("prompt", "model"):
        assert {(stage, "rte", "accuracy"), (stage, "cb", "accuracy")} <= found
    predictions = tmp_path / "run" / "model" / "inference_eval" / "cb-reported-000003.jsonl"
    first = json.loads(predictions.read_text().splitlines()[0])
    assert first["input"].endswith("Is it true or false or neither? answer:")
    assert first["target"] in ("True", "False", "Neither")
    assert (tmp_path / "run" / "report.html").exists()
