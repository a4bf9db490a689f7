"""A tiny model of every family, whose sizes differ from each other wherever they may."""

import jax.numpy as jnp
import numpy as np
from tiny_models import random_batch, random_params

from robust_ft.models.bart import BartConfig
from robust_ft.models.gpt2 import GPT2Config
from robust_ft.models.llama import LlamaConfig
from robust_ft.models.model import Model
from robust_ft.models.t5 import T5Config
from robust_ft.trainable import flatten, unflatten

VOCAB, PAD, START = 40, 0, 2
CONFIGS = {
    # heads * head_dim is not emb_dim
    "t5": T5Config(
        vocab_size=VOCAB,
        emb_dim=16,
        num_heads=2,
        head_dim=6,
        mlp_dim=24,
        num_encoder_layers=1,
        num_decoder_layers=2,
    ),
    "bart": BartConfig(
        vocab_size=VOCAB,
        emb_dim=15,
        num_heads=3,
        mlp_dim=22,
        num_encoder_layers=1,
        num_decoder_layers=2,
        num_positions=32,
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCAB,
        emb_dim=15,
        num_heads=3,
        mlp_dim=22,
        num_layers=2,
        num_positions=48,
    ),
    # Two heads of queries share keys and values.
    "llama": LlamaConfig(
        vocab_size=VOCAB,
        emb_dim=16,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        mlp_dim=24,
        num_layers=2,
        sliding_window=6,
        first_window_layer=1,
    ),
}


def model_of(family, *peft):
    config = CONFIGS[family]
    return Model(
        config, peft, PAD, start_id=START, separator_id=START if config.decoder_only else None
    )


def params_of(model, seed=0):
    """Random values for all parameters, those of PEFT methods included, with logits of scale 1."""
    flat = flatten(random_params(model, seed))
    for path, value in flat.items():
        if path.endswith(("/a", "/b")):
            flat[path] = 0.4 * value / np.sqrt(value.shape[0])  # an update is smaller than kernels
        elif path.endswith(("/u", "/v")):  # orthonormal, as OPLoRA computes them
            flat[path] = jnp.linalg.qr(value)[0]
        elif path == "token_embedder/embedding" and "decoder/logits_dense/kernel" not in flat:
            flat[path] = value / np.sqrt(value.shape[1])
    return unflatten(flat)


def batch_of(seed=0):
    """Two uneven examples."""
    batch = random_batch(seed, [6, 4], [5, 7])
    batch["decoder_input_tokens"][:, 0] = START
    return batch
