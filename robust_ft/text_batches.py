"""Batches for decoding and scoring: padded to buckets of lengths and sizes, with their masks.

Each shape is a program of its own, and texts are of many lengths and numbers: buckets keep the
programs few.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, Int32

from robust_ft.errors import UserError

Row = TypeVar("Row")

# All buckets of lengths are multiples of it.
CHUNK = 16


def whole_inputs(
    batch: Mapping[str, np.ndarray], pad_id: int, eos_id: int
) -> dict[str, np.ndarray]:
    """Returns the features of a batch that are read before the target, the mask among them.

    Raises:
        UserError: The mask has another shape than the tokens, or seems to be missing.
    """
    batch = input_features(batch)
    tokens, mask = batch["encoder_input_tokens"], batch.get("encoder_input_mask")
    if mask is not None:
        if mask.shape != tokens.shape:
            raise UserError(
                f"encoder_input_mask has shape {mask.shape}, encoder_input_tokens {tokens.shape}."
            )
        return {**batch, "encoder_input_mask": np.asarray(mask, bool)}
    # Padding is often EOS, and then a single row may end in it: it needs no padding.
    if (tokens[:, -1:] == pad_id).any() and (len(tokens) > 1 or pad_id != eos_id):
        raise UserError(
            f"Rows of encoder_input_tokens end in the padding, {pad_id}, but the batch has no "
            "encoder_input_mask [batch, source]; give it, True for tokens and False for padding."
        )
    return {**batch, "encoder_input_mask": np.ones(tokens.shape, bool)}


def input_features(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the features of a batch that are read before the target."""
    return {k: v for k, v in batch.items() if k.startswith("encoder_") or k == "task_index"}


def input_batch(
    inputs: Sequence[Sequence[int]], length: int | None, pad_id: int
) -> dict[str, np.ndarray]:
    """Returns the features of inputs, padded to a length or else to their bucket."""
    tokens, mask = padded(inputs, length, pad_id)
    return {"encoder_input_tokens": tokens, "encoder_input_mask": mask}


def ranking_batch(
    inputs: Sequence[Sequence[int]],
    choices: Sequence[Sequence[Sequence[int]]],
    length: int | None,
    pad_id: int,
) -> dict[str, np.ndarray]:
    """Returns a batch whose targets are the choices of all inputs: [inputs * choices, target].

    Choices that fill up an input's repeat its first.
    """
    most = max(map(len, choices))
    targets = [ids for row in choices for ids in [*row, *[row[0]] * (most - len(row))]]
    tokens, mask = padded(targets, None, pad_id)
    return input_batch(inputs, length, pad_id) | {
        "decoder_target_tokens": tokens,
        "decoder_loss_weights": mask.astype(np.float32),
    }


def filled(rows: Sequence[Row], batch_size: int, shards: int) -> list[Row]:
    """Returns the rows of a batch whose size is a bucket: `shards` times a power of 2.

    Rows that fill it up repeat the first: empty ones might decode longer than all others.
    """
    size = shards
    while size < len(rows):
        size *= 2
    return [*rows, *[rows[0]] * (min(size, batch_size) - len(rows))]


def padded(
    sequences: Sequence[Sequence[int]], length: int | None, pad_id: int
) -> tuple[Int32[np.ndarray, "batch length"], Bool[np.ndarray, "batch length"]]:
    """Returns token ids padded to a length, else to their bucket, and which are no padding."""
    length = length or bucket(max(map(len, sequences)))
    tokens = np.full((len(sequences), length), pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, sequence in enumerate(sequences):
        tokens[i, : len(sequence)] = sequence
        mask[i, : len(sequence)] = True
    return tokens, mask


def check_texts(name: str, texts: Sequence[str]) -> None:
    """Raises a UserError for one text in the place of a list of texts."""
    if isinstance(texts, str):
        raise UserError(f"{name} must be a list of texts, not one text; write [{texts[:20]!r}].")


def bucket(length: int) -> int:
    """Returns the bucket of a length: a power of 2, above 64 a multiple of 64."""
    bucket = CHUNK
    while bucket < min(length, 64):
        bucket *= 2
    return bucket if length <= 64 else -(-length // 64) * 64
