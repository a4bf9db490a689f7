"""T5 1.0, T5 1.1, LM-adapted T5, mT5 and ByT5 as Hugging Face names them."""

from collections.abc import Mapping
from typing import Any

from robust_ft.checkpoints_io import config_json
from robust_ft.checkpoints_io.names import Name, Redundant
from robust_ft.checkpoints_io.tensors import Tensor
from robust_ft.errors import UserError
from robust_ft.models.t5 import T5Config

CONFIG = T5Config
TIED_BY_DEFAULT = True
SHARED, HEAD = "shared.weight", "lm_head.weight"
_SCALED = "scale_decoder_outputs"
_BIAS = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
_GATED = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"

# Hugging Face's "gated-gelu" is computed with gelu_new, the tanh approximation, as ours is.
_ACTIVATIONS = {
    "relu": ("relu",),
    "gelu_new": ("gelu",),
    "silu": ("silu",),
    "gated-gelu": ("gelu", "linear"),
    "gated-gelu_new": ("gelu", "linear"),
    "gated-silu": ("silu", "linear"),
    "gated-relu": ("relu", "linear"),
}
_PROJECTIONS = {
    ("relu",): "relu",
    ("gelu",): "gelu_new",
    ("silu",): "silu",
    ("swish",): "silu",
    ("gelu", "linear"): "gated-gelu",
    ("silu", "linear"): "gated-silu",
    ("swish", "linear"): "gated-silu",
    ("relu", "linear"): "gated-relu",
}


def _attention(ours: str, theirs: str) -> list[Name]:
    letters = {"query": "q", "key": "k", "value": "v", "out": "o"}
    return [
        Name(f"{ours}/{name}/kernel", f"{theirs}.{letter}.weight", transpose=True)
        for name, letter in letters.items()
    ]


def _mlp(ours: str, theirs: str) -> list[Name]:
    return [
        Name(f"{ours}/mlp/{name}/kernel", f"{theirs}.DenseReluDense.{name}.weight", transpose=True)
        for name in ("wi", "wi_0", "wi_1", "wo")
    ]


def _stack(ours: str, sublayers: tuple[tuple[str, str, str], ...]) -> list[Name]:
    names = [
        Name(f"{ours}/relpos_bias/rel_embedding", f"{ours}.{_BIAS}", transpose=True),
        Name(f"{ours}/{ours}_norm/scale", f"{ours}.final_layer_norm.weight"),
    ]
    for i, (name, norm, theirs) in enumerate(sublayers):
        layer, block = f"{ours}/layers_{{i}}", f"{ours}.block.{{i}}.layer.{i}"
        names.append(Name(f"{layer}/{norm}/scale", f"{block}.layer_norm.weight"))
        if name == "mlp":
            names += _mlp(layer, block)
        else:
            names += _attention(f"{layer}/{name}", f"{block}.{theirs}")
    return names


NAMES = (
    Name("token_embedder/embedding", SHARED),
    *_stack(
        "encoder",
        (
            ("attention", "pre_attention_layer_norm", "SelfAttention"),
            ("mlp", "pre_mlp_layer_norm", ""),
        ),
    ),
    *_stack(
        "decoder",
        (
            ("self_attention", "pre_self_attention_layer_norm", "SelfAttention"),
            ("encoder_decoder_attention", "pre_cross_attention_layer_norm", "EncDecAttention"),
            ("mlp", "pre_mlp_layer_norm", ""),
        ),
    ),
    Name("decoder/logits_dense/kernel", HEAD, transpose=True),
)

REDUNDANT = Redundant(
    duplicates=(
        ("encoder.embed_tokens.weight", SHARED),
        ("decoder.embed_tokens.weight", SHARED),
        (HEAD, SHARED),
    ),
    # The first T5 files hold a position bias in cross-attention, which the model never reads.
    ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
)


def config_from_hf(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> T5Config:
    """Reads a config.json; where a flag's meaning has changed over time, the tensors decide."""
    multilingual = settings.get("model_type") == "mt5"
    config_json.check_fixed(settings, {"layer_norm_epsilon": 1e-6}, "T5")
    # A config.json may leave out what is the default of its class in `transformers`.
    layers = settings.get("num_layers", 8 if multilingual else 6)
    decoder_layers = settings.get("num_decoder_layers")
    default_projection = "gated-gelu" if _GATED in tensors else "relu"
    return T5Config(
        vocab_size=settings.get("vocab_size", 250112 if multilingual else 32128),
        emb_dim=settings.get("d_model", 512),
        num_heads=settings.get("num_heads", 6 if multilingual else 8),
        head_dim=settings.get("d_kv", 64),
        mlp_dim=settings.get("d_ff", 1024 if multilingual else 2048),
        num_encoder_layers=layers,
        num_decoder_layers=layers if decoder_layers is None else decoder_layers,
        mlp_activations=config_json.activation(
            settings, "feed_forward_proj", default_projection, _ACTIVATIONS
        ),
        **_head(settings, tensors),
        relative_num_buckets=settings.get("relative_attention_num_buckets", 32),
        relative_max_distance=settings.get("relative_attention_max_distance", 128),
        dropout_rate=settings.get("dropout_rate", 0.1),
        param_dtype=config_json.param_dtype(tensors),
    )


def config_to_hf(config: T5Config) -> dict[str, Any]:
    """Returns a config.json that every version of `transformers` reads alike."""
    if config.mlp_activations not in _PROJECTIONS:
        raise UserError(f"Hugging Face's T5 has no feed_forward_proj for {config.mlp_activations}.")
    projection = _PROJECTIONS[config.mlp_activations]
    settings = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": config.vocab_size,
        "d_model": config.emb_dim,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "num_heads": config.num_heads,
        "relative_attention_num_buckets": config.relative_num_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
        "feed_forward_proj": projection,
        "is_gated_act": projection.startswith("gated-"),
        "dropout_rate": config.dropout_rate,
        "layer_norm_epsilon": 1e-6,
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        # Version 5 of `transformers` reads it as "scale the decoder's output", earlier ones as
        # "tie the head to the embedding, and scale".
        "tie_word_embeddings": config.logits_via_embedding,
        "use_cache": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }
    return settings | scaling(settings, config)


def tied(settings: Mapping[str, Any]) -> dict[str, str]:
    """Returns head and embedding as tied to each other if version 5 of `transformers` ties them.

    That version ties every head, including those whose input it does not scale, and leaves it out
    of its files. In files of earlier versions a head that is missing has been lost.
    """
    saved_by_5 = _SCALED in settings or settings.get("model_type") == "mt5"
    if not saved_by_5 or not settings.get("tie_word_embeddings", True):
        return {}
    return {HEAD: SHARED, SHARED: HEAD}


def scaling(settings: Mapping[str, Any], config: T5Config) -> dict[str, bool]:
    """Returns the flag that says whether the head's input is scaled, if nothing else does."""
    scaled = config.logits_via_embedding or config.scaled_head
    return {} if _is_scaled(settings) == scaled else {_SCALED: scaled}


def token_ids(settings: Mapping[str, Any]) -> dict[str, int]:
    """T5's ids, unless config.json sets others."""
    return config_json.token_ids(settings, pad=0, eos=1, start=0)


def _head(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns the fields that say what the head is: the embedding or its own, scaled or not.

    A head that differs from the embedding is not tied, whatever the flags say: version 5 of
    `transformers` writes `tie_word_embeddings: true` for all models.
    """
    scaled = _is_scaled(settings)
    head = tensors.get(HEAD)
    copies = (SHARED, *(copy for copy, _ in REDUNDANT.duplicates if copy != HEAD))
    embedding = next((tensors[name] for name in copies if name in tensors), None)
    own = head is not None and embedding is not None and not head.equals(embedding)
    return {"logits_via_embedding": scaled and not own, "scaled_head": scaled and own}


def _is_scaled(settings: Mapping[str, Any]) -> bool:
    """Returns whether version 5 of `transformers` scales what the head reads by d_model^-0.5."""
    if settings.get("model_type") == "mt5":
        return False
    return bool(settings.get(_SCALED, settings.get("tie_word_embeddings") is not False))
