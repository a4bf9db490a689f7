"""SentencePiece models (T5, mT5; Llama 2 where there is no tokenizer.json)."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, SupportsInt

from robust_ft.errors import UserError
from robust_ft.ranges import Whole, check_ranges
from robust_ft.vocabulary.base import Vocabulary, fingerprint, read, until_eos


@dataclass(frozen=True)
class SentencePieceVocabulary(Vocabulary):
    """A SentencePiece model (T5, mT5), optionally with sentinels `<extra_id_N>` added at its end.

    As in seqio and T5's span corruption, the extra ids count down: `<extra_id_0>` is the last id.
    A model that already holds its sentinels (mT5's) takes `extra_ids=0`.

    Not every text survives `decode(encode(text))`. T5's models normalize (NFKC: 'ﬁ' becomes 'fi',
    full-width letters become plain ones), make one space of any run of white space, drop it at
    both ends, and write what no piece covers (emoji, Chinese in T5's) as ' ⁇ '. What comes out
    once goes through unchanged from then on, unless it has a ' ⁇ '.

    Attributes:
        path: The model file.
        extra_ids: Sentinels to add.
        decoder_only: Inputs start with the model's `<s>` and have no EOS, as Llama's.
    """

    path: str
    extra_ids: Whole = 0
    decoder_only: bool = False

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def pad_id(self) -> int:
        """Always 0, whatever the model file says, as in T5."""
        return 0

    @property
    def eos_id(self) -> int:
        """The model's `</s>`."""
        eos: int = self._processor.eos_id()
        return eos

    @property
    def unk_id(self) -> int:
        """The model's `<unk>`."""
        unk: int = self._processor.unk_id()
        return unk

    @property
    def bos_id(self) -> int | None:
        """The model's `<s>`, None if it has none (T5)."""
        bos: int = self._processor.bos_id()
        return bos if bos >= 0 else None

    @property
    def input_prefix_ids(self) -> tuple[int, ...]:
        """See `Vocabulary`."""
        return (self.bos_id,) if self.decoder_only and self.bos_id is not None else ()

    @property
    def input_suffix_ids(self) -> tuple[int, ...]:
        """See `Vocabulary`."""
        return () if self.decoder_only else (self.eos_id,)

    @property
    def vocab_size(self) -> int:
        """Pieces of the model and the extra ids."""
        size: int = self._processor.get_piece_size()
        return size

    @functools.cached_property
    def fingerprint(self) -> str:
        """See `Vocabulary`."""
        settings = (self.extra_ids, True) if self.decoder_only else self.extra_ids
        return fingerprint("sentencepiece", settings, read(self.path, "SentencePiece"))

    def encode(self, text: str) -> list[int]:
        """See `Vocabulary`. `<extra_id_N>` is one id where a word can start, as in seqio."""
        ids: list[int] = self._processor.encode(text, out_type=int)
        return ids

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """See `Vocabulary`. Ids past the end (a rounded-up embedding) read as unknown."""
        size, unk = self.vocab_size, self.unk_id
        tokens = until_eos(ids, self.eos_id, (self.pad_id,))
        text: str = self._processor.decode([i if i < size else unk for i in tokens])
        return text

    def token_id(self, token: str) -> int | None:
        """Id of a piece as the model spells it (`▁` for a space), None if it has none."""
        # An unknown piece has the id of `<unk>`, which is another piece.
        piece_id: int = self._processor.piece_to_id(token)
        return piece_id if self._processor.id_to_piece(piece_id) == token else None

    @functools.cached_property
    def _processor(self) -> Any:
        # Imported here: a run on bytes or `tokenizers` needs neither.
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        proto: Any = sentencepiece_model_pb2  # generated code, without types
        processor = sentencepiece.SentencePieceProcessor()
        try:
            model = proto.ModelProto.FromString(read(self.path, "SentencePiece"))
            for i in reversed(range(self.extra_ids)):
                # The leading word mark makes a sentinel match where a word starts.
                model.pieces.add(
                    piece=f"\u2581<extra_id_{i}>",
                    score=0.0,
                    type=proto.ModelProto.SentencePiece.USER_DEFINED,
                )
            processor.load_from_serialized_proto(model.SerializeToString())
        except UserError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(f"'{self.path}' is not a SentencePiece model ({reason}).") from error
        if processor.eos_id() < 0:
            raise UserError(f"The SentencePiece model '{self.path}' has no end-of-sequence piece.")
        return processor
