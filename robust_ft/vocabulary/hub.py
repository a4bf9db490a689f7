"""Vocabularies run by the `tokenizers` package: a tokenizer.json, or GPT-2's and BART's files."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, SupportsInt, cast

from robust_ft.errors import UserError, nearest
from robust_ft.files import parse_json
from robust_ft.vocabulary.base import Vocabulary, fingerprint, read, until_eos

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class _HubVocabulary(Vocabulary):
    """What both kinds share; a subclass declares these as fields and defines `_make_tokenizer`.

    Attributes:
        pad_token: None where the model has none; padding is then the EOS id, as is usual.
        eos_token: Ends a sequence.
        unk_token: None, or a token that is not there, where every text has tokens (byte-level BPE).
        bos_token: Dropped by `decode`.
        input_prefix: Tokens before every input.
        input_suffix: Tokens after every input, None for EOS.
        target_prefix: Tokens before every target.
        added_tokens: Further tokens that are never split; those that the files lack get the next
            ids, in this order.
    """

    _PATHS: ClassVar[tuple[str, ...]]  # names of the fields that are paths

    pad_token: str | None
    eos_token: str
    unk_token: str | None
    bos_token: str | None
    input_prefix: Sequence[str]
    input_suffix: Sequence[str] | None
    target_prefix: Sequence[str]
    added_tokens: Sequence[str]

    def __post_init__(self) -> None:
        for name in ("input_prefix", "input_suffix", "target_prefix", "added_tokens"):
            if (value := getattr(self, name)) is not None:  # configs have lists, which do not hash
                object.__setattr__(self, name, tuple(value))

    @functools.cached_property
    def pad_id(self) -> int:
        """Id of `pad_token`, else of EOS."""
        return self.eos_id if self.pad_token is None else self._special("pad_token", self.pad_token)

    @functools.cached_property
    def eos_id(self) -> int:
        """Id of `eos_token`."""
        return self._special("eos_token", self.eos_token)

    @functools.cached_property
    def unk_id(self) -> int | None:
        """Id of `unk_token`, None if the files have none."""
        return None if self.unk_token is None else self._tokenizer.token_to_id(self.unk_token)

    @functools.cached_property
    def bos_id(self) -> int | None:
        """Id of `bos_token`, None if there is none."""
        return None if self.bos_token is None else self._special("bos_token", self.bos_token)

    @functools.cached_property
    def input_prefix_ids(self) -> tuple[int, ...]:
        """See `Vocabulary`."""
        return tuple(self._special("input_prefix", token) for token in self.input_prefix)

    @functools.cached_property
    def input_suffix_ids(self) -> tuple[int, ...]:
        """See `Vocabulary`."""
        if self.input_suffix is None:
            return (self.eos_id,)
        return tuple(self._special("input_suffix", token) for token in self.input_suffix)

    @functools.cached_property
    def target_prefix_ids(self) -> tuple[int, ...]:
        """See `Vocabulary`."""
        return tuple(self._special("target_prefix", token) for token in self.target_prefix)

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the highest id, added tokens included."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def fingerprint(self) -> str:
        """See `Vocabulary`."""
        fields = dataclasses.fields(cast(Any, self))
        values = {field.name: getattr(self, field.name) for field in fields}
        paths = [values.pop(name) for name in self._PATHS]
        contents = [b"" if path is None else read(path, "tokenizer") for path in paths]
        # With their sizes: the contents are hashed one after the other, without borders.
        settings = (*values.items(), [len(content) for content in contents])
        return fingerprint(type(self).__name__, settings, *contents)

    def encode(self, text: str) -> list[int]:
        """See `Vocabulary`. A special token that `text` spells out is that token, as in the hub."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """See `Vocabulary`. Sentinels such as `<extra_id_0>` stay: post-processing needs them."""
        dropped = (self.pad_id, self.bos_id, *self.target_prefix_ids)
        tokens = until_eos(ids, self.eos_id, dropped)
        return self._tokenizer.decode(tokens, skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        """Id of a token as the files spell it, None if there is none."""
        return self._tokenizer.token_to_id(token)

    def token(self, token_id: int) -> str | None:
        """The token of an id as the files spell it, None if there is none."""
        return self._tokenizer.id_to_token(token_id)

    def to_json(self) -> str:
        """Returns a tokenizer.json, with the added tokens."""
        text: str = self._tokenizer.to_str()
        return text

    def _special(self, setting: str, token: str) -> int:
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            hint = nearest(token, self._tokenizer.get_vocab())
            name = getattr(self, self._PATHS[0])
            raise UserError(f"The tokenizer '{name}' has no token '{token}' ({setting}).{hint}")
        return token_id

    @functools.cached_property
    def _tokenizer(self) -> "Tokenizer":
        import tokenizers

        tokenizer = self._make_tokenizer()
        tokenizer.add_special_tokens(
            [
                tokenizers.AddedToken(token, normalized=False, special=True)
                for token in self.added_tokens
            ]
        )
        return tokenizer

    def _make_tokenizer(self) -> "Tokenizer":
        raise NotImplementedError


@dataclass(frozen=True)
class TokenizersVocabulary(_HubVocabulary):
    """A `tokenizer.json` of the `tokenizers` package (Hugging Face), by path.

    The file's own template (its BOS and EOS) is not applied; `input_prefix` and `input_suffix` are,
    and `vocabulary_from_directory` fills them in from the template. See `_HubVocabulary` for the
    fields: `unk_token` may be missing from the file, the others may not.
    """

    _PATHS = ("path",)

    path: str
    pad_token: str | None = "<pad>"
    eos_token: str = "</s>"
    unk_token: str | None = "<unk>"
    bos_token: str | None = None
    input_prefix: Sequence[str] = ()
    input_suffix: Sequence[str] | None = None
    target_prefix: Sequence[str] = ()
    added_tokens: Sequence[str] = ()

    def template(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Returns the tokens that the file's own template puts before and after one text."""
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        full = self._tokenizer.encode("a", add_special_tokens=True)
        for start in range(len(full.ids) - len(plain) + 1):
            if full.ids[start : start + len(plain)] == plain:
                return tuple(full.tokens[:start]), tuple(full.tokens[start + len(plain) :])
        raise UserError(f"The template of the tokenizer '{self.path}' does not keep its text.")

    def _make_tokenizer(self) -> "Tokenizer":
        import tokenizers

        data = read(self.path, "tokenizer")
        try:
            tokenizer = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # the package raises a bare Exception
            raise UserError(f"'{self.path}' is not a tokenizer.json ({error}).") from error
        # Some files were saved with the lengths of their last use.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


@dataclass(frozen=True)
class BpeVocabulary(_HubVocabulary):
    """GPT-2's byte-level BPE from its two files, and BART's, which numbers the same tokens anew.

    Every text survives `decode(encode(text))`, unless it spells out a special token. The defaults
    are GPT-2's: nothing around an input, no padding token; `bart` gives BART's.

    Attributes:
        vocab_path: Token -> id; `vocab.json`, or OpenAI's `encoder.json`.
        merges_path: `merges.txt`, or OpenAI's `vocab.bpe`.
        dict_path: fairseq's `dict.txt` over GPT-2's ids, where `vocab_path` is GPT-2's and the
            model is BART. Its line n is id n + 3 (from 1), behind `<s>`, `<pad>`, `</s>` and
            `<unk>`; a `<mask>` follows the last.
    """

    _PATHS = ("vocab_path", "merges_path", "dict_path")

    vocab_path: str
    merges_path: str
    dict_path: str | None = None
    pad_token: str | None = None
    eos_token: str = "<|endoftext|>"
    unk_token: str | None = None
    bos_token: str | None = None
    input_prefix: Sequence[str] = ()
    input_suffix: Sequence[str] | None = ()
    target_prefix: Sequence[str] = ()
    added_tokens: Sequence[str] = ()

    @classmethod
    def bart(
        cls, vocab_path: str, merges_path: str, dict_path: str | None = None
    ) -> "BpeVocabulary":
        """Returns BART's vocabulary from its own files, or from GPT-2's and fairseq's dict.txt.

        Inputs and targets are `<s> ... </s>`, as in its pretraining and in the hub.
        """
        return cls(vocab_path, merges_path, dict_path, **BART_TOKENS)

    def _make_tokenizer(self) -> "Tokenizer":
        import tokenizers

        vocab = _read_vocab(self.vocab_path)
        if self.dict_path is not None:
            vocab = _fairseq_vocab(vocab, self.vocab_path, self.dict_path)
        merges = _read_merges(self.merges_path)
        try:
            model = tokenizers.models.BPE(vocab=vocab, merges=merges)
        except Exception as error:  # the package raises a bare Exception
            raise UserError(
                f"The merges '{self.merges_path}' do not fit '{self.vocab_path}' ({error})."
            ) from error
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        # Those that the files lack are left out: asking for their id is an error (`_special`).
        named = (self.bos_token, self.pad_token, self.eos_token, self.unk_token)
        tokenizer.add_special_tokens([token for token in named if token in vocab])
        return tokenizer


BART_TOKENS: dict[str, Any] = {
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "input_prefix": ("<s>",),
    "input_suffix": ("</s>",),
    "target_prefix": ("<s>",),
    "added_tokens": ("<mask>",),
}


def _read_vocab(path: str) -> dict[str, int]:
    vocab = parse_json(read(path, "vocabulary"), path)
    if not isinstance(vocab, dict) or not vocab:
        raise UserError(f"The vocabulary '{path}' is not a JSON object of tokens and their ids.")
    for token, token_id in vocab.items():
        if type(token_id) is not int or token_id < 0:
            raise UserError(f"The vocabulary '{path}' gives '{token}' the id {token_id!r}.")
    if len(set(vocab.values())) < len(vocab):
        raise UserError(f"The vocabulary '{path}' gives one id to several tokens.")
    return vocab


def _read_merges(path: str) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(_lines(path, "merges"), 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2:
            raise UserError(f"The merges '{path}', line {number}: '{line}' is not a pair.")
        merges.append((parts[0], parts[1]))
    return merges


def _fairseq_vocab(gpt2: dict[str, int], vocab_path: str, dict_path: str) -> dict[str, int]:
    tokens = {token_id: token for token, token_id in gpt2.items()}
    ordered = ["<s>", "<pad>", "</s>", "<unk>"]
    for number, line in enumerate(_lines(dict_path, "dictionary"), 1):
        if not line:
            continue
        name = line.rsplit(" ", 1)[0]
        # They pad the vocabulary to a multiple of 8; no text has them.
        is_filler = name.startswith("madeupword")
        if not is_filler and (not name.isdecimal() or int(name) not in tokens):
            raise UserError(
                f"The dictionary '{dict_path}', line {number}: '{name}' is no id of '{vocab_path}'."
            )
        ordered.append(name if is_filler else tokens[int(name)])
    ordered.append("<mask>")
    vocab = {token: i for i, token in enumerate(ordered)}
    if len(vocab) < len(ordered):
        raise UserError(f"The dictionary '{dict_path}' has a token twice.")
    return vocab


def _lines(path: str, kind: str) -> list[str]:
    try:
        # Not `splitlines`: byte-level tokens have characters that it takes for line ends.
        return [line.rstrip("\r") for line in read(path, kind).decode("utf-8").split("\n")]
    except UnicodeDecodeError as error:
        raise UserError(f"The {kind} file '{path}' is not UTF-8 ({error}).") from error
