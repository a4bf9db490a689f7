"""Text to token ids and back, without tensorflow: bytes, SentencePiece, `tokenizers`.

Every vocabulary is a frozen, hashable dataclass that holds the paths of its files and reads them on
first use; `vocabulary_from_directory` returns the right one for a Hugging Face model directory.

`encode_inputs(vocabulary, text, length)` gives a model's input ids for a text and `encode_targets`
its target ids: caches, evaluation and `Predictor` all use these.
"""

from robust_ft.vocabulary.base import Vocabulary, cut, encode_inputs, encode_targets
from robust_ft.vocabulary.byte import ByteVocabulary
from robust_ft.vocabulary.directory import (
    vocabulary_files,
    vocabulary_from_directory,
    vocabulary_settings,
)
from robust_ft.vocabulary.hub import AddedToken, BpeVocabulary, TokenizersVocabulary
from robust_ft.vocabulary.hub_files import write_hub_files
from robust_ft.vocabulary.sentence_piece import SentencePieceVocabulary

__all__ = [
    "AddedToken",
    "BpeVocabulary",
    "ByteVocabulary",
    "SentencePieceVocabulary",
    "TokenizersVocabulary",
    "Vocabulary",
    "cut",
    "encode_inputs",
    "encode_targets",
    "vocabulary_files",
    "vocabulary_from_directory",
    "vocabulary_settings",
    "write_hub_files",
]
