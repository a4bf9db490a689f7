"""The first batch is shown as the model is given it, and what counts for the loss is marked."""

import dataclasses
import re

import numpy as np
import pytest
import toy

from robust_ft import first_batch
from robust_ft.data.rendering import batch_lines
from robust_ft.decoder_start import DecoderStart
from robust_ft.models.gpt2 import GPT2Config
from robust_ft.models.model import Model
from robust_ft.objectives.meta_learning import Fomaml
from robust_ft.recipe import Recipe
from robust_ft.stage_start import restore
from robust_ft.stage_step import train_batches
from robust_ft.trainer import fit

GPT2 = Model(
    GPT2Config(vocab_size=264, emb_dim=16, num_heads=2, mlp_dim=16, num_layers=1, num_positions=64)
)
LONG = dataclasses.replace(toy.DATA, inputs_length=40, targets_length=12)
STAGES = {
    "prompt": toy.prompt_stage(),
    "packed": toy.stage(model=toy.PLAIN, trainable=[".*"], packing=True, microbatches=1, data=LONG),
    "decoder-only": toy.stage(model=GPT2, trainable=[".*"]),
    "separator": toy.stage(model=dataclasses.replace(GPT2, separator_id=3), trainable=[".*"]),
    "packed decoder-only": toy.stage(
        model=GPT2, trainable=[".*"], packing=True, microbatches=1, data=LONG
    ),
    "by length": toy.stage(model=toy.PLAIN, trainable=[".*"], by_length=2),
}


def shown(stage, folder):
    batches = train_batches(stage, toy.shared(folder).partitioner, 0)
    batch = next(batches)
    first_batch.show(stage, batch, batches, folder)
    examples = batches.named(batches.examples)
    batches.close()
    return batch, examples, (folder / first_batch.FILE).read_text()


@pytest.mark.parametrize("name", STAGES)
def test_inputs_targets_and_what_counts(name, tmp_path, capsys):
    stage = STAGES[name]
    _, examples, text = shown(stage, tmp_path)
    numbers = [int(x) for x in re.findall(r"^row \d+: example (\d+) of 'toy'$", text, re.M)]
    assert len(numbers) == (4 if "packed" in name else 2)
    assert set(numbers) <= {position for _, position in examples}
    # The toy task asks whether its own number is odd: the example named is the one shown.
    assert [int(x) for x in re.findall(r"^    is (\d+) odd$", text, re.M)] == numbers
    assert re.findall(r"^    («.*)$", text, re.M) == [
        f"«{answer}»|«<1>»" for answer in re.findall(r"targets.*\n    ([ab])\n", text)
    ]
    assert text.count("targets (2 tokens, 2 count)") == len(numbers)
    assert ("a soft prompt, is put" in text) == (name == "prompt")
    printed = capsys.readouterr().out
    assert all(f"[{stage.name}] {line}" in printed for line in text.splitlines())


@pytest.mark.parametrize("inner_steps", [2, 0])
def test_of_a_meta_batch_support_and_query_of_two_tasks(inner_steps, tmp_path):
    stage = toy.stage(trainable=[".*"], gradient=Fomaml(3, inner_steps), microbatches=1)
    batch, examples, text = shown(stage, tmp_path)
    shape = [4, 3, inner_steps + 1]
    assert text.startswith(f"first batch [rows, tasks, batches, length]: inputs {[*shape, 12]}, ")
    kinds = [(0, "support batch 0"), (2, "query")] if inner_steps else [(0, "query")]
    positions = np.array([position for _, position in examples]).reshape(shape)
    rows = re.findall(r"^(task .*): example (\d+) of 'toy'\n.*\n    is (\d+) odd$", text, re.M)
    assert rows == [
        (f"task {task}, {kind}, row 0", *[str(positions[0, task, number])] * 2)
        for task in (0, 1)
        for number, kind in kinds
    ]
    assert batch["decoder_target_tokens"].shape == (*shape, 4)


def test_tokens_without_weight_are_not_marked_and_long_texts_are_cut():
    tokens = np.full((1, 400), 100, np.int32)
    weights = np.array([[0.0, 0.5, 1.0, 0.0]], np.float32)
    batch = {
        "encoder_input_tokens": tokens,
        "decoder_input_tokens": np.full((1, 4), 100, np.int32),
        "decoder_target_tokens": np.array([[100, 101, 102, 0]], np.int32),
        "decoder_loss_weights": weights,
    }
    vocabulary = toy.DATA.vocabulary
    lines = [x.text for x in batch_lines(batch, [("t", 7)], vocabulary, DecoderStart())]
    assert lines[0].endswith("of which 2 tokens count for the loss, marked «so»")
    assert "row 0: example 7 of 't'" in lines and "    a|«b»|«c»" in lines
    assert f"    {'a' * 300} ..." in lines
    assert max(map(len, lines)) < 400


def test_a_stage_shows_it_once(tmp_path, monkeypatch, capsys):
    toy.ScriptedEvaluate(monkeypatch)
    stage = toy.prompt_stage(steps=2, final_evaluations=())
    params = restore(Recipe("toy", str(tmp_path), (stage,)), stage)
    fit(stage, params, toy.shared(tmp_path))
    assert capsys.readouterr().out.count("first batch: ") == 1
    assert (tmp_path / "prompt" / first_batch.FILE).exists()
