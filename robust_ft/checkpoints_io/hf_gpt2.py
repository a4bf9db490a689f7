"""GPT-2 as Hugging Face names it; its linear layers keep [inputs, outputs], as ours do."""

import logging
from collections.abc import Mapping
from typing import Any

from robust_ft.checkpoints_io import config_json
from robust_ft.checkpoints_io.names import Name, Redundant
from robust_ft.checkpoints_io.tensors import Tensor
from robust_ft.errors import UserError
from robust_ft.models.gpt2 import GPT2Config

CONFIG = GPT2Config
TIED_BY_DEFAULT = True
TABLE = "transformer.wte.weight"
END_OF_TEXT = 50256

_ACTIVATIONS = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "gelu": "gelu_exact",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
# Fields of config.json with a single value in our GPT-2.
_FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "layer_norm_epsilon": 1e-5,
}


def _layer() -> list[Name]:
    ours, theirs = "decoder/layers_{i}", "transformer.h.{i}"
    dense = {
        "self_attention/qkv": "attn.c_attn",
        "self_attention/out": "attn.c_proj",
        "mlp/wi": "mlp.c_fc",
        "mlp/wo": "mlp.c_proj",
    }
    norms = {"pre_self_attention_layer_norm": "ln_1", "pre_mlp_layer_norm": "ln_2"}
    weights = [("kernel", dense), ("scale", norms)]
    return [
        Name(f"{ours}/{module}/{ending}", f"{theirs}.{name}.{their_ending}")
        for weight, modules in weights
        for module, name in modules.items()
        for ending, their_ending in ((weight, "weight"), ("bias", "bias"))
    ]


NAMES = (
    Name("token_embedder/embedding", TABLE),
    Name("decoder/position_embedder/embedding", "transformer.wpe.weight"),
    *_layer(),
    Name("decoder/decoder_norm/scale", "transformer.ln_f.weight"),
    Name("decoder/decoder_norm/bias", "transformer.ln_f.bias"),
)

REDUNDANT = Redundant(
    duplicates=(("lm_head.weight", TABLE),),
    # Early files hold each layer's causal attention mask.
    ignored=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
    prefix="transformer.",
)


def config_from_hf(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> GPT2Config:
    """Reads a config.json."""
    config_json.check_fixed(settings, _FIXED, "GPT-2")
    config_json.check_tied(settings, tensors, ("lm_head.weight", TABLE), "GPT-2")
    residual, embedded = (settings.get(f"{name}_pdrop", 0.1) for name in ("resid", "embd"))
    if residual != embedded:
        logging.warning(
            "config.json says embd_pdrop=%s and resid_pdrop=%s; both become %s.",
            embedded,
            residual,
            residual,
        )
    emb_dim = settings.get("n_embd", 768)
    return GPT2Config(
        vocab_size=settings.get("vocab_size", 50257),
        emb_dim=emb_dim,
        num_heads=settings.get("n_head", 12),
        mlp_dim=settings.get("n_inner") or 4 * emb_dim,
        num_layers=settings.get("n_layer", 12),
        num_positions=settings.get("n_positions", 1024),
        activation=config_json.activation(
            settings, "activation_function", "gelu_new", _ACTIVATIONS
        ),
        dropout_rate=residual,
        attention_dropout_rate=settings.get("attn_pdrop", 0.1),
        param_dtype=config_json.param_dtype(tensors),
    )


def config_to_hf(config: GPT2Config) -> dict[str, Any]:
    """Returns a config.json."""
    activations = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    activations["swish"] = "silu"
    if config.activation not in activations:
        raise UserError(f"Hugging Face's GPT-2 has no activation '{config.activation}'.")
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_embd": config.emb_dim,
        "n_head": config.num_heads,
        "n_inner": config.mlp_dim,
        "n_layer": config.num_layers,
        "n_positions": config.num_positions,
        "activation_function": activations[config.activation],
        "resid_pdrop": config.dropout_rate,
        "embd_pdrop": config.dropout_rate,
        "attn_pdrop": config.attention_dropout_rate,
        "initializer_range": 0.02,
        **_FIXED,
        "tie_word_embeddings": True,
        "use_cache": True,
        "pad_token_id": END_OF_TEXT,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": END_OF_TEXT,
    }


def token_ids(settings: Mapping[str, Any]) -> dict[str, int]:
    """GPT-2's end of text is every special token, unless config.json sets others."""
    ends = {config_json.BOS: END_OF_TEXT, config_json.EOS: END_OF_TEXT}
    return config_json.decoder_only_ids(settings, **ends)
