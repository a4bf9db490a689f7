"""Small checkpoints of random tensors in memory, and ways to break files."""

import json

import jax.numpy as jnp
import numpy as np
from tiny_models import tiny_config

from robust_ft.checkpoints_io.tensors import Checkpoint, Tensor
from robust_ft.models.model import Model
from robust_ft.trainable import flatten

IDS = {"pad": 0, "eos": 1, "start": 0}
VARIANTS = {
    "t5_1_0": {"mlp_activations": ("relu",), "logits_via_embedding": True},
    "t5_1_1": {},
    "deeper_decoder": {"num_decoder_layers": 3, "relative_num_buckets": 8},
}


def random_checkpoint(seed=0, dtype="float32", **changes):
    """Returns a checkpoint of a tiny T5 whose bytes are random; norms and all."""
    config = tiny_config(relative_max_distance=20, param_dtype=kept(dtype), **changes)
    rng = np.random.default_rng(seed)
    tensors = {
        path: Tensor.of(np.asarray(rng.normal(size=leaf.shape), jnp.dtype(dtype)), path)
        for path, leaf in flatten(Model(config).shapes()).items()
    }
    return Checkpoint(f"random {seed}", "t5", config, tensors, IDS)


def kept(dtype):
    return "bfloat16" if dtype == "bfloat16" else "float32"


def same_tensors(one, other):
    """Returns whether names, types, shapes and bytes are the same."""
    one, other = getattr(one, "tensors", one), getattr(other, "tensors", other)
    return {k: t.digest() for k, t in one.items()} == {k: t.digest() for k, t in other.items()}


def edit_json(file, **changes):
    """Sets entries of a JSON file; None removes one."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def truncate(file, share=0.6):
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
