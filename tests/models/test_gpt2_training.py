"""A decoder-only model through a whole run: data, loss, soft prompt, decoding, evaluation."""

import logging
from pathlib import Path

import numpy as np
import pytest
import toy
from safetensors.numpy import save_file

from robust_ft import runner, stage_start
from robust_ft.decoding import Decoder
from robust_ft.models.gpt2 import GPT2Config
from robust_ft.models.model import Model
from robust_ft.models.peft import Prompt
from robust_ft.optim import AdamW, Schedule
from robust_ft.predictor import Predictor
from robust_ft.recipe import Recipe

PROMPT = "decoder/prompt"
# Bytes, and two tokens that are added to them: ids 259 and 260.
CONFIG = GPT2Config(
    vocab_size=261,
    emb_dim=24,
    num_heads=3,
    mlp_dim=32,
    num_layers=1,
    num_positions=24,
    dropout_rate=0.1,
    attention_dropout_rate=0.1,
)
SEPARATOR = 260
MODEL = Model(CONFIG, (Prompt(length=3),), separator_id=SEPARATOR)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Trains all of the model on a third of 'b' and two thirds of 'a', then a prompt."""
    folder = tmp_path_factory.mktemp("gpt2")
    settings = {"model": MODEL, "optimizer": AdamW(Schedule(0.01)), "batch_size": 8}
    settings |= {"evaluations": toy.evaluations("validation", held_out=False)}
    settings |= {"final_evaluations": toy.evaluations("test", held_out=False)}
    stages = (
        toy.stage("model", trainable=[".*"], steps=60, eval_period=30, **settings),
        toy.stage(
            "prompt",
            restore="stage:model",
            trainable=[PROMPT],
            steps=6,
            eval_period=6,
            **settings,
        ),
    )
    ran = Recipe("toy_gpt2", str(folder), stages)
    return ran, runner.run(ran)


def losses(directory, stage):
    lines = toy.read_lines(directory / stage / "metrics.jsonl")
    return [line["loss"] for line in lines if line["split"] == "train" and "loss" in line]


@pytest.mark.slow
def test_the_loss_falls_to_what_the_targets_leave_unknown(run):
    ran, summary = run
    found = losses(Path(ran.model_dir), "model")
    assert found[0] > 5 and np.mean(found[-5:]) < 0.5
    final = [r.value for r in summary.rows if r.stage == "model" and r.split == "test"]
    assert max(final) > 70  # always "a"


@pytest.mark.slow
def test_only_the_prompt_trains_in_its_stage(run):
    ran, _ = run
    before, after = (toy.flat(stage_start.finished(ran, name)) for name in ("model", "prompt"))
    changed = [path for path in before if not np.array_equal(before[path], after[path])]
    assert changed == [PROMPT]


@pytest.mark.slow
def test_the_predictor_gives_targets(run):
    ran, _ = run
    predictor = Predictor(MODEL, stage_start.finished(ran, "prompt"), toy.DATA.vocabulary)
    texts = [f"is {i} odd" for i in range(6)]
    outputs = predictor.predict(texts, Decoder(max_decode_len=3), inputs_length=12, batch_size=4)
    assert set(outputs) <= {"a", "b"}
    # However the inputs are padded and put into batches.
    again = predictor.predict(texts, Decoder(max_decode_len=3), inputs_length=15, batch_size=6)
    assert outputs == again


@pytest.mark.slow
def test_a_checkpoint_without_the_added_tokens_is_restored(run, tmp_path, caplog):
    ran, _ = run
    params = toy.flat(stage_start.finished(ran, "model"))
    old = {path: value for path, value in params.items() if path != PROMPT}
    old["token_embedder/embedding"] = params["token_embedder/embedding"][:259]
    file = tmp_path / "old.safetensors"
    save_file(old, file)
    stage = toy.stage(model=MODEL, restore=str(file), trainable=[".*"])
    with caplog.at_level(logging.WARNING):
        restored = toy.flat(stage_start.restore(Recipe("r", str(tmp_path), (stage,)), stage))
    assert "has 259 of the model's 261 tokens; the other 2 start as their mean" in caplog.text
    table = restored.pop("token_embedder/embedding")
    np.testing.assert_array_equal(table[:259], old.pop("token_embedder/embedding"))
    np.testing.assert_allclose(table[259:], [table[:259].mean(0)] * 2, atol=1e-6)
    toy.assert_same({path: restored[path] for path in old}, old)
