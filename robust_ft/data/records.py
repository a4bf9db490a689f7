"""One example as bytes: token ids first, so that a batch is read with a few numpy calls.

A record is two little-endian uint32 lengths (inputs, targets), the ids of both, and, for splits
that are evaluated, a msgpack map of texts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgpack
import numpy as np
from jaxtyping import Float32, Int32

_HEADER = np.dtype("<u4")

# t5x's feature names of one batch.
Arrays = dict[str, np.ndarray]


def token_dtype(vocab_size: int) -> str:
    """Returns the numpy name of the smallest type that holds every id."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def encode(
    inputs: Sequence[int] | np.ndarray,
    targets: Sequence[int] | np.ndarray,
    dtype: str,
    texts: Mapping[str, Any] | None,
) -> bytes:
    """Returns the record of one example.

    Args:
      inputs: token ids, EOS included.
      targets: token ids, EOS included.
      dtype: what `token_dtype` said for the vocabulary.
      texts: strings and lists of strings by name, or None to keep none.
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
    sequences: Sequence[np.ndarray], length: int, rows: int = 0
) -> Int32[np.ndarray, "rows length"]:
    """Returns `sequences` under each other, filled up with 0 to `length` and to `rows` rows.

    Raises:
      ValueError: if a sequence is longer than `length`; nothing is cut silently.
    """
    lengths = np.fromiter((len(s) for s in sequences), np.int64, len(sequences))
    if lengths.size and lengths.max() > length:
        raise ValueError(f"a sequence of {lengths.max()} tokens does not fit into {length}")
    out = np.zeros((max(rows, len(sequences)), length), np.int32)
    if lengths.size:
        # One masked assignment fills row after row, in the order of `concatenate`.
        out[: len(sequences)][np.arange(length) < lengths[:, None]] = np.concatenate(sequences)
    return out


def model_batch(
    inputs: Int32[np.ndarray, "batch source"], targets: Int32[np.ndarray, "batch target"]
) -> Arrays:
    """Returns t5x's features for padded token ids.

    Decoder inputs are the targets shifted right by one, first 0; the loss weights are 0 on padding.
    """
    return {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": shift_right(targets),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets != 0).astype(np.float32),
    }


def packed_batch(packed: Mapping[str, Int32[np.ndarray, "batch length"]]) -> Arrays:
    """Returns t5x's features for rows that Grain packed, with segment ids and positions.

    Every segment's decoder inputs start with 0, so no example sees its neighbour's last token.
    Segment ids count from 1 in a row and are 0 on padding; positions count from 0 in a segment.
    """
    positions = packed["targets_positions"]
    decoder_inputs = np.where(positions == 0, 0, shift_right(packed["targets"]))
    weights: Float32[np.ndarray, "batch length"] = (packed["targets_segment_ids"] > 0).astype(
        np.float32
    )
    return {
        "encoder_input_tokens": packed["inputs"],
        "decoder_input_tokens": decoder_inputs.astype(np.int32),
        "decoder_target_tokens": packed["targets"],
        "decoder_loss_weights": weights,
        "encoder_segment_ids": packed["inputs_segment_ids"],
        "decoder_segment_ids": packed["targets_segment_ids"],
        "encoder_positions": packed["inputs_positions"],
        "decoder_positions": positions,
    }


def shift_right(tokens: Int32[np.ndarray, "batch length"]) -> Int32[np.ndarray, "batch length"]:
    """Returns `tokens` moved one place to the right, with 0 in the first place."""
    shifted = np.zeros_like(tokens)
    shifted[:, 1:] = tokens[:, :-1]
    return shifted
