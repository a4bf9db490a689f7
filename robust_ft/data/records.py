"""Examples as records of bytes, and as padded or packed batches of arrays.

A record is two little-endian uint32 lengths (inputs, targets), the token ids of both, and a msgpack
map of texts (of training splits without those of inputs and targets). The ids come first, so that a
batch is decoded with a few numpy calls.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgpack
import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, Int64

from robust_ft.decoder_start import DecoderStart

_HEADER = np.dtype("<u4")
_ARRAY = 1  # msgpack's code of our extension type
# Of a batch, beside t5x's features: the numbers of its examples (`batching.ExampleReader`).
EXAMPLES = "example_numbers"

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


def pack(fields: Mapping[str, Any]) -> bytes:
    """Returns fields as seqio's examples have them: bytes, numbers, numpy arrays, dicts of these.

    Raises:
        TypeError: A field is something else, such as a ragged tensor.
    """
    packed: bytes = msgpack.packb(dict(fields), default=_pack_array)
    return packed


def unpack(packed: bytes) -> dict[str, Any]:
    """Returns what was given to `pack`, with equal types."""
    fields: dict[str, Any] = msgpack.unpackb(packed, ext_hook=_unpack_array)
    return fields


def _pack_array(value: Any) -> msgpack.ExtType:
    if not isinstance(value, np.ndarray | np.generic):
        raise TypeError(f"a {type(value).__name__} is neither bytes, a number nor an array")
    is_object = value.dtype.hasobject
    data = np.asarray(value).ravel().tolist() if is_object else value.tobytes()
    kind = "O" if is_object else value.dtype.str
    return msgpack.ExtType(_ARRAY, msgpack.packb([kind, list(value.shape), data]))


def _unpack_array(code: int, packed: bytes) -> Any:
    assert code == _ARRAY
    kind, shape, data = msgpack.unpackb(packed)
    if kind == "O":
        array = np.empty(len(data), object)
        array[:] = data
    else:
        array = np.frombuffer(data, kind).copy()
    return array.reshape(shape)[()]  # of no dimensions a scalar


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
    start: DecoderStart = DecoderStart(),
) -> Arrays:
    """Returns t5x's features for examples without padding, one a row, and `encoder_input_mask`.

    Decoder inputs are the targets shifted right by one, behind the first token that `start` gives;
    a token of the input that it takes is not among the encoder's. Mask and loss weights go by
    lengths and not by ids, since the padding of some models is a token that they also use, such as
    EOS.

    Args:
        inputs: Token ids of each example.
        targets: Token ids of each example.
        inputs_length: Encoder tokens of each row.
        targets_length: Decoder tokens of each row.
        rows: Smallest number of rows; those without an example are all padding.
        pad_id: The vocabulary's padding.
        start: Gives the decoder's first input token, the model's.

    Raises:
        ValueError: An example is longer than its length.
    """
    read, first = zip(*map(start.split, inputs), strict=True) if inputs else ((), ())
    padded = pad_right(targets, targets_length, rows, pad_id)  # [rows, target]
    first_tokens = np.full(len(padded), start.token, np.int32)
    first_tokens[: len(first)] = first
    weights = is_token(targets, targets_length, rows).astype(np.float32)
    return {
        "encoder_input_tokens": pad_right(read, inputs_length, rows, pad_id),
        "encoder_input_mask": is_token(read, inputs_length, rows),
        "decoder_input_tokens": shift_right(padded, first_tokens),
        "decoder_target_tokens": padded,
        "decoder_loss_weights": weights,
    }


def input_batch(
    inputs: Sequence[np.ndarray], length: int, rows: int = 0, pad_id: int = 0
) -> Arrays:
    """Returns the features of whole inputs without targets, as decoding reads them."""
    return {
        "encoder_input_tokens": pad_right(inputs, length, rows, pad_id),
        "encoder_input_mask": is_token(inputs, length, rows),
    }


def to_pack(inputs: np.ndarray, targets: np.ndarray, start: DecoderStart, number: int) -> Arrays:
    """Returns what is packed of one example: the decoder has a first token of its own in each."""
    read, first = start.split(inputs)
    return {
        "inputs": read,
        "decoder_inputs": shift_right(targets, first),
        "targets": targets,
        EXAMPLES: np.array([number], np.int32),
    }


def packed_batch(
    packed: Mapping[str, Int32[np.ndarray, "batch length"]], pad_id: int = 0
) -> Arrays:
    """Returns t5x's features for rows that Grain packed out of `to_pack`, with segment ids.

    Segment ids count from 1 in a row and are 0 on padding. t5x's positions are left out: our models
    derive them from the segment ids.
    """

    def padded(feature: str) -> Int32[np.ndarray, "batch length"]:
        is_token = packed[f"{feature}_segment_ids"] > 0
        return np.where(is_token, packed[feature], pad_id).astype(np.int32)

    weights: Float32[np.ndarray, "batch length"]
    weights = (packed["targets_segment_ids"] > 0).astype(np.float32)
    return {
        "encoder_input_tokens": padded("inputs"),
        "decoder_input_tokens": padded("decoder_inputs"),
        "decoder_target_tokens": padded("targets"),
        "decoder_loss_weights": weights,
        "encoder_segment_ids": packed["inputs_segment_ids"],
        "decoder_segment_ids": packed["targets_segment_ids"],
        EXAMPLES: packed[EXAMPLES][packed[f"{EXAMPLES}_segment_ids"] > 0].astype(np.int64),
    }


def is_token(
    sequences: Sequence[np.ndarray], length: int, rows: int = 0
) -> Bool[np.ndarray, "rows length"]:
    """Returns which places of `pad_right` hold a token of a sequence."""
    lengths = np.zeros(max(rows, len(sequences)), np.int64)
    lengths[: len(sequences)] = _lengths(sequences)
    return np.arange(length) < lengths[:, None]


def shift_right(
    tokens: Int32[np.ndarray, "... length"], first: Int[np.ndarray, "..."] | int
) -> Int32[np.ndarray, "... length"]:
    """Returns `tokens` moved one place to the right, with `first` in the first place."""
    shifted = np.empty_like(tokens)
    shifted[..., :1] = np.asarray(first, tokens.dtype)[..., None]
    shifted[..., 1:] = tokens[..., :-1]
    return shifted


def _lengths(sequences: Sequence[np.ndarray]) -> Int64[np.ndarray, " sequences"]:
    return np.fromiter((len(s) for s in sequences), np.int64, len(sequences))
