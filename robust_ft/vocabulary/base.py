"""The protocol of vocabularies, and the special ids that they put around a text."""

import abc
import hashlib
from collections.abc import Container, Iterable, Sequence
from typing import SupportsInt

from robust_ft import assets
from robust_ft.bucket_copies import local
from robust_ft.errors import UserError, nearest


class Vocabulary(abc.ABC):
    """Token ids of texts, and the special ids that a model was trained with.

    The three `..._ids` are T5's unless a class says otherwise: inputs and targets end in EOS and
    start with nothing.
    """

    @property
    @abc.abstractmethod
    def pad_id(self) -> int:
        """Id of padding. It may be another token's: positions of padding follow from lengths."""

    @property
    @abc.abstractmethod
    def eos_id(self) -> int:
        """Id that ends a sequence."""

    @property
    @abc.abstractmethod
    def unk_id(self) -> int | None:
        """Id of the unknown token, None if every text can be encoded without one."""

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, with the extra ids; a model may round its embedding up from this."""

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 (hex) of content and settings: equal ones give equal token ids."""

    @property
    def input_prefix_ids(self) -> tuple[int, ...]:
        """Ids before every input: `<s>` for BART, BOS for Llama."""
        return ()

    @property
    def input_suffix_ids(self) -> tuple[int, ...]:
        """Ids after every input: EOS for T5 and BART, none for decoder-only models."""
        return (self.eos_id,)

    @property
    def target_prefix_ids(self) -> tuple[int, ...]:
        """Ids before every target, trained like the others: `<s>` for BART. Targets end in EOS."""
        return ()

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of `text` alone, with nothing before or after."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """Text of `ids` up to the first EOS; padding and BOS are dropped."""


def same_vocabulary(vocabulary: Vocabulary, other: Vocabulary) -> bool:
    """Returns whether two vocabularies give equal token ids."""
    # A fingerprint needs the files, which preflight can do without.
    return vocabulary == other or vocabulary.fingerprint == other.fingerprint


def encode_inputs(vocabulary: Vocabulary, text: str, length: int | None = None) -> list[int]:
    """Returns a model's input ids for `text`, with the vocabulary's prefix and suffix.

    Args:
        vocabulary: Encodes the text.
        text: The text, without special tokens.
        length: Maximum number of ids, None for no limit. Truncation keeps the suffix.
    """
    suffix = vocabulary.input_suffix_ids
    ids = [*vocabulary.input_prefix_ids, *vocabulary.encode(text), *suffix]
    return cut(ids, length, suffix)


def encode_targets(vocabulary: Vocabulary, text: str, length: int | None = None) -> list[int]:
    """Returns a model's target ids for `text`, EOS included; see `encode_inputs`."""
    suffix = (vocabulary.eos_id,)
    ids = [*vocabulary.target_prefix_ids, *vocabulary.encode(text), *suffix]
    return cut(ids, length, suffix)


def cut(ids: list[int], length: int | None, suffix: Sequence[int]) -> list[int]:
    """Returns `ids` truncated to `length`; what is truncated ends in `suffix` again."""
    if length is None or len(ids) <= length:
        return ids
    return [*ids[: max(0, length - len(suffix))], *suffix]


def until_eos(ids: Iterable[SupportsInt], eos_id: int, dropped: Container[int | None]) -> list[int]:
    """Returns `ids` up to the first EOS, without those that are `dropped`."""
    tokens = []
    for i in ids:
        token = int(i)
        if token == eos_id:
            break
        if token not in dropped:
            tokens.append(token)
    return tokens


def read(path: str, kind: str) -> bytes:
    """Returns a file's content; `path` may be an `asset:`. Raises a UserError if it is missing."""
    file = local(assets.resolve(path)).expanduser()
    if not file.is_file():
        folder = file.parent
        names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        where = "" if names else f" (its folder '{folder}' does not exist or is empty)"
        raise UserError(
            f"The {kind} file '{path}' does not exist{where}.{nearest(file.name, names)}"
        )
    return file.read_bytes()


def fingerprint(kind: str, settings: object, *contents: bytes) -> str:
    """Returns the SHA-256 (hex) of a vocabulary's settings and files."""
    digest = hashlib.sha256(f"{kind} {settings!r} ".encode())
    for content in contents:
        digest.update(content)
    return digest.hexdigest()
