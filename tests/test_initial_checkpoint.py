"""Sizes, ids and vocabulary come from the checkpoint; those that a config states are compared."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from random_checkpoints import edit_json, random_checkpoint
from safetensors.numpy import save_file
from tiny_families import CONFIGS, params_of
from tiny_vocabularies import write_bpe

import robust_ft
from robust_ft import checks, command_line, gin_config, initial_checkpoint, stage_start, train
from robust_ft.checkpoints_io import hf, native, t5x
from robust_ft.checkpoints_io.tensors import Checkpoint, Tensor
from robust_ft.errors import UserError
from robust_ft.models.model import Model
from robust_ft.recipe import Recipe
from robust_ft.restore import load_params
from robust_ft.trainable import flatten
from robust_ft.vocabulary import ByteVocabulary

RECIPE = "gin_configs/full_rte.gin"
IDS = {"pad": 0, "eos": 1, "start": 2}
# Nothing of these is a default.
SIZES = {
    "t5": {"mlp_activations": ("relu",), "relative_num_buckets": 8, "relative_max_distance": 20},
    "bart": {"activation": "relu", "scale_embedding": True, "num_positions": 96}
    | {"attention_dropout_rate": 0.3},
    "gpt2": {"activation": "relu", "num_positions": 96, "attention_dropout_rate": 0.3},
    "llama": {"rope_theta": 5000.0, "norm_epsilon": 1e-4, "qkv_bias": True, "max_length": 99},
}


def config_of(family):
    return dataclasses.replace(CONFIGS[family], vocab_size=264, **SIZES[family])


def write(folder, family="llama", kind="native", **changes):
    """Writes a random model over bytes; returns the folder's path."""
    config = dataclasses.replace(config_of(family), **changes)
    arrays = flatten(params_of(Model(config)))
    tensors = {path: Tensor.of(np.asarray(array), path) for path, array in arrays.items()}
    vocabulary = {"kind": "ByteVocabulary", "extra_ids": 5}
    made = Checkpoint(str(folder), family, config, tensors, IDS, vocabulary)
    folder.mkdir()
    if kind == "native":
        native.write(made, folder)
    else:
        hf.write(made, folder)
        if family == "llama":  # which transformers gives no tokenizer over bytes
            write_bpe(folder)
            return str(folder)
        edit_json(folder / "config.json", tokenizer_class="ByT5Tokenizer")
        (folder / "tokenizer_config.json").write_text('{"extra_ids": 5}')
    return str(folder)


def stage_of(path, *bindings, recipe=RECIPE):
    bindings = [f"INITIAL_CHECKPOINT_PATH={path}", *bindings]
    return gin_config.load([recipe], bindings).recipe.stages[0]


def check(path, *bindings, files=(RECIPE,)):
    checks.check(gin_config.load(files, [f"INITIAL_CHECKPOINT_PATH={path}", *bindings]).recipe)


def sizes_of(config):
    return {n: v for n, v in vars(config).items() if not initial_checkpoint.is_free(n)}


@pytest.mark.parametrize("kind", ["hf", "native"])
@pytest.mark.parametrize("family", CONFIGS)
def test_one_flag_is_enough(family, kind, tmp_path):
    path = write(tmp_path / "model", family, kind)
    loaded = robust_ft.load(path)
    stage = stage_of(path)
    assert type(stage.model.config) is type(CONFIGS[family])
    assert sizes_of(stage.model.config) == sizes_of(loaded.model.config)
    assert dataclasses.replace(stage.model, config=loaded.model.config) == loaded.model
    assert stage.data.vocabulary == loaded.vocabulary
    assert (kind, family) == ("hf", "llama") or loaded.vocabulary == ByteVocabulary(extra_ids=5)
    check(path)


@pytest.mark.parametrize("family", CONFIGS)
def test_how_a_model_is_computed_is_the_users(family, tmp_path):
    path = write(tmp_path / "model", family, "native", dropout_rate=0.4, remat="dots")
    config = stage_of(path).model.config
    assert (config.dropout_rate, config.remat) == (0, "none")
    assert getattr(config, "attention_dropout_rate", 0) == 0
    name = type(config).__name__
    flags = ["DROPOUT_RATE=0.25", "ModelConfig.dtype=bfloat16", f"{name}.remat=full"]
    config = stage_of(path, *flags).model.config
    assert (config.dropout_rate, config.dtype, config.remat) == (0.25, "bfloat16", "full")
    assert getattr(config, "attention_dropout_rate", 0.25) == 0.25
    check(path, *flags)


def test_tokens_can_be_added(tmp_path):
    path = write(tmp_path / "model")
    flags = ["VOCABULARY=@ByteVocabulary()", "ByteVocabulary.extra_ids=7"]
    with pytest.raises(UserError, match=r"has 266 tokens.* 264; .*set LlamaConfig.vocab_size=266"):
        stage_of(path, *flags)
    stage = stage_of(path, *flags, "LlamaConfig.vocab_size=266")
    assert stage.model.config.vocab_size == stage.data.vocabulary.vocab_size == 266
    check(path, *flags, "LlamaConfig.vocab_size=266")


# Widths that heads share: only some numbers divide them.
HEADS = {("bart", "num_heads"), ("gpt2", "num_heads")}


def other(value):
    """Returns another valid value for a field of a config."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value * 2
    if isinstance(value, float):
        return value * 1.5
    changes = {"relu": "gelu", ("relu",): ("gelu",), "none": "linear", None: 5}
    return changes[value]


@pytest.mark.parametrize(
    ("family", "field"),
    [(family, field) for family in CONFIGS for field in sizes_of(config_of(family))],
)
def test_what_a_config_states_otherwise_is_refused_by_name(family, field, tmp_path):
    path = write(tmp_path / "model", family, "hf")
    model = native.model(hf.read(path))
    theirs = getattr(model.config, field)

    def stating(value):
        config = dataclasses.replace(model.config, **{field: value})
        return dataclasses.replace(model, config=config)

    stated = 1 if (family, field) in HEADS else other(theirs)
    if field in ("max_length", "vocab_size"):  # for information; adds tokens
        initial_checkpoint.check(stating(stated), path)
        if field == "max_length":
            return
        stated = 200
    initial_checkpoint.check(model, path)
    with pytest.raises(UserError) as error:
        initial_checkpoint.check(stating(stated), path)
    name = type(model.config).__name__
    start = f"{name}.{field}={stated!r}, but the checkpoint '{path}' has {theirs!r}"
    assert str(error.value).startswith(start)


def test_sizes_that_a_file_or_a_flag_states_are_compared(tmp_path):
    path = write(tmp_path / "model")
    sentence = rf"LlamaConfig.rope_theta=500.0, but the checkpoint '{path}' has 5000.0; leave"
    with pytest.raises(UserError, match=sentence):
        check(path, "LlamaConfig.rope_theta=500.0")
    check(path, "LlamaConfig.rope_theta=5000.0")
    bytes_ = "VOCABULARY=@ByteVocabulary()"
    with pytest.raises(UserError, match=r"LlamaConfig.num_heads=32, but .* has 4"):
        sized = (RECIPE, "gin_configs/models/llama3_2_1b.gin")
        check(path, "LlamaConfig.emb_dim=16", "Model.eos_id=1", bytes_, files=sized)
    with pytest.raises(UserError, match=r"The model is a GPT2Config, the checkpoint .*LlamaConfig"):
        check(path, bytes_, files=(RECIPE, "gin_configs/models/gpt2.gin"))


@pytest.mark.parametrize("name", ["eos_id", "start_id", "separator_id", "stop_ids"])
def test_ids_are_compared(name, tmp_path):
    path = write(tmp_path / "model", kind="native")
    ids = {"separator": 3, "stop": [5, 6]}
    edit_json(tmp_path / "model" / "robust_ft.json", token_ids=IDS | ids)
    model = stage_of(path).model
    assert (model.separator_id, model.stop_ids) == (3, (5, 6))
    check(path)
    with pytest.raises(UserError, match=rf"Model.{name}=.*, but the checkpoint .* has "):
        check(path, f"Model.{name}={[5] if name == 'stop_ids' else 9}")
    check(path, "Model.pad_id=9", "Model.stop_ids=[5, 6, 7]")


def test_a_separator_may_be_added_to_a_model_that_has_none(tmp_path):
    path = write(tmp_path / "model")
    assert stage_of(path).model.separator_id is None
    check(path, "Model.separator_id=3")


def test_a_name_on_the_hub_is_enough_and_is_compared(tmp_path, monkeypatch):
    path = write(tmp_path / "model")
    monkeypatch.setattr(hf, "find", lambda name: Path(path if name == "me/llama" else name))
    stage = stage_of("me/llama")
    assert stage.model == stage_of(path).model and stage.data.vocabulary.vocab_size == 264
    assert load_params("me/llama").keys() == load_params(path).keys()
    with pytest.raises(UserError, match=r"rope_theta=500.0, but the checkpoint .* has 5000.0"):
        stage_of("me/llama", "LlamaConfig.rope_theta=500.0")
    sized = dataclasses.replace(stage.model.config, rope_theta=500.0)
    stated = dataclasses.replace(stage, model=dataclasses.replace(stage.model, config=sized))
    recipe = Recipe("it", str(tmp_path / "run"), [stated])
    with pytest.raises(UserError, match=r"rope_theta=500.0, but the checkpoint .* has 5000.0"):
        stage_start.restore(recipe, stated)


# What has no config.


def test_the_model_is_the_first_of_several_paths(tmp_path):
    path = write(tmp_path / "model")
    np.save(tmp_path / "prompt.npy", np.zeros((10, 16), np.float32))
    flags = ["Model.prompt=@Prompt()", "Prompt.length=10"]
    stage = stage_of(f"{path},{tmp_path / 'prompt.npy'}", *flags)
    assert stage.model.config.emb_dim == 16
    check(f"{path},{tmp_path / 'prompt.npy'}", *flags)


@pytest.mark.parametrize("name", ["prompt.npy", "model.safetensors"])
def test_parameters_without_a_model_are_refused(name, tmp_path):
    file = tmp_path / name
    if name.endswith("npy"):
        np.save(file, np.zeros((10, 16), np.float32))
    else:
        save_file({"x": np.zeros(3, np.float32)}, file)
    with pytest.raises(
        UserError, match=rf"'{file}' holds parameters.*Stage.restore='MODEL,{file}'"
    ):
        stage_of(file)


def test_scratch_needs_sizes():
    with pytest.raises(UserError, match=r"'scratch' draws .* Model.config .*gin_configs/models/"):
        stage_of("scratch")


def test_a_path_that_is_not_there(tmp_path):
    write(tmp_path / "model")
    with pytest.raises(UserError, match=r"There is no directory .*modle.*Did you mean 'model'"):
        stage_of(tmp_path / "modle")


def test_t5x_checkpoints_need_a_vocabulary(tmp_path):
    folder = tmp_path / "checkpoint_1000"
    folder.mkdir()
    made = random_checkpoint(vocab_size=264, relative_num_buckets=8)
    t5x.write(made, folder)
    flags = ["VOCABULARY=@ByteVocabulary()", "ByteVocabulary.extra_ids=5"]
    with pytest.raises(UserError, match=r"8 buckets .*set T5Config.relative_max_distance"):
        stage_of(folder, *flags)
    flags.append("T5Config.relative_max_distance=20")
    with pytest.raises(UserError, match=r"Set TaskData.vocabulary .*in the config: VOCABULARY"):
        stage_of(folder, flags[-1])
    stage = stage_of(folder, *flags)
    assert sizes_of(stage.model.config) == sizes_of(made.config)
    check(folder, *flags)


# Whole runs.


def run(*flags):
    with pytest.raises(SystemExit) as ended:
        command_line.run(train.main, list(flags))
    return ended.value.code


def test_a_run_from_one_flag_and_what_it_trains(tmp_path, capsys):
    path = write(tmp_path / "model")
    toy = tmp_path / "toy.gin"
    toy.write_text(
        """
MIXTURE_OR_TASK_NAME = 'toy'
MIXTURE_OR_TASK_MODULE = 'toy_tasks'
TASK_FEATURE_LENGTHS = {'inputs': 12, 'targets': 4}
HELD_OUT_FEATURE_LENGTHS = {'inputs': 12, 'targets': 4}
HELD_OUT_TASKS = {}
MAX_DECODE_LENGTH = 3
BATCH_SIZE = 4
TRAIN_STEPS = 2
EVAL_PERIOD = 2
EVAL_LIMIT = 4
TEST_LIMIT = 4
"""
    )
    model_dir = tmp_path / "run"
    command = [f"--gin_file={RECIPE}", f"--gin_file={toy}", f"--gin.MODEL_DIR={model_dir}"]
    flags = [*command, f"--gin.INITIAL_CHECKPOINT_PATH={path}"]
    assert run(*flags, "--dry_run") == 0
    shown = capsys.readouterr().out
    assert "decoder/layers_{0,1}/mlp/wi_0/kernel" in shown and not model_dir.exists()
    assert run(*flags, "--dry_run", "--gin.LlamaConfig.rope_theta=1.0") == command_line.USER_ERROR
    assert "rope_theta=1.0, but the checkpoint" in capsys.readouterr().err
    assert run(*flags) == 0
    (saved,) = model_dir.glob("model/checkpoint_2")
    assert {name: array.shape for name, array in load_params(str(saved)).items()} == {
        name: array.shape for name, array in load_params(path).items()
    }
    capsys.readouterr()
    assert run(*command, f"--gin.INITIAL_CHECKPOINT_PATH={saved}") == command_line.USER_ERROR
    said = capsys.readouterr().err
    assert f"'{saved}' holds parameters" in said and f"'MODEL,{saved}'" in said
    assert run(*flags, f"--gin.INITIAL_CHECKPOINT_PATH={path},{saved}", "--dry_run") == 0
    assert not Path("MODEL").exists()
