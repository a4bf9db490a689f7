"""Every config under gin_configs/models has the published model's number of parameters.

The numbers are computed twice: from the model's shapes, and from the papers' sizes by a formula
for each family. The result is compared with what papers, model cards and file names say.
"""

import functools
import math

import pytest

from robust_ft import gin_config
from robust_ft.models.model import Model
from robust_ft.trainable import flatten


def t5(vocab, embed, heads, head_dim, mlp, encoder, decoder, gated=True, tied=False):
    attention = 4 * embed * heads * head_dim
    mlp = (3 if gated else 2) * embed * mlp
    relative_positions = 2 * 32 * heads
    return (
        encoder * (attention + mlp + 2 * embed)
        + decoder * (2 * attention + mlp + 3 * embed)
        + (1 if tied else 2) * vocab * embed
        + relative_positions
        + 2 * embed
    )


def t5_1_0(embed, heads, head_dim, mlp, layers):
    return t5(32128, embed, heads, head_dim, mlp, layers, layers, gated=False, tied=True)


def t5_1_1(vocab, embed, heads, mlp, layers):
    return t5(vocab, embed, heads, 64, mlp, layers, layers)


def byt5(embed, heads, mlp, encoder, decoder):
    return t5(384, embed, heads, 64, mlp, encoder, decoder)


def mini(vocab):
    return t5(vocab, 96, 4, 24, 192, 2, 2, tied=True)


def bart(embed, layers):
    norm, attention = 2 * embed, 4 * (embed + 1) * embed
    mlp = 2 * embed * 4 * embed + 5 * embed
    embeddings = 50265 * embed + 2 * (1024 + 2) * embed + 2 * norm
    return embeddings + layers * (3 * attention + 2 * mlp + 5 * norm)


def gpt2(embed, layers):
    attention, mlp = 4 * (embed + 1) * embed, 2 * embed * 4 * embed + 5 * embed
    return (50257 + 1024) * embed + layers * (attention + mlp + 4 * embed) + 2 * embed


def llama(vocab, embed, heads, kv_heads, head_dim, mlp, layers, tied=False, bias=0, qk_norm=0):
    attention = (2 * heads + 2 * kv_heads) * head_dim * embed
    extra = bias * (heads + 2 * kv_heads) * head_dim + qk_norm * 2 * head_dim
    layer = attention + extra + 3 * embed * mlp + 2 * embed
    return (1 if tied else 2) * vocab * embed + layers * layer + embed


# What the formula gives for the paper's sizes, and what is published, with its digits.
MODELS = {
    "mini_byt5": (mini(384), "4.80640e5"),
    "mini_t5": (mini(440), "4.86016e5"),
    "mini_t5_scratch": (mini(440), "4.86016e5"),
    "t5_small": (t5_1_0(512, 8, 64, 2048, 6), "6.05e7"),
    "t5_base": (t5_1_0(768, 12, 64, 3072, 12), "2.23e8"),
    "t5_large": (t5_1_0(1024, 16, 64, 4096, 24), "7.38e8"),
    "t5_3b": (t5_1_0(1024, 32, 128, 16384, 24), "3e9"),
    "t5_11b": (t5_1_0(1024, 128, 128, 65536, 24), "1.1e10"),
    "t5_1_1_small": (t5_1_1(32128, 512, 6, 1024, 8), "7.7e7"),
    "t5_1_1_base": (t5_1_1(32128, 768, 12, 2048, 12), "2.5e8"),
    "t5_1_1_large": (t5_1_1(32128, 1024, 16, 2816, 24), "8e8"),
    "t5_1_1_xl": (t5_1_1(32128, 2048, 32, 5120, 24), "3e9"),
    "t5_1_1_xxl": (t5_1_1(32128, 4096, 64, 10240, 24), "1.1e10"),
    "mt5_small": (t5_1_1(250112, 512, 6, 1024, 8), "3.0e8"),
    "mt5_base": (t5_1_1(250112, 768, 12, 2048, 12), "5.8e8"),
    "mt5_large": (t5_1_1(250112, 1024, 16, 2816, 24), "1.2e9"),
    "mt5_xl": (t5_1_1(250112, 2048, 32, 5120, 24), "3.7e9"),
    "mt5_xxl": (t5_1_1(250112, 4096, 64, 10240, 24), "1.3e10"),
    "byt5_small": (byt5(1472, 6, 3584, 12, 4), "3.00e8"),
    "byt5_base": (byt5(1536, 12, 3968, 18, 6), "5.82e8"),
    "byt5_large": (byt5(1536, 16, 3840, 36, 12), "1.23e9"),
    "byt5_xl": (byt5(2560, 32, 6720, 36, 12), "3.74e9"),
    "byt5_xxl": (byt5(4672, 64, 12352, 36, 12), "1.29e10"),
    "bart_base": (bart(768, 6), "1.39420416e8"),
    "bart_large": (bart(1024, 12), "4.06291456e8"),
    "gpt2": (gpt2(768, 12), "1.24439808e8"),
    "gpt2_medium": (gpt2(1024, 24), "3.54823168e8"),
    "gpt2_large": (gpt2(1280, 36), "7.7403008e8"),
    "gpt2_xl": (gpt2(1600, 48), "1.5576112e9"),
    "llama2_7b": (llama(32000, 4096, 32, 32, 128, 11008, 32), "6.738415616e9"),
    "llama2_13b": (llama(32000, 5120, 40, 40, 128, 13824, 40), "1.301586432e10"),
    "llama3_8b": (llama(128256, 4096, 32, 8, 128, 14336, 32), "8.030261248e9"),
    "llama3_1_8b": (llama(128256, 4096, 32, 8, 128, 14336, 32), "8.030261248e9"),
    "llama3_2_1b": (llama(128256, 2048, 32, 8, 64, 8192, 16, tied=True), "1.2358144e9"),
    "mistral_7b": (llama(32000, 4096, 32, 8, 128, 14336, 32), "7.241732096e9"),
    "qwen2_5_0_5b": (llama(151936, 896, 14, 2, 64, 4864, 24, tied=True, bias=1), "4.94032768e8"),
    "qwen2_5_7b": (llama(152064, 3584, 28, 4, 128, 18944, 28, bias=1), "7.615616512e9"),
    "qwen3_0_6b": (llama(151936, 1024, 16, 8, 128, 3072, 28, tied=True, qk_norm=1), "5.9604992e8"),
    "qwen3_8b": (llama(151936, 4096, 32, 8, 128, 12288, 36, qk_norm=1), "8.19073536e9"),
}
SIZES = ("small", "base", "large", "xl", "xxl")
MODELS |= {f"t5_1_1_lm100k_{size}": MODELS[f"t5_1_1_{size}"] for size in SIZES}


@functools.cache
def load(name):
    """Returns a file's model, and where it finds its weights."""
    files = ["gin_configs/full_rte.gin", f"gin_configs/models/{name}.gin"]
    (stage,) = gin_config.load(files, ["DROPOUT_RATE=0.1"]).recipe.stages
    return stage.model, stage.restore


@functools.cache
def parameters(config):
    return sum(math.prod(leaf.shape) for leaf in flatten(Model(config).shapes()).values())


def test_all_are_here():
    assert {path.stem for path in gin_config.CONFIGS.glob("models/*.gin")} == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_parameters(name):
    """Computed from shapes alone; nothing is drawn."""
    expected, published = MODELS[name]
    assert parameters(load(name)[0].config) == expected
    digits = len(published.split("e")[0].replace(".", ""))
    assert float(f"{expected:.{digits - 1}e}") == float(published)


@pytest.mark.parametrize("name", MODELS)
def test_ids_dropout_and_weights(name):
    model, source = load(name)
    assert model.separator_id is None
    assert max(model.pad_id, model.start_id, *model.eos_ids) < model.config.vocab_size
    assert getattr(model.config, "attention_dropout_rate", 0.1) == 0.1
    if not name.startswith("mini"):  # no two share their weights
        assert source.startswith("checkpoints/")
        others = {load(other)[1] for other in MODELS.keys() - {name}}
        assert source not in others


@pytest.mark.parametrize(("name", "prompt"), [("gpt2", "decoder"), ("bart_base", "encoder")])
def test_recipes_run_on_these_models(name, prompt):
    files = ["gin_configs/promot_rte.gin", f"gin_configs/models/{name}.gin"]
    recipe = gin_config.load(files, ["DROPOUT_RATE=0.1"]).recipe
    tuned, trained = (stage.trainable_paths() for stage in recipe.stages)
    assert tuned == {f"{prompt}/prompt"} and not tuned & trained
    config = recipe.stages[0].model.config
    assert config.dropout_rate == config.attention_dropout_rate == 0.1
