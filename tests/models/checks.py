"""What tests of every model family need: jitted functions and models of Hugging Face's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from robust_ft.checkpoints_io import sources
from robust_ft.models.model import Model
from robust_ft.objectives import CrossEntropy
from robust_ft.trainable import unflatten

logits_of = jax.jit(
    lambda model, params, batch, rng=None: model.logits(params, batch, rng), static_argnums=0
)


def mean_loss(model, params, batch, rng=None):
    loss, weight, _ = CrossEntropy()(model, params, batch, rng)
    return loss / weight


grad_of = jax.jit(jax.grad(mean_loss, argnums=1), static_argnums=0)


@functools.partial(jax.jit, static_argnums=(0, 3))
def decode_cached(model, params, batch, max_length):
    """Returns log-probabilities [batch, target, vocab], token by token.

    Decoder-only models have a separator here, so that the prefill reads all of the input.
    """
    _, cache = model.prefill(params, batch, max_length)

    def body(cache, tokens):
        log_probs, cache = model.step(params, cache, tokens)
        return cache, log_probs

    _, log_probs = jax.lax.scan(body, cache, batch["decoder_input_tokens"].T)
    return jnp.swapaxes(log_probs, 0, 1)


def with_start_and_pad(batch, start_id, pad_id):
    """Returns a batch of `tiny_models` (both ids 0) with these ids; no token may be `pad_id`."""
    batch = dict(batch)
    for name in ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens"):
        tokens = batch[name]
        assert not np.any(tokens == pad_id)
        batch[name] = np.where(tokens == 0, pad_id, tokens).astype(np.int32)
    batch["decoder_input_tokens"][:, 0] = start_id
    return batch


def scattered(batch, seed=0, extra=3, pad_id=0):
    """Returns the batch with padding anywhere in its inputs: before, between and behind tokens."""
    rng = np.random.default_rng(seed)
    tokens, mask = batch["encoder_input_tokens"], batch["encoder_input_mask"]
    rows = np.full((tokens.shape[0], tokens.shape[1] + extra), pad_id, np.int32)
    is_token = np.zeros(rows.shape, bool)
    for row, of_row, old, kept in zip(rows, is_token, tokens, mask, strict=True):
        of_row[rng.choice(len(row), kept.sum(), replace=False)] = True
        row[of_row] = old[kept]
    return batch | {"encoder_input_tokens": rows, "encoder_input_mask": is_token}


def randomize(reference, seed=0):
    """Draws all of a PyTorch model's tensors so that none is 0 and logits have a scale of 1."""
    import torch

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in {**dict(reference.named_parameters()), **buffers(reference)}.items():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 2 and "bias" not in name:
                # Linear layers have the inputs last, GPT-2's first, embeddings last.
                inputs = value.shape[0] if "attn.c_" in name or "mlp.c_" in name else -1
                value.copy_(noise * (inputs if inputs > 0 else value.shape[1]) ** -0.5)
            else:
                value.copy_(0.2 * noise + (name.endswith("weight")))
    return reference.eval()


def buffers(reference):
    return {n: b for n, b in reference.named_buffers() if n == "final_logits_bias"}


def converted(reference, folder, peft=(), **changes):
    """Returns our model and its parameters after PyTorch's went over files."""
    reference.save_pretrained(folder)
    checkpoint = sources.read(str(folder), overrides=changes)
    ids = {f"{name}_id": value for name, value in checkpoint.token_ids.items()}
    params = unflatten({path: jnp.asarray(value) for path, value in checkpoint.load().items()})
    return Model(checkpoint.config, peft, **ids), params
