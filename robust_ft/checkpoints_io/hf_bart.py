"""BART as Hugging Face names it."""

from collections.abc import Mapping
from typing import Any

from robust_ft.checkpoints_io import config_json
from robust_ft.checkpoints_io.names import Name, Redundant
from robust_ft.checkpoints_io.tensors import Tensor
from robust_ft.errors import UserError
from robust_ft.models.bart import BartConfig

CONFIG = BartConfig
TIED_BY_DEFAULT = True
SHARED, BIAS = "model.shared.weight", "final_logits_bias"

_ACTIVATIONS = {
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "relu": "relu",
    "silu": "silu",
}
# Fields of config.json with a single value in our BART; others belong to mBART and its relatives.
_FIXED = {
    "normalize_before": False,
    "add_final_layer_norm": False,
    "normalize_embedding": True,
    "static_position_embeddings": False,
    "extra_pos_embeddings": 2,
}
# Fields of ours that hold for both stacks: config.json has them once for each.
_SAME = {"num_heads": "attention_heads", "mlp_dim": "ffn_dim"}
_DEFAULTS = {"layers": 12, "attention_heads": 16, "ffn_dim": 4096}


def _weights(ours: str, theirs: str, kernel: bool) -> list[Name]:
    weight = f"{ours}/kernel" if kernel else f"{ours}/scale"
    return [Name(weight, f"{theirs}.weight", kernel), Name(f"{ours}/bias", f"{theirs}.bias")]


def _attention(ours: str, theirs: str) -> list[Name]:
    projections = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
    return [
        name
        for our_name, their_name in projections.items()
        for name in _weights(f"{ours}/{our_name}", f"{theirs}.{their_name}", True)
    ]


def _stack(stack: str, attentions: Mapping[str, str], norms: Mapping[str, str]) -> list[Name]:
    theirs = f"model.{stack}"
    ours_i, theirs_i = f"{stack}/layers_{{i}}", f"{theirs}.layers.{{i}}"
    positions = f"{stack}/position_embedder/embedding"
    names = [Name(positions, f"{theirs}.embed_positions.weight")]
    names += _weights(f"{stack}/embedding_layer_norm", f"{theirs}.layernorm_embedding", False)
    for ours, their_name in attentions.items():
        names += _attention(f"{ours_i}/{ours}", f"{theirs_i}.{their_name}")
    for ours, their_name in norms.items():
        names += _weights(f"{ours_i}/{ours}_layer_norm", f"{theirs_i}.{their_name}", False)
    for ours, their_name in {"wi": "fc1", "wo": "fc2"}.items():
        names += _weights(f"{ours_i}/mlp/{ours}", f"{theirs_i}.{their_name}", True)
    return names


NAMES = (
    Name("token_embedder/embedding", SHARED),
    *_stack(
        "encoder",
        {"attention": "self_attn"},
        {"attention": "self_attn_layer_norm", "mlp": "final_layer_norm"},
    ),
    *_stack(
        "decoder",
        {"self_attention": "self_attn", "encoder_decoder_attention": "encoder_attn"},
        {
            "self_attention": "self_attn_layer_norm",
            "cross_attention": "encoder_attn_layer_norm",
            "mlp": "final_layer_norm",
        },
    ),
    Name("decoder/final_logits_bias", BIAS),
)

REDUNDANT = Redundant(
    duplicates=(
        ("model.encoder.embed_tokens.weight", SHARED),
        ("model.decoder.embed_tokens.weight", SHARED),
        ("lm_head.weight", SHARED),
    ),
    ignored=(r"model\.(encoder|decoder)\.version",),
    prefix="model.",
)


def config_from_hf(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> BartConfig:
    """Reads a config.json; whether there is a final_logits_bias, the tensors say."""
    config_json.check_fixed(settings, _FIXED, "BART")
    copies = [copy for copy, _ in REDUNDANT.duplicates]
    config_json.check_tied(settings, tensors, copies, "BART")
    sizes = {
        f"{stack}_{name}": settings.get(f"{stack}_{name}", default)
        for stack in ("encoder", "decoder")
        for name, default in _DEFAULTS.items()
    }
    for name in _SAME.values():
        if sizes[f"encoder_{name}"] != sizes[f"decoder_{name}"]:
            raise UserError(
                f"config.json says encoder_{name}={sizes[f'encoder_{name}']} and decoder_{name}="
                f"{sizes[f'decoder_{name}']}; BART here has one for both."
            )
    return BartConfig(
        vocab_size=settings.get("vocab_size", 50265),
        emb_dim=settings.get("d_model", 1024),
        num_heads=sizes["encoder_attention_heads"],
        mlp_dim=sizes["encoder_ffn_dim"],
        num_encoder_layers=sizes["encoder_layers"],
        num_decoder_layers=sizes["decoder_layers"],
        num_positions=settings.get("max_position_embeddings", 1024),
        activation=config_json.activation(settings, "activation_function", "gelu", _ACTIVATIONS),
        scale_embedding=settings.get("scale_embedding", False),
        final_logits_bias=BIAS in tensors,
        dropout_rate=settings.get("dropout", 0.1),
        attention_dropout_rate=settings.get("attention_dropout", 0.0),
        activation_dropout_rate=settings.get("activation_dropout", 0.0),
        param_dtype=config_json.param_dtype(tensors),
    )


def config_to_hf(config: BartConfig) -> dict[str, Any]:
    """Returns a config.json."""
    activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items()} | {"swish": "silu"}
    if config.activation not in activations:
        raise UserError(f"Hugging Face's BART has no activation '{config.activation}'.")
    both = {
        f"{stack}_{theirs}": getattr(config, ours)
        for stack in ("encoder", "decoder")
        for ours, theirs in _SAME.items()
    }
    return {
        "architectures": ["BartForConditionalGeneration"],
        "model_type": "bart",
        "vocab_size": config.vocab_size,
        "d_model": config.emb_dim,
        **both,
        "encoder_layers": config.num_encoder_layers,
        "decoder_layers": config.num_decoder_layers,
        "max_position_embeddings": config.num_positions,
        "activation_function": activations[config.activation],
        "scale_embedding": config.scale_embedding,
        "dropout": config.dropout_rate,
        "attention_dropout": config.attention_dropout_rate,
        "activation_dropout": config.activation_dropout_rate,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "init_std": 0.02,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
    }


def token_ids(settings: Mapping[str, Any]) -> dict[str, int]:
    """BART's ids, unless config.json sets others."""
    return config_json.token_ids(settings, pad=1, eos=2, start=2)
