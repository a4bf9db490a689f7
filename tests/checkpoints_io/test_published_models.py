"""The models in README.md by the config.json that was published with each."""

import dataclasses
import json
import math

import numpy as np
import pytest

from robust_ft.checkpoints_io import families, hf, native
from robust_ft.checkpoints_io.names import expand, parameter_shapes
from robust_ft.checkpoints_io.tensors import Tensor

GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
T5_IDS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}


def t5(d_model, d_ff, layers, heads, kind="t5", d_kv=64, vocab=32128, **more):
    sizes = {"d_model": d_model, "d_kv": d_kv, "d_ff": d_ff, "num_layers": layers}
    buckets = {"relative_attention_num_buckets": 32, "layer_norm_epsilon": 1e-06}
    settings = {"model_type": kind, "num_heads": heads, "vocab_size": vocab} | sizes | buckets
    return settings | T5_IDS | more


def mt5(d_model, d_ff, layers, heads):
    own = GATED | {"num_decoder_layers": layers, "tokenizer_class": "T5Tokenizer"}
    return t5(d_model, d_ff, layers, heads, "mt5", vocab=250112, **own)


def bart(width, layers, heads):
    stacks = {}
    for stack in ("encoder", "decoder"):
        sizes = {"layers": layers, "attention_heads": heads, "ffn_dim": 4 * width}
        stacks |= {f"{stack}_{name}": size for name, size in sizes.items()}
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    fixed = {"add_final_layer_norm": False, "normalize_before": False, "scale_embedding": False}
    sizes = {"d_model": width, "vocab_size": 50265, "max_position_embeddings": 1024}
    return {"model_type": "bart", "activation_function": "gelu"} | ids | fixed | sizes | stacks


def gpt2(width, layers, heads):
    sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_ctx": 1024}
    ids = {"bos_token_id": 50256, "eos_token_id": 50256}
    rest = {"vocab_size": 50257, "n_positions": 1024, "activation_function": "gelu_new"}
    return {"model_type": "gpt2", "layer_norm_epsilon": 1e-05} | sizes | ids | rest


def llama(kind, vocab, width, mlp, layers, heads, kv_heads, positions, eps, theta, eos, **more):
    sizes = {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
        "rms_norm_eps": eps,
        "hidden_act": "silu",
        "eos_token_id": eos,
    }
    theta = {} if theta is None else {"rope_theta": theta}
    return {"model_type": kind} | sizes | theta | more


def llama3(factor):
    return {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }


BOS, TIED = {"bos_token_id": 128000}, {"tie_word_embeddings": True}
QWEN = {"use_sliding_window": False, "bos_token_id": 151643}
ENDS = [128001, 128008, 128009]
# name: parameters, as published, and config.json
PUBLISHED = {
    "t5-small": (60_506_624, t5(512, 2048, 6, 8)),
    "t5-base": (222_903_552, t5(768, 3072, 12, 12)),
    "t5-large": (737_668_096, t5(1024, 4096, 24, 16)),
    "t5-v1_1-small": (76_961_152, t5(512, 1024, 8, 6, num_decoder_layers=8, **GATED)),
    "flan-t5-base": (247_577_856, t5(768, 2048, 12, 12, num_decoder_layers=12, **GATED)),
    "t5-xl-lm-adapt": (2_849_757_184, t5(2048, 5120, 24, 32, num_decoder_layers=24, **GATED)),
    "mt5-small": (300_176_768, mt5(512, 1024, 8, 6)),
    "mt5-base": (582_401_280, mt5(768, 2048, 12, 12)),
    "mt5-xxl": (12_921_057_280, mt5(4096, 10240, 24, 64)),
    "byt5-small": (299_637_760, t5(1472, 3584, 12, 6, vocab=384, num_decoder_layers=4, **GATED)),
    "bart-base": (139_420_416, bart(768, 6, 12)),
    "bart-large": (406_291_456, bart(1024, 12, 16)),
    "gpt2": (124_439_808, gpt2(768, 12, 12)),
    "gpt2-medium": (354_823_168, gpt2(1024, 24, 16)),
    "gpt2-large": (774_030_080, gpt2(1280, 36, 20)),
    "gpt2-xl": (1_557_611_200, gpt2(1600, 48, 25)),
    "Llama-2-7b": (
        6_738_415_616,
        llama("llama", 32000, 4096, 11008, 32, 32, 32, 4096, 1e-05, None, 2, bos_token_id=1),
    ),
    "Meta-Llama-3-8B-Instruct": (
        8_030_261_248,
        llama("llama", 128256, 4096, 14336, 32, 32, 8, 8192, 1e-05, 5e5, 128009, **BOS),
    ),
    "Llama-3.1-8B-Instruct": (
        8_030_261_248,
        llama("llama", 128256, 4096, 14336, 32, 32, 8, 131072, 1e-05, 5e5, ENDS, **BOS)
        | {"rope_scaling": llama3(8.0)},
    ),
    "Llama-3.2-1B": (
        1_235_814_400,
        llama("llama", 128256, 2048, 8192, 16, 32, 8, 131072, 1e-05, 5e5, 128001, **BOS)
        | {"rope_scaling": llama3(32.0), "head_dim": 64}
        | TIED,
    ),
    "SmolLM2-135M-Instruct": (
        134_515_008,
        llama("llama", 49152, 576, 1536, 30, 9, 3, 8192, 1e-05, 100000, 2, **TIED)
        | {"bos_token_id": 1, "pad_token_id": 2, "rope_scaling": None},
    ),
    "Mistral-7B-v0.1": (
        7_241_732_096,
        llama("mistral", 32000, 4096, 14336, 32, 32, 8, 32768, 1e-05, 10000.0, 2)
        | {"bos_token_id": 1, "sliding_window": 4096},
    ),
    "Mistral-7B-v0.3": (
        7_248_023_552,
        llama("mistral", 32768, 4096, 14336, 32, 32, 8, 32768, 1e-05, 1e6, 2)
        | {"bos_token_id": 1, "sliding_window": None},
    ),
    "Qwen2.5-0.5B-Instruct": (
        494_032_768,
        llama("qwen2", 151936, 896, 4864, 24, 14, 2, 32768, 1e-06, 1e6, 151645, **QWEN | TIED)
        | {"sliding_window": 32768, "max_window_layers": 21},
    ),
    "Qwen2.5-7B-Instruct": (
        7_615_616_512,
        llama("qwen2", 152064, 3584, 18944, 28, 28, 4, 32768, 1e-06, 1e6, 151645, **QWEN)
        | {"sliding_window": 131072, "max_window_layers": 28},
    ),
    "Qwen3-0.6B": (
        596_049_920,
        llama("qwen3", 151936, 1024, 3072, 28, 16, 8, 40960, 1e-06, 1e6, 151645, **QWEN | TIED)
        | {"head_dim": 128, "sliding_window": None, "max_window_layers": 28},
    ),
    "Qwen3-8B": (
        8_190_735_360,
        llama("qwen3", 151936, 4096, 12288, 36, 32, 8, 40960, 1e-06, 1e6, 151645, **QWEN)
        | {"head_dim": 128, "sliding_window": None, "max_window_layers": 36},
    ),
}


@dataclasses.dataclass(frozen=True)
class Named(Tensor):
    """A tensor of a true shape, without values; one with another name differs."""

    def digest(self):
        return self.where


def directory(folder, settings):
    """Writes what is published with a model, but for its weights; returns these."""
    family = families.get(families.of_model_type(settings["model_type"], "test"))
    config = family.config_from_hf(settings, {})
    shapes = parameter_shapes(config)
    (folder / "config.json").write_text(json.dumps(settings))
    return {
        name: Named(
            shapes[path].shape[:: -1 if turn else 1], np.dtype(np.float32), lambda: None, name
        )
        for path, (name, turn) in expand(family.NAMES, config).items()
    }


# One of each kind without deep stacks, whose shapes take seconds; the others are slow tests.
QUICK = {"t5-small", "mt5-small", "bart-base", "gpt2", "Llama-3.2-1B", "Qwen2.5-0.5B-Instruct"}


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in PUBLISHED],
)
def test_sizes_and_ids(tmp_path, monkeypatch, name):
    count, settings = PUBLISHED[name]
    tensors = directory(tmp_path, settings)
    monkeypatch.setattr(hf, "read_weights", lambda folder: tensors)
    found = hf.read(str(tmp_path), vocabulary=False)
    assert sum(math.prod(leaf.shape) for leaf in parameter_shapes(found.config).values()) == count
    ends = settings["eos_token_id"]
    ends = ends if isinstance(ends, list) else [ends]
    model = native.model(found)
    assert list(model.eos_ids) == ends
    assert model.pad_id == settings.get("pad_token_id", ends[0])
    start = "bos_token_id" if found.config.decoder_only else "decoder_start_token_id"
    assert model.start_id == settings[start]


@pytest.mark.parity
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_parameter_and_setting_is_that_of_transformers(name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    settings = {k: v for k, v in PUBLISHED[name][1].items() if k != "model_type"}
    kind = PUBLISHED[name][1]["model_type"]
    theirs = transformers.AutoConfig.for_model(kind, **settings)
    family = families.get(families.of_model_type(kind, "test"))
    config = family.config_from_hf(PUBLISHED[name][1], {})
    auto = transformers.AutoModelForCausalLM
    auto = auto if config.decoder_only else transformers.AutoModelForSeq2SeqLM
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in auto.from_config(theirs).state_dict().items()}
    ours = parameter_shapes(config)
    for path, (their_name, turn) in expand(family.NAMES, config).items():
        assert ours[path].shape[:: -1 if turn else 1] == shapes.pop(their_name)
    extra = {copy for copy, _ in family.REDUNDANT.duplicates} | {"final_logits_bias"}
    assert shapes.keys() <= extra
    # Read again from all that `transformers` makes of it, nothing is another.
    whole = theirs.to_dict() | {"model_type": kind}
    if kind == "t5":
        whole["scale_decoder_outputs"] = theirs.scale_decoder_outputs
    again = family.config_from_hf(whole, {})
    assert again == config
