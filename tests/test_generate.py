"""What a model writes before it is finetuned: sampled with a seed, and read by a task in files."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import toy
from tiny_models import random_params

from robust_ft import generate, loading
from robust_ft.decoding import Decoder
from robust_ft.decoding.types import Decoded
from robust_ft.errors import UserError
from robust_ft.predictor import Predictor

INPUTS = ["is 1 odd", "count 2", "is 3 odd"]
EOS = toy.DATA.vocabulary.eos_id


@pytest.fixture
def written(monkeypatch):
    """Replaces decoding: outputs are a word for each row, of which every third does not end."""
    calls = []

    def scripted(self, batch, decoder, rng):
        rows = len(batch["encoder_input_tokens"])
        tokens = np.zeros((rows, 1, decoder.max_decode_len), np.int32)
        for row in range(rows):
            ids = toy.DATA.vocabulary.encode(f"w{len(calls)}{row}")
            tokens[row, 0, :3] = ids
            tokens[row, 0, 3:] = ids[0] if row % 3 == 2 else EOS
        calls.append((decoder, rng))
        return Decoded(jnp.asarray(tokens), jnp.zeros((rows, 1)))

    predictor = Predictor(toy.PLAIN, random_params(toy.PLAIN), toy.DATA.vocabulary)
    monkeypatch.setattr(Predictor, "generate", scripted)
    monkeypatch.setattr(loading, "load", lambda directory: predictor)
    return calls


def start(folder, *flags):
    """Runs the command and returns the rows that it wrote."""
    output = folder / "replay.jsonl"
    flags = ["--model=toy", f"--output={output}", "--inputs_length=12", "--batch_size=4", *flags]
    assert generate.main(flags) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_outputs_that_end_are_written_beside_their_inputs(written, tmp_path, suffix):
    prompts = tmp_path / f"prompts{suffix}"
    rows = [json.dumps({"inputs": text}) for text in INPUTS] if suffix == ".jsonl" else INPUTS
    prompts.write_text("\n".join(rows) + "\n")
    found = start(tmp_path, f"--prompts={prompts}", "--examples=5", "--temperature=0.7")
    assert found == [
        {"inputs": INPUTS[0], "targets": "w00"},
        {"inputs": INPUTS[1], "targets": "w01"},
        # Row 2 did not end; inputs come again, in the next batch too.
        {"inputs": INPUTS[0], "targets": "w03"},
        {"inputs": INPUTS[1], "targets": "w10"},
    ]
    assert [decoder.temperature for decoder, _ in written] == [0.7, 0.7]


def test_mistakes_are_one_sentence(written, tmp_path):
    for flags, message in [
        ([], "An encoder-decoder needs inputs: name a task"),
        (["--prompts=nowhere.txt"], "--prompts=nowhere.txt is no text file"),
        (["--temperature=0"], "--temperature=0 must be above 0"),
        (["--examples=0"], "must be at least 1"),
    ]:
        with pytest.raises(UserError, match=message):
            start(tmp_path, *flags)
    assert not (tmp_path / "replay.jsonl").exists()


def test_what_is_there_stays(written, tmp_path):
    there = tmp_path / "there.jsonl"
    there.write_text("mine")
    with pytest.raises(UserError, match="is there already; give another --output, or --overwrite"):
        generate.main(["--model=asset:mini", f"--output={there}"])
    assert there.read_text() == "mine" and not written


@pytest.mark.slow
def test_samples_are_a_function_of_the_seed():
    predictor = Predictor(toy.PLAIN, random_params(toy.PLAIN), toy.DATA.vocabulary)
    decoder = Decoder(max_decode_len=200, temperature=1.0)
    one, again, other = (
        generate.sampled(predictor, INPUTS * 2, decoder, seed, 4, 12) for seed in (1, 1, 2)
    )
    assert one == again != other and any(one)
    assert one[0] != one[3], "the same input is sampled anew"
