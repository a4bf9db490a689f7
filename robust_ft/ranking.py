"""Rank classification: the batches of inputs with their answer choices, and what they are worth."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from robust_ft import text_batches
from robust_ft.decoding import repeat_rows
from robust_ft.errors import UserError
from robust_ft.models.model import LanguageModel
from robust_ft.text_batches import CHUNK
from robust_ft.types import Batch
from robust_ft.vocabulary import Vocabulary, encode_targets


class Ranked(NamedTuple):
    """The result of rank classification.

    Attributes:
        best: The index of each input's most likely choice; ties go to the first.
        scores: Log-likelihoods in nats; -inf where an input has fewer choices than others.
    """

    best: Int[np.ndarray, "inputs"]
    scores: Float[np.ndarray, "inputs choices"]


def encoded_choices(
    vocabulary: Vocabulary, index: int, choices: Sequence[str], most: int
) -> list[list[int]]:
    """Returns the tokens of an input's choices, none of which may have more than `most`."""
    text_batches.check_texts("Each input's choices", choices)
    if not choices:
        raise UserError(f"Input {index} has no choices.")
    encoded = [list(encode_targets(vocabulary, text)) for text in choices]
    for text, ids in zip(choices, encoded, strict=True):
        if len(ids) > most:
            raise UserError(
                f"Target '{text[:40]}...' of input {index} has {len(ids)} tokens, more "
                f"than targets_length={most}."
            )
    return encoded


def groups(
    input_ids: Sequence[Sequence[int]],
    choice_ids: Sequence[Sequence[Sequence[int]]],
    batch_size: int,
    shards: int,
) -> Iterator[tuple[list[int], list[int]]]:
    """Yields the inputs of each batch: as many choices each, and of similar length.

    Args:
        input_ids: Tokens of the inputs.
        choice_ids: Tokens of each input's choices.
        batch_size: The most choices in a batch, unless a single input has more.
        shards: What the number of a batch's inputs is a multiple of.

    Yields:
        The inputs' indices, and the same with those that fill up the batch.
    """
    counts = [len(of_input) for of_input in choice_ids]
    lengths = [len(input_ids[n]) + max(map(len, choice_ids[n])) for n in range(len(counts))]
    remaining = sorted(range(len(counts)), key=lambda n: (-counts[n], -lengths[n]))
    while remaining:
        rows = max(batch_size // counts[remaining[0]] // shards, 1) * shards
        indices, remaining = remaining[:rows], remaining[rows:]
        yield indices, text_batches.filled(indices, rows, shards)


def log_likelihoods(
    model: LanguageModel, params: Any, batch: Batch
) -> Float[Array, "batch choices"]:
    """Sums log-probabilities in chunks of the targets, so that all logits are never in memory.

    Args:
        model: The model.
        params: All of its parameters.
        batch: From `text_batches.ranking_batch`.
    """
    inputs, targets = (
        text_batches.input_features(batch),
        batch["decoder_target_tokens"],
    )  # [batch * choices, length]
    rows = inputs["encoder_input_tokens"].shape[0]
    # One prefill for all choices of an input.
    start, cache = repeat_rows(
        model.prefill(params, inputs, targets.shape[1]), targets.shape[0] // rows
    )
    shifted = jnp.concatenate([start[:, None], targets[:, :-1]], axis=1)
    hidden, _ = model.extend(params, cache, shifted)
    size = min(CHUNK, targets.shape[1])

    def chunked(x: jax.Array) -> jax.Array:
        """[batch * choices, length, ...] -> [chunks, batch * choices, size, ...]"""
        shape = (x.shape[0], x.shape[1] // size, size, *x.shape[2:])
        return jnp.swapaxes(x.reshape(shape), 0, 1)

    def score(chunk: tuple[Any, jax.Array, jax.Array]) -> Float[Array, "targets"]:
        states, tokens, weights = chunk
        log_probs = jax.nn.log_softmax(model.head(params, states))
        target_log_probs = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
        return jnp.sum(target_log_probs * weights, axis=1)

    chunks = jax.tree.map(chunked, (hidden, targets, batch["decoder_loss_weights"]))
    return jnp.sum(jax.lax.map(score, chunks), axis=0).reshape(rows, -1)


def per_token(
    scores: Float[np.ndarray, "*prompts inputs choices"],
    choice_ids: Sequence[Sequence[Sequence[int]]],
) -> Float[np.ndarray, "*prompts inputs choices"]:
    """Returns log-likelihoods divided by the choices' numbers of tokens."""
    lengths = np.ones(scores.shape[-2:])
    for row, of_input in zip(lengths, choice_ids, strict=True):
        row[: len(of_input)] = [len(ids) for ids in of_input]
    return (scores / lengths).astype(scores.dtype)


compiled_log_likelihoods = functools.partial(jax.jit, static_argnums=0)(log_likelihoods)
