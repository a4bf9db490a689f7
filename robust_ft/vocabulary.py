"""Text to token ids and back, without tensorflow: bytes, SentencePiece, `tokenizers`.

Every vocabulary is a frozen, hashable dataclass that says where its file lies and reads it on
first use. `robust_ft.data.seqio_vocabulary` wraps one for seqio.
"""

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from robust_ft import assets
from robust_ft.errors import UserError, nearest


@runtime_checkable
class Vocabulary(Protocol):
    """What the rest of the library asks of a vocabulary."""

    @property
    def pad_id(self) -> int:
        """Id of padding; the library pads with 0 everywhere."""

    @property
    def eos_id(self) -> int:
        """Id that ends a sequence."""

    @property
    def unk_id(self) -> int | None:
        """Id of what the vocabulary does not know, None if it knows everything."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, with the extra ids; a model may round its embedding up from this."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the content and the settings: what a cache of token ids depends on."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; no EOS is appended."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` up to the first EOS; padding is dropped."""


@dataclass(frozen=True)
class ByteVocabulary:
    """UTF-8 bytes, as in ByT5: 0 pad, 1 EOS, 2 unknown, then 256 bytes, then `extra_ids` ids.

    As in seqio, extra ids never come out of `encode` and have no text in `decode`.
    """

    extra_ids: int = 100

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
        return _fingerprint("bytes", self.extra_ids)

    def encode(self, text: str) -> list[int]:
        """See `Vocabulary`."""
        return [byte + 3 for byte in text.encode("utf-8")]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Vocabulary`; bytes that are no UTF-8 are dropped."""
        kept = (i - 3 for i in _until_eos(ids, self.eos_id, self.pad_id) if 3 <= i < 259)
        return bytes(kept).decode("utf-8", errors="ignore")


@dataclass(frozen=True)
class SentencePieceVocabulary:
    """A SentencePiece model (T5, mT5), optionally with sentinels `<extra_id_N>` added at its end.

    As in seqio and T5's span corruption, the extra ids count down: `<extra_id_0>` is the last id.
    A model that already holds its sentinels (mT5's) takes `extra_ids=0`.
    """

    path: str
    extra_ids: int = 0

    @property
    def pad_id(self) -> int:
        """Always 0, whatever the model file says, as in T5."""
        return 0

    @property
    def eos_id(self) -> int:
        """The model's `</s>`."""
        return self._processor.eos_id()

    @property
    def unk_id(self) -> int:
        """The model's `<unk>`."""
        return self._processor.unk_id()

    @property
    def vocab_size(self) -> int:
        """Pieces of the model and the extra ids."""
        return self._processor.get_piece_size()

    @functools.cached_property
    def fingerprint(self) -> str:
        """See `Vocabulary`."""
        return _fingerprint("sentencepiece", self.extra_ids, _read(self.path, "SentencePiece"))

    def encode(self, text: str) -> list[int]:
        """See `Vocabulary`. `<extra_id_N>` is one id where a word can start, as in seqio."""
        return self._processor.encode(text, out_type=int)

    def decode(self, ids: Iterable[int]) -> str:
        """See `Vocabulary`. Ids past the end (a rounded-up embedding) read as unknown."""
        size, unk = self.vocab_size, self.unk_id
        kept = _until_eos(ids, self.eos_id, self.pad_id)
        return self._processor.decode([i if i < size else unk for i in kept])

    @functools.cached_property
    def _processor(self) -> Any:
        # Imported here: a run on bytes or `tokenizers` needs neither.
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        proto: Any = sentencepiece_model_pb2  # generated code, without types
        try:
            model = proto.ModelProto.FromString(_read(self.path, "SentencePiece"))
        except Exception as error:
            raise UserError(f"'{self.path}' is not a SentencePiece model ({error}).") from error
        for i in reversed(range(self.extra_ids)):
            # The leading word mark makes a sentinel match where a word starts.
            model.pieces.add(
                piece=f"\u2581<extra_id_{i}>",
                score=0.0,
                type=proto.ModelProto.SentencePiece.USER_DEFINED,
            )
        processor = sentencepiece.SentencePieceProcessor()
        processor.load_from_serialized_proto(model.SerializeToString())
        if processor.eos_id() < 0:
            raise UserError(f"The SentencePiece model '{self.path}' has no end-of-sequence piece.")
        return processor


@dataclass(frozen=True)
class TokenizersVocabulary:
    """A `tokenizer.json` of the `tokenizers` package (Hugging Face), by path.

    `unk_token` may be missing from the file; `pad_token` and `eos_token` may not.
    """

    path: str
    pad_token: str = "<pad>"
    eos_token: str = "</s>"
    unk_token: str = "<unk>"

    @functools.cached_property
    def pad_id(self) -> int:
        """Id of `pad_token`."""
        return self._special("pad_token", self.pad_token)

    @functools.cached_property
    def eos_id(self) -> int:
        """Id of `eos_token`."""
        return self._special("eos_token", self.eos_token)

    @functools.cached_property
    def unk_id(self) -> int | None:
        """Id of `unk_token`, None if the file has none."""
        return self._tokenizer.token_to_id(self.unk_token)

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the highest id, added tokens included."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def fingerprint(self) -> str:
        """See `Vocabulary`."""
        tokens = (self.pad_token, self.eos_token, self.unk_token)
        return _fingerprint("tokenizers", tokens, _read(self.path, "tokenizer"))

    def encode(self, text: str) -> list[int]:
        """See `Vocabulary`. The file's own template (its BOS and EOS) is not applied."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """See `Vocabulary`. Sentinels such as `<extra_id_0>` stay: post-processing needs them."""
        kept = _until_eos(ids, self.eos_id, self.pad_id)
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def _special(self, setting: str, token: str) -> int:
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            hint = nearest(token, self._tokenizer.get_vocab())
            raise UserError(
                f"The tokenizer '{self.path}' has no token '{token}' ({setting}).{hint}"
            )
        return token_id

    @functools.cached_property
    def _tokenizer(self) -> Any:
        import tokenizers

        data = _read(self.path, "tokenizer")
        try:
            return tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # the package raises a bare Exception
            raise UserError(f"'{self.path}' is not a tokenizer.json ({error}).") from error


def _until_eos(ids: Iterable[int], eos_id: int, pad_id: int) -> list[int]:
    kept = []
    for i in ids:
        token = int(i)
        if token == eos_id:
            break
        if token != pad_id:
            kept.append(token)
    return kept


def _read(path: str, kind: str) -> bytes:
    file = Path(assets.resolve(path)).expanduser()
    if not file.is_file():
        folder = file.parent
        names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        where = "" if names else f" (its folder '{folder}' does not exist or is empty)"
        raise UserError(
            f"The {kind} file '{path}' does not exist{where}.{nearest(file.name, names)}"
        )
    return file.read_bytes()


def _fingerprint(kind: str, settings: object, content: bytes = b"") -> str:
    return hashlib.sha256(f"{kind} {settings!r} ".encode() + content).hexdigest()
