"""What config.json and generation_config.json say of ids, and what is written into them."""

import dataclasses
import json
import logging

import numpy as np
import pytest
from random_checkpoints import edit_json

from robust_ft.checkpoints_io import families, hf, native, sources
from robust_ft.checkpoints_io.tensors import Checkpoint, Tensor
from robust_ft.convert import convert
from robust_ft.errors import UserError
from robust_ft.models.model import Model
from robust_ft.trainable import flatten

GENERATION = "generation_config.json"
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 40,
}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
STACKS = [f"{stack}_{name}" for stack in ("encoder", "decoder") for name in ("layers", "ffn_dim")]
# What no config of ours says, in each model's own words.
SOURCES = {
    "llama": LLAMA
    | {"bos_token_id": 1, "eos_token_id": [2, 5], "attention_dropout": 0.1, "pretraining_tp": 2}
    | {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
    "mistral": LLAMA | {"sliding_window": None, "bos_token_id": 1, "eos_token_id": 2},
    "qwen2": LLAMA | {"eos_token_id": 3, "use_sliding_window": False, "max_window_layers": 1},
    "qwen3": LLAMA | {"head_dim": 8, "eos_token_id": [3, 4], "rope_theta": 1e6},
    "gpt2": {"vocab_size": 40, "n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 48}
    | {"bos_token_id": 1, "eos_token_id": 2, "embd_pdrop": 0.3, "summary_type": "cls_index"},
    "bart": {"vocab_size": 40, "d_model": 16, "max_position_embeddings": 48}
    | dict.fromkeys(STACKS, 1)
    | {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "forced_bos_token_id": 0},
    "t5": T5 | {"task_specific_params": {"summarization": {"prefix": "summarize: "}}},
    "mt5": T5 | {"tokenizer_class": "T5Tokenizer", "feed_forward_proj": "gated-gelu"},
}
ARCHITECTURES = {"architectures": ["OfTheirs"], "transformers_version": "4.0.0"}


def directory(folder, kind, generation=None, **settings):
    """Writes a random model with its config.json in a family's own words."""
    settings = {"model_type": kind} | ARCHITECTURES | SOURCES[kind] | settings
    name = families.MODEL_TYPES[kind]
    config = families.get(name).config_from_hf(settings, {})
    rng = np.random.default_rng(0)
    tensors = {
        path: Tensor.of(rng.normal(size=leaf.shape).astype(np.float32), path)
        for path, leaf in flatten(Model(config).shapes()).items()
    }
    folder.mkdir(exist_ok=True)
    hf.write(Checkpoint("random", name, config, tensors), folder)
    (folder / "config.json").write_text(json.dumps(settings))
    if generation is not None:
        (folder / GENERATION).write_text(json.dumps(generation))
    return folder


def said(folder, file="config.json"):
    return json.loads((folder / file).read_text())


def out(checkpoint, folder):
    folder.mkdir()
    hf.write(checkpoint, folder)
    return folder


@pytest.mark.parametrize("kind", SOURCES)
def test_a_grown_vocabulary_is_all_that_changes(tmp_path, kind):
    source = directory(tmp_path / "source", kind, {"eos_token_id": [2, 7], "top_p": 0.8})
    convert(str(source), str(tmp_path / "same"), output_format="hf")
    convert(str(source), str(tmp_path / "grown"), output_format="hf", config={"vocab_size": 45})
    convert(str(tmp_path / "grown"), str(tmp_path / "ours"))
    convert(str(tmp_path / "ours"), str(tmp_path / "back"), output_format="hf")
    # A head of its own is untied, also of a T5, whose file had no flag.
    head = {"tie_word_embeddings": False} if kind == "mt5" else {}
    assert said(tmp_path / "same") == said(source) | head
    for folder in (tmp_path / "grown", tmp_path / "back"):
        assert said(folder) == said(source) | {"vocab_size": 45} | head
        assert (folder / GENERATION).read_bytes() == (source / GENERATION).read_bytes()
    read = [sources.read(str(folder)) for folder in (source, tmp_path / "back")]
    assert read[0].token_ids == read[1].token_ids
    assert read[1].config == dataclasses.replace(read[0].config, vocab_size=45)


@pytest.mark.parametrize("kind", SOURCES)
def test_ids_that_a_run_used_are_written(tmp_path, kind):
    source = directory(tmp_path / "source", kind, {"eos_token_id": 2, "pad_token_id": None})
    ids = {"pad_id": 41, "eos_id": 42, "start_id": 43, "stop_ids": [2, 9]}
    changed = sources.overridden(sources.read(str(source)), {"vocab_size": 45} | ids)
    folder = out(changed, tmp_path / "out")
    start = "bos_token_id" if changed.config.decoder_only else "decoder_start_token_id"
    expected = {"pad_token_id": 41, "eos_token_id": [42, 2, 9], start: 43}
    assert said(folder, GENERATION) == expected
    head = {"tie_word_embeddings": False} if kind == "mt5" else {}
    assert said(folder) == said(source) | expected | {"vocab_size": 45} | head
    assert sources.read(str(folder)).token_ids == changed.token_ids
    model = native.model(changed)
    assert (model.pad_id, model.eos_ids, model.start_id) == (41, (42, 2, 9), 43)


def test_one_end_is_no_list(tmp_path):
    source = sources.read(str(directory(tmp_path / "source", "llama")))
    assert source.token_ids == {"pad": 2, "eos": 2, "start": 1, "stop": [5]}
    folder = out(sources.overridden(source, {"stop_ids": []}), tmp_path / "out")
    assert said(folder)["eos_token_id"] == 2 and "pad_token_id" not in said(folder)


def test_decoding_stops_where_generate_stops(tmp_path):
    """At generation_config.json's ends if it has any, else at config.json's."""

    def ids(generation, **settings):
        return sources.read(str(directory(tmp_path, "llama", generation, **settings))).token_ids

    assert ids({"eos_token_id": [7, 2]}) == {"pad": 2, "eos": 2, "start": 1, "stop": [7]}
    assert ids({"eos_token_id": 7})["stop"] == [7]
    assert ids({"eos_token_id": None})["stop"] == [5]
    assert ids({}, eos_token_id=5) == {"pad": 5, "eos": 5, "start": 1}
    # What config.json does not know.
    lacking = {"bos_token_id": None, "eos_token_id": None}
    assert ids({"eos_token_id": [6, 7], "bos_token_id": 3, "pad_token_id": 9}, **lacking) == {
        "pad": 9,
        "eos": 6,
        "start": 3,
        "stop": [7],
    }


def test_a_padding_token_outside_of_the_vocabulary(tmp_path):
    """As of tokenizers to which one was added, while the model stayed."""
    folder = directory(tmp_path, "llama", pad_token_id=40)
    assert sources.read(str(folder)).token_ids["pad"] == 2


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "eos_token_id", "</s>"),
        ("config.json", "pad_token_id", True),
        ("generation_config.json", "eos_token_id", [2, None]),
    ],
)
def test_ids_that_are_none(tmp_path, file, key, value):
    edit_json(directory(tmp_path, "llama", {}) / file, **{key: value})
    with pytest.raises(UserError, match=rf"{file} says {key}=.*known are an id, a list of ids"):
        hf.read(str(tmp_path))


# --- Changes of what a config.json says in several ways


def test_other_rotary_positions_replace_all_spellings(tmp_path):
    source = sources.read(str(directory(tmp_path / "source", "llama")))
    changes = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_length": 512}
    changed = sources.overridden(source, changes)
    folder = out(changed, tmp_path / "out")
    assert sources.read(str(folder)).config == changed.config
    assert said(folder)["rope_parameters"]["rope_theta"] == 500
    back = sources.overridden(
        sources.read(str(folder)), {name: getattr(source.config, name) for name in changes}
    )
    config = sources.read(str(out(back, tmp_path / "back"))).config
    assert (config.rope_scaling, config.rope_theta) == ("none", 500.0)


def test_dropout_that_was_asked_for_is_written(tmp_path):
    source = sources.read(str(directory(tmp_path / "source", "t5")))
    folder = out(sources.overridden(source, {"dropout_rate": 0.3}), tmp_path / "out")
    assert said(folder) == said(tmp_path / "source") | {"dropout_rate": 0.3}


@pytest.mark.parametrize("flag", [True, False, None])
@pytest.mark.parametrize("tied", [True, False])
def test_a_flag_never_contradicts_the_tensors(tmp_path, tied, flag):
    """Llama's flag of a head that is trained: whatever it was, it says what is written."""
    folder = directory(tmp_path / "source", "llama", tie_word_embeddings=tied)
    if not tied:  # tensors decide
        edit_json(folder / "config.json", tie_word_embeddings=flag)
    source = sources.read(str(folder))
    assert source.config.logits_via_embedding is tied
    written = out(source, tmp_path / "out")
    assert ("lm_head.weight" in hf.read_weights(written)) is not tied
    assert said(written).get("tie_word_embeddings", False) is tied


# --- Separators


def test_a_separator_that_no_file_can_say_is_told(tmp_path, caplog):
    source = sources.read(str(directory(tmp_path / "source", "gpt2")))
    vocabulary = {"kind": "ByteVocabulary", "extra_ids": 0}
    changed = sources.overridden(
        dataclasses.replace(source, vocabulary=vocabulary), {"separator_id": 38}
    )
    with caplog.at_level(logging.WARNING):
        folder = out(changed, tmp_path / "out")
    assert "separator" in caplog.text and "put token 38 ('#') behind each prompt" in caplog.text
    assert "separator" not in sources.read(str(folder)).token_ids
    # Ours can say it.
    (tmp_path / "ours").mkdir()
    native.write(changed, tmp_path / "ours")
    assert native.model(native.read(str(tmp_path / "ours"))).separator_id == 38


# --- Ids as overrides


def test_ids_are_replaced_like_fields(tmp_path):
    source = sources.read(str(directory(tmp_path, "llama")))
    found = sources.read(str(tmp_path), overrides={"separator_id": 4, "eos_id": 5, "pad_id": 0})
    assert found.token_ids == {"pad": 0, "eos": 5, "start": 1, "separator": 4}
    assert sources.overridden(found, {"separator_id": None}).token_ids.get("separator") is None
    assert found.config == source.config


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("llama", {"pad_id": 40}, "pad_id=40 is not a token of 0 to 39"),
        ("llama", {"pad_id": None}, "pad_id=None is not a token"),
        ("llama", {"eos_id": "2"}, "eos_id=2 is not a token"),
        ("llama", {"start_id": True}, "start_id=True is not a token"),
        ("llama", {"stop_ids": 3}, "stop_ids=3 is not a list of tokens"),
        ("llama", {"stop_ids": [3, 77]}, r"stop_ids=\[3, 77\] is not a list of tokens of 0 to 39"),
        ("llama", {"seperator_id": 3}, "no such token id. Did you mean 'separator_id'"),
        ("t5", {"separator_id": 3}, "separator_id=3 is for decoder-only models"),
    ],
)
def test_ids_that_do_not_fit(tmp_path, kind, fields, message):
    source = sources.read(str(directory(tmp_path, kind)))
    with pytest.raises(UserError, match=message):
        sources.overridden(source, fields)


# --- Against transformers


@pytest.mark.parity
def test_transformers_generates_the_same_before_and_after_growing(tmp_path):
    """A BART that is made to start with a token, and a Llama with two ends."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokens = torch.tensor([[3, 9, 17, 33, 2]])
    for kind in ("bart", "llama"):
        ids = {"bos_token_id": 0, "decoder_start_token_id": 2} if kind == "bart" else {}
        source = directory(tmp_path / kind, kind, ids or None)
        grown = tmp_path / f"{kind}_grown"
        convert(str(source), str(grown), output_format="hf", config={"vocab_size": 45})
        auto = transformers.AutoModelForSeq2SeqLM if kind == "bart" else None
        auto = auto or transformers.AutoModelForCausalLM
        found = []
        for folder in (source, grown):
            model = auto.from_pretrained(folder).eval()
            assert model.get_input_embeddings().num_embeddings == said(folder)["vocab_size"]
            found.append((model.generation_config.eos_token_id, model.config.to_diff_dict()))
            output = model.generate(
                tokens, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(tokens)
            )
            found.append(output[output < 40].tolist()[:6])
        assert found[0][0] == found[2][0] and found[1] == found[3]
