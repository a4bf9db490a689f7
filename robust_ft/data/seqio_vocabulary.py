"""Our vocabularies as seqio's, for the `output_features` of a seqio task."""

from collections.abc import Sequence
from typing import Any

import seqio
import tensorflow as tf

from robust_ft.vocabulary import Vocabulary


class SeqioVocabulary(seqio.Vocabulary):
    """A `seqio.Vocabulary` around one of `robust_ft.vocabulary`.

    The tensorflow variants leave the graph (`py_function`) and run in this process: right for
    building a cache and for tests, not for serving.
    """

    def __init__(self, vocabulary: Vocabulary):
        """Wraps `vocabulary`, whose extra ids are part of its size."""
        self.vocabulary = vocabulary
        super().__init__(extra_ids=0)

    @property
    def bos_id(self) -> int | None:
        """None: T5's decoder starts with padding."""
        return None

    @property
    def eos_id(self) -> int:
        """End of a sequence."""
        return self.vocabulary.eos_id

    @property
    def pad_id(self) -> int:
        """Padding."""
        return self.vocabulary.pad_id

    @property
    def unk_id(self) -> int | None:
        """The unknown token, None if the vocabulary has none."""
        return self.vocabulary.unk_id

    @property
    def _base_vocab_size(self) -> int:
        return self.vocabulary.vocab_size

    def _encode(self, s: str) -> Sequence[int]:
        return self.vocabulary.encode(s)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.vocabulary.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(text: Any) -> Any:
            return tf.constant(self.vocabulary.encode(text.numpy().decode("utf-8")), tf.int32)

        ids = tf.py_function(encode, [s], tf.int32)
        ids.set_shape([None])
        return ids

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        """Decodes int32[length] to a string or int32[batch, length] to strings."""

        def decode(tokens: Any) -> Any:
            array = tokens.numpy()
            if array.ndim == 1:
                return tf.constant(self.vocabulary.decode(array.tolist()))
            return tf.constant([self.vocabulary.decode(row) for row in array.tolist()], tf.string)

        text = tf.py_function(decode, [ids], tf.string)
        text.set_shape(ids.shape[:-1])
        return text

    def __eq__(self, other: object) -> bool:
        """Equal if content and settings are, as a mixture of tasks requires."""
        if not isinstance(other, SeqioVocabulary):
            return False
        return self.vocabulary.fingerprint == other.vocabulary.fingerprint

    def __hash__(self) -> int:
        return hash(self.vocabulary.fingerprint)

    def __str__(self) -> str:
        return f"SeqioVocabulary({self.vocabulary})"
