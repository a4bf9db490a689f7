"""Bytes as tokens (ByT5)."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import SupportsInt

from robust_ft.ranges import Whole, check_ranges
from robust_ft.vocabulary.base import Vocabulary, fingerprint, until_eos


@dataclass(frozen=True)
class ByteVocabulary(Vocabulary):
    """UTF-8 bytes, as in ByT5: 0 pad, 1 EOS, 2 unknown, then 256 bytes, then `extra_ids` ids.

    As in seqio, extra ids never come out of `encode` and have no text in `decode`. ByT5's
    embedding has 384 rows: `extra_ids=125` covers it.

    Attributes:
        extra_ids: Number of ids after the bytes.
    """

    extra_ids: Whole = 100

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def pad_id(self) -> int:
        """Always 0."""
        return 0

    @property
    def eos_id(self) -> int:
        """Always 1."""
        return 1

    @property
    def unk_id(self) -> int:
        """Always 2; never produced, since every text has bytes."""
        return 2

    @property
    def vocab_size(self) -> int:
        """3 special ids, 256 bytes and the extra ids."""
        return 259 + self.extra_ids

    @property
    def fingerprint(self) -> str:
        """See `Vocabulary`."""
        return fingerprint("bytes", self.extra_ids)

    def encode(self, text: str) -> list[int]:
        """See `Vocabulary`."""
        return [byte + 3 for byte in text.encode("utf-8")]

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """See `Vocabulary`; invalid UTF-8 is dropped."""
        tokens = until_eos(ids, self.eos_id, (self.pad_id,))
        return bytes(i - 3 for i in tokens if 3 <= i < 259).decode("utf-8", errors="ignore")
