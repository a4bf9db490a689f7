"""Llama, Mistral, Qwen2 and Qwen3 as Hugging Face names them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from robust_ft.checkpoints_io import config_json, hf_rope
from robust_ft.checkpoints_io.names import Name, Redundant
from robust_ft.checkpoints_io.tensors import Tensor
from robust_ft.errors import UserError
from robust_ft.models.config import COMPUTE_FIELDS
from robust_ft.models.llama import LlamaConfig

CONFIG = LlamaConfig
TIED_BY_DEFAULT = False
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

_OURS, _THEIRS = "decoder/layers_{i}", "model.layers.{i}"
_PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}

NAMES = (
    Name("token_embedder/embedding", EMBEDDING),
    Name(f"{_OURS}/pre_self_attention_layer_norm/scale", f"{_THEIRS}.input_layernorm.weight"),
    *(
        name
        for ours, theirs in _PROJECTIONS.items()
        for name in (
            Name(
                f"{_OURS}/self_attention/{ours}/kernel",
                f"{_THEIRS}.self_attn.{theirs}.weight",
                transpose=True,
            ),
            Name(f"{_OURS}/self_attention/{ours}/bias", f"{_THEIRS}.self_attn.{theirs}.bias"),
        )
    ),
    Name(f"{_OURS}/self_attention/query_norm/scale", f"{_THEIRS}.self_attn.q_norm.weight"),
    Name(f"{_OURS}/self_attention/key_norm/scale", f"{_THEIRS}.self_attn.k_norm.weight"),
    Name(f"{_OURS}/pre_mlp_layer_norm/scale", f"{_THEIRS}.post_attention_layernorm.weight"),
    Name(f"{_OURS}/mlp/wi_0/kernel", f"{_THEIRS}.mlp.gate_proj.weight", transpose=True),
    Name(f"{_OURS}/mlp/wi_1/kernel", f"{_THEIRS}.mlp.up_proj.weight", transpose=True),
    Name(f"{_OURS}/mlp/wo/kernel", f"{_THEIRS}.mlp.down_proj.weight", transpose=True),
    Name("decoder/decoder_norm/scale", "model.norm.weight"),
    Name("decoder/logits_dense/kernel", HEAD, transpose=True),
)

REDUNDANT = Redundant(
    duplicates=((HEAD, EMBEDDING),),
    # Early files hold the rotary embedding's inverse frequencies, which follow from the config.
    ignored=(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
    prefix="model.",
)

# A config.json may leave out what is the default of its class in `transformers`.
_COMMON: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_QWEN: dict[str, Any] = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "mistral": _COMMON
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": _COMMON | _QWEN,
    "qwen3": _COMMON | _QWEN | {"head_dim": 128},
}
_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def config_from_hf(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LlamaConfig:
    """Reads a config.json of any version of `transformers`; tensors decide whether heads are tied.

    Dropout is not read: there it is in attention only, here everywhere.
    """
    kind = settings["model_type"]
    known = _DEFAULTS[kind] | dict(settings)
    for name, value in (("hidden_act", "silu"), ("mlp_bias", False)):
        if known[name] != value:
            raise UserError(f"config.json says {name}={known[name]!r}; only {value!r} is known.")
    heads = known["num_attention_heads"]
    bias = kind in ("llama", "qwen3") and known["attention_bias"]
    window, first_window_layer = _window(kind, known)
    return LlamaConfig(
        vocab_size=known["vocab_size"],
        emb_dim=known["hidden_size"],
        num_heads=heads,
        num_kv_heads=known["num_key_value_heads"] or heads,
        head_dim=known["head_dim"] or known["hidden_size"] // heads,
        mlp_dim=known["intermediate_size"],
        num_layers=known["num_hidden_layers"],
        max_length=known["max_position_embeddings"],
        logits_via_embedding=_is_tied(known, tensors),
        qkv_bias=bias or kind == "qwen2",
        out_bias=bias,
        qk_norm=kind == "qwen3",
        sliding_window=window,
        first_window_layer=first_window_layer,
        norm_epsilon=known["rms_norm_eps"],
        **hf_rope.from_hf(known),
        param_dtype=config_json.param_dtype(tensors),
    )


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """Returns a config.json that every version of `transformers` reads alike.

    Raises:
        UserError: No model type has this combination of switches.
    """
    if config.qk_norm:
        kind = "qwen3"
    elif config.qkv_bias and not config.out_bias:
        kind = "qwen2"
    else:
        kind = "llama" if config.sliding_window is None else "mistral"
    settings: dict[str, Any] = {
        "architectures": [f"{_CLASSES[kind]}ForCausalLM"],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.emb_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_epsilon,
        **hf_rope.to_hf(config),
        "tie_word_embeddings": config.logits_via_embedding,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if kind in ("llama", "qwen3"):
        settings["attention_bias"] = config.qkv_bias
    if kind in ("mistral", "qwen2", "qwen3"):
        settings["sliding_window"] = config.sliding_window
    if kind in ("qwen2", "qwen3"):
        settings["use_sliding_window"] = config.sliding_window is not None
        full = config.num_layers if config.sliding_window is None else config.first_window_layer
        settings["max_window_layers"] = full
        settings["layer_types"] = ["full_attention"] * full
        settings["layer_types"] += ["sliding_attention"] * (config.num_layers - full)
    _check_round_trip(config, settings)
    return settings


def token_ids(settings: Mapping[str, Any]) -> dict[str, int]:
    """The ids in config.json; Llama and Mistral have defaults."""
    known = settings["model_type"] in ("llama", "mistral")
    return config_json.decoder_only_ids(
        settings, **{config_json.BOS: 1, config_json.EOS: 2} if known else {}
    )


def _is_tied(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    head, embedding = tensors.get(HEAD), tensors.get(EMBEDDING)
    if not settings["tie_word_embeddings"] or head is None or embedding is None:
        return bool(settings["tie_word_embeddings"])
    return head.equals(embedding)


def _window(kind: str, settings: Mapping[str, Any]) -> tuple[int | None, int]:
    """Returns the sliding window's tokens, None without one, and the first layer that has it."""
    if kind == "mistral":
        return settings["sliding_window"], 0
    if kind == "llama" or not settings["use_sliding_window"] or not settings["sliding_window"]:
        return None, 0
    count = settings["num_hidden_layers"]
    first = min(settings["max_window_layers"], count)
    if types := settings["layer_types"]:
        first = types.index("sliding_attention") if "sliding_attention" in types else count
        if types != ["full_attention"] * first + ["sliding_attention"] * (count - first):
            raise UserError(
                f"config.json says layer_types={types}; known are layers without a sliding window "
                "below layers with one."
            )
    return (None, 0) if first == count else (settings["sliding_window"], first)


def _check_round_trip(config: LlamaConfig, settings: Mapping[str, Any]) -> None:
    """Raises a UserError unless reading the config.json gives the config again."""
    # How to compute is not part of a config.json.
    same = {name: getattr(config, name) for name in COMPUTE_FIELDS}
    read = dataclasses.replace(config_from_hf(settings, {}), **same)
    differing = [
        f"{field.name}={getattr(config, field.name)}"
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(read, field.name)
    ]
    if differing:
        raise UserError(
            f"Hugging Face's {_CLASSES[settings['model_type']]}, the nearest, has no model with "
            f"{', '.join(differing)}."
        )
