"""Examples as records of bytes, and as padded or packed batches of arrays.

A record is two little-endian uint32 lengths (inputs, targets), the token ids of both, and, for
evaluation splits, a msgpack map of texts. The ids come first, so that a batch is decoded with a few
numpy calls.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgpack
import numpy as np
from jaxtyping import Float32, Int32, Int64

_HEADER = np.dtype("<u4")

# t5x's feature names of one batch.
Arrays = dict[str, np.ndarray]


def token_dtype(vocab_size: int) -> str:
    """Returns the numpy name of the smallest dtype that holds every token id."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def encode(
    inputs: Sequence[int] | np.ndarray,
    targets: Sequence[int] | np.ndarray,
    dtype: str,
    texts: Mapping[str, Any] | None,
) -> bytes:
    """Returns the record of one example.

    Args:
        inputs: Token ids, EOS included.
        targets: Token ids, EOS included.
        dtype: The vocabulary's `token_dtype`.
        texts: Strings and lists of strings by name, or None to keep none.
    """
    head = np.array([len(inputs), len(targets)], _HEADER).tobytes()
    tokens = np.asarray(inputs, dtype).tobytes() + np.asarray(targets, dtype).tobytes()
    return head + tokens + (msgpack.packb(dict(texts)) if texts else b"")


def decode(
    record: bytes, dtype: str
) -> tuple[Int32[np.ndarray, " inputs"], Int32[np.ndarray, " targets"]]:
    """Returns the token ids of one record, EOS included, without padding."""
    num_inputs, num_targets = (int(n) for n in np.frombuffer(record, _HEADER, 2))
    tokens = np.frombuffer(record, dtype, num_inputs + num_targets, _HEADER.itemsize * 2)
    tokens = tokens.astype(np.int32)
    return tokens[:num_inputs], tokens[num_inputs:]


def decode_texts(record: bytes, dtype: str) -> dict[str, Any]:
    """Returns the texts of one record, empty if it keeps none."""
    lengths = np.frombuffer(record, _HEADER, 2)
    start = 2 * _HEADER.itemsize + int(lengths.sum()) * np.dtype(dtype).itemsize
    return msgpack.unpackb(record[start:]) if start < len(record) else {}


def pad_right(
    sequences: Sequence[np.ndarray], length: int, rows: int = 0, pad_id: int = 0
) -> Int32[np.ndarray, "rows length"]:
    """Returns `sequences` as rows, padded with `pad_id` to `length` and to at least `rows` rows.

    Raises:
        ValueError: If a sequence is longer than `length`; nothing is cut silently.
    """
    lengths = _lengths(sequences)
    if lengths.size and lengths.max() > length:
        raise ValueError(f"a sequence of {lengths.max()} tokens does not fit into {length}")
    out = np.full((max(rows, len(sequences)), length), pad_id, np.int32)
    if lengths.size:
        # One assignment for all rows: the mask [sequences, length] is filled in row-major order,
        # which is the order of `concatenate`.
        out[: len(sequences)][np.arange(length) < lengths[:, None]] = np.concatenate(sequences)
    return out


def model_batch(
    inputs: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    inputs_length: int,
    targets_length: int,
    rows: int = 0,
    pad_id: int = 0,
    start_id: int = 0,
) -> Arrays:
    """Returns t5x's features for examples without padding, one a row.

    Decoder inputs are the targets shifted right by one, after `start_id`. Loss weights are 0 after
    the end of a row's targets. They go by position and not by id, since the padding of some models
    is a token that they also use, such as EOS.

    Args:
        inputs: Token ids of each example.
        targets: Token ids of each example.
        inputs_length: Encoder tokens of each row.
        targets_length: Decoder tokens of each row.
        rows: Smallest number of rows; those without an example are all padding.
        pad_id: The vocabulary's padding.
        start_id: The model's first token of all decoder inputs.

    Raises:
        ValueError: An example is longer than its length.
    """
    padded = pad_right(targets, targets_length, rows, pad_id)
    lengths = np.zeros(len(padded), np.int64)
    lengths[: len(targets)] = _lengths(targets)
    return {
        "encoder_input_tokens": pad_right(inputs, inputs_length, rows, pad_id),
        "decoder_input_tokens": shift_right(padded, start_id),
        "decoder_target_tokens": padded,
        "decoder_loss_weights": (np.arange(targets_length) < lengths[:, None]).astype(np.float32),
    }


def packed_batch(
    packed: Mapping[str, Int32[np.ndarray, "batch length"]], pad_id: int = 0, start_id: int = 0
) -> Arrays:
    """Returns t5x's features for rows that Grain packed, with segment ids.

    Every segment's decoder inputs start with `start_id`, so no example sees its neighbour's last
    token. Segment ids count from 1 in a row and are 0 on padding. t5x's positions are left out:
    our models derive them from the segment ids.
    """
    is_target = packed["targets_segment_ids"] > 0
    targets = np.where(is_target, packed["targets"], pad_id).astype(np.int32)
    inputs = np.where(packed["inputs_segment_ids"] > 0, packed["inputs"], pad_id).astype(np.int32)
    is_first = packed["targets_positions"] == 0  # also everywhere in the padding
    first = np.where(is_target, start_id, pad_id)
    decoder_inputs = np.where(is_first, first, shift_right(targets, start_id))
    weights: Float32[np.ndarray, "batch length"] = is_target.astype(np.float32)
    return {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": decoder_inputs.astype(np.int32),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": weights,
        "encoder_segment_ids": packed["inputs_segment_ids"],
        "decoder_segment_ids": packed["targets_segment_ids"],
    }


def shift_right(
    tokens: Int32[np.ndarray, "batch length"], start_id: int = 0
) -> Int32[np.ndarray, "batch length"]:
    """Returns `tokens` moved one place to the right, with `start_id` in the first place."""
    shifted = np.full_like(tokens, start_id)
    shifted[:, 1:] = tokens[:, :-1]
    return shifted


def _lengths(sequences: Sequence[np.ndarray]) -> Int64[np.ndarray, " sequences"]:
    return np.fromiter((len(s) for s in sequences), np.int64, len(sequences))
