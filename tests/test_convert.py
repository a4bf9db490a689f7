"""The command line `robust_ft.convert`: outputs, stages, types, and mistakes."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoints import edit_json, random_checkpoint, same_tensors, truncate
from safetensors.numpy import load_file

from robust_ft import command_line
from robust_ft.checkpoints_io import hf, native, sources
from robust_ft.convert import main
from robust_ft.outcome import Outcome
from robust_ft.stage_checkpoints import StageCheckpoints
from robust_ft.train_step import TrainState
from robust_ft.trainable import unflatten

TRAINED = ("decoder/decoder_norm/scale", "token_embedder/embedding")


def run(*arguments):
    """Runs the command line and returns its exit status."""
    with pytest.raises(SystemExit) as caught:
        command_line.run(main, [str(argument) for argument in arguments])
    return caught.value.code


@pytest.fixture
def model(tmp_path):
    """A Hugging Face directory."""
    (tmp_path / "model").mkdir()
    hf.write(random_checkpoint(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def stage(tmp_path):
    """A finished stage that trained two parameters."""
    folder = tmp_path / "run" / "stage"
    folder.mkdir(parents=True)
    trained = random_checkpoint(1).load()
    params = unflatten({path: jnp.asarray(trained[path]) for path in TRAINED})
    checkpoints = StageCheckpoints(folder)
    checkpoints.save(TrainState(jnp.asarray(3), params, {}), {}, None)
    checkpoints.close()
    Outcome(3, None, TRAINED).write(folder)
    return folder


def test_there_and_back(model, tmp_path, capsys):
    assert run(f"--input={model}", f"--output={tmp_path / 'ours'}", "--from=hf") == 0
    out = capsys.readouterr().out
    assert "parameters" in out and "t5" in out and str(tmp_path / "ours") in out
    ours = tmp_path / "ours"
    assert run("--to=hf", f"--input={ours}", f"--output={tmp_path / 'back'}") == 0
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / file).read_bytes() == (model / file).read_bytes()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("to", ["hf", "t5x", "robust_ft"])
def test_types(model, tmp_path, to):
    flags = [f"--input={model}", f"--output={tmp_path / 'out'}", f"--to={to}"]
    assert run(*flags, "--dtype=bfloat16") == 0
    found = sources.read(str(tmp_path / "out"), None, {"relative_max_distance": 20})
    assert same_tensors(found, random_checkpoint().cast("bfloat16"))
    assert found.config.param_dtype == "bfloat16"


def test_the_type_of_a_config_follows(model, tmp_path):
    edit_json(model / "config.json", torch_dtype="float32")
    run(f"--input={model}", f"--output={tmp_path / 'o'}", "--dtype=float16")
    run(f"--input={tmp_path / 'o'}", f"--output={tmp_path / 'back'}", "--to=hf")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "float16"


def test_a_stage_on_its_base(model, stage, tmp_path):
    flags = [f"--input={stage}", f"--output={tmp_path / 'out'}", "--to=hf", f"--base={model}"]
    assert run(*flags) == 0
    before, trained = random_checkpoint().tensors, random_checkpoint(1).tensors
    expected = dict(before) | {path: trained[path] for path in TRAINED}
    assert same_tensors(hf.read(str(tmp_path / "out")).tensors, expected)
    assert (tmp_path / "out" / "config.json").read_bytes() == (model / "config.json").read_bytes()


def test_a_stage_into_one_file(stage, tmp_path):
    flags = [f"--input={stage}", f"--output={tmp_path / 'x' / 'out.safetensors'}"]
    assert run(*flags, "--from=robust_ft", "--dtype=float16") == 0
    found = load_file(tmp_path / "x" / "out.safetensors")
    assert set(found) == set(TRAINED)
    expected = random_checkpoint(1).cast("float16").load()
    np.testing.assert_array_equal(found[TRAINED[1]], expected[TRAINED[1]])


def test_a_model_into_one_file(model, tmp_path):
    assert run(f"--input={model}", f"--output={tmp_path / 'out.safetensors'}") == 0
    assert same_tensors(sources.weights(str(tmp_path / "out.safetensors")), random_checkpoint())


# --- Outputs


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_an_output_that_is_there_stays(model, tmp_path, capsys, name):
    output = tmp_path / name
    if name == "out":
        output.mkdir()
        (output / "mine").write_text("mine")
    else:
        output.write_text("mine")
    assert run(f"--input={model}", f"--output={output}") == command_line.USER_ERROR
    error = capsys.readouterr().err
    assert f"'{output}' is there already" in error and "--overwrite" in error
    assert (output / "mine" if name == "out" else output).read_text() == "mine"
    assert run(f"--input={model}", f"--output={output}", "--overwrite") == 0
    assert not (output / "mine").exists()
    assert same_tensors(sources.weights(str(output)), random_checkpoint())
    assert not list(tmp_path.glob(".*"))


def test_an_empty_folder_may_be_written(model, tmp_path):
    (tmp_path / "out").mkdir()
    assert run(f"--input={model}", f"--output={tmp_path / 'out'}") == 0


@pytest.mark.parametrize("to", ["hf", "t5x", "robust_ft"])
def test_a_conversion_that_fails_leaves_the_good_output(model, tmp_path, monkeypatch, capsys, to):
    """The disk fills up in the middle."""
    output = tmp_path / "out"
    run(f"--input={model}", f"--output={output}", f"--to={to}")
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}

    def full():
        raise OSError(28, "No space left on device")

    def read(folder):
        tensors = original(folder)
        name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
        return tensors | {name: native.dataclasses.replace(tensors[name], read=full)}

    original = hf.read_weights
    monkeypatch.setattr(hf, "read_weights", read)
    flags = [f"--input={model}", f"--output={output}", f"--to={to}", "--overwrite"]
    assert run(*flags) == command_line.USER_ERROR
    assert "cannot be written: No space left" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file()} == before
    assert not list(tmp_path.glob(".*"))


def test_an_output_below_a_file(model, tmp_path, capsys):
    assert run(f"--input={model}", f"--output={model / 'config.json' / 'x'}") == 2
    assert "cannot be written" in capsys.readouterr().err


# --- Mistakes


def test_both_lists_are_printed(model, tmp_path, capsys):
    edit_json(model / "config.json", num_layers=1, num_decoder_layers=3)
    assert run(f"--input={model}", f"--output={tmp_path / 'out'}") == command_line.USER_ERROR
    sentence, unplaced, missing = capsys.readouterr().err.strip().split("\n")
    assert sentence.startswith(f"Error: '{model}' does not fit the model: 9 tensors")
    assert unplaced.count("encoder.block.1.layer") == 9
    assert missing.count("decoder.block.2.layer") == 14
    assert not (tmp_path / "out").exists()


def test_a_truncated_file(model, tmp_path, capsys):
    truncate(model / "model.safetensors")
    assert run(f"--input={model}", f"--output={tmp_path / 'out'}") == command_line.USER_ERROR
    error = capsys.readouterr().err
    assert "model.safetensors' is truncated" in error and "tensor '" in error
    assert "Traceback" not in error and not (tmp_path / "out").exists()


def test_a_stage_needs_a_base(stage, tmp_path, capsys):
    assert run(f"--input={stage}", f"--output={tmp_path / 'out'}", "--to=hf") == 2
    assert "give --base=DIR" in capsys.readouterr().err


def test_a_base_of_another_model(stage, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    hf.write(random_checkpoint(emb_dim=8), tmp_path / "other")
    flags = [f"--input={stage}", f"--output={tmp_path / 'out'}", f"--base={tmp_path / 'other'}"]
    assert run(*flags) == command_line.USER_ERROR
    assert "decoder/decoder_norm/scale" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--config=emb_dims=3"],
            "no such token id. Did you mean 'emb_dim'",
        ),
        (["--config=emb_dim"], "has no value"),
        (["--from=t5x"], "is no t5x checkpoint"),
        (["--from=robust_ft"], "it has no robust_ft.json"),
        (["--from=flax"], "invalid choice: 'flax'"),
        (["--outptu=x"], "There is no flag '--outptu'. Did you mean '--output'"),
    ],
)
def test_flags_that_do_not_fit(model, tmp_path, capsys, flags, message):
    assert run(f"--input={model}", f"--output={tmp_path / 'out'}", *flags) == 2
    assert message in capsys.readouterr().err


def test_nothing_there(tmp_path, capsys):
    missing = tmp_path / "missing"
    assert run(f"--input={missing}", f"--output={tmp_path / 'out'}") == command_line.USER_ERROR
    assert f"There is no directory '{missing}'" in capsys.readouterr().err
    assert run(f"--input={missing}", f"--output={tmp_path / 'x.safetensors'}") == 2
    assert f"no checkpoint at '{missing}'" in capsys.readouterr().err
