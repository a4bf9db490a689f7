"""Vocabularies run by the `tokenizers` package, from a tokenizer.json and other files."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, SupportsInt, cast

from robust_ft.errors import UserError, nearest
from robust_ft.files import parse_json
from robust_ft.vocabulary import pipelines
from robust_ft.vocabulary.base import Vocabulary, fingerprint, read, until_eos

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class AddedToken(NamedTuple):
    """A token that is never split, and how it is found in a text; JSON holds it as a list.

    Attributes:
        content: The token.
        special: Whether it is special to the model rather than a word.
        normalized: Whether it is looked for in the normalized text rather than the text as it is.
        lstrip: Whether it takes the white space before it.
        rstrip: Whether it takes the white space after it.
        single_word: Whether it is found only where no letter or digit stands beside it.
    """

    content: str
    special: bool = True
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


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
            ids, in this order. An `AddedToken` says more than a special token's name.
        pipeline: Which tokenizer class of transformers cuts the text (`pipelines.PIPELINES`).
        prefix_space: Where that class puts a space before the text: 'first', 'always', 'never', or
            None for its own choice.
        split_special_tokens: Whether special tokens that a text spells out are cut as text.
    """

    _PATHS: ClassVar[tuple[str, ...]]  # names of the fields that are paths

    pad_token: str | None
    eos_token: str
    unk_token: str | None
    bos_token: str | None
    input_prefix: Sequence[str]
    input_suffix: Sequence[str] | None
    target_prefix: Sequence[str]
    added_tokens: Sequence[str | AddedToken]
    pipeline: str | None
    prefix_space: str | None
    split_special_tokens: bool

    def __post_init__(self) -> None:
        for name in ("input_prefix", "input_suffix", "target_prefix"):
            if (value := getattr(self, name)) is not None:  # configs have lists, which do not hash
                object.__setattr__(self, name, tuple(value))
        tokens = (t if isinstance(t, str) else AddedToken(*t) for t in self.added_tokens)
        # Only what is not usual is spelled out, so that equal vocabularies are equal.
        plain = (t.content if t == AddedToken(t[0]) else t for t in map(_added, tokens))
        object.__setattr__(self, "added_tokens", tuple(plain))

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
        # Fields that vocabularies did not always have: fingerprints without them are as before.
        for field in fields:
            later = field.name in ("pipeline", "prefix_space", "split_special_tokens")
            if later and values[field.name] == field.default:
                del values[field.name]
        contents = [b"" if path is None else read(path, "tokenizer") for path in paths]
        # With their sizes: the contents are hashed one after the other, without borders.
        settings = (*values.items(), [len(content) for content in contents])
        return fingerprint(type(self).__name__, settings, *contents)

    def encode(self, text: str) -> list[int]:
        """See `Vocabulary`. A special token that `text` spells out is that token.

        Equal to the ids of transformers' `tokenizer(text, add_special_tokens=False)`.
        """
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """See `Vocabulary`.

        Other special tokens stay, unlike with transformers' `skip_special_tokens`: what a model
        writes of sentinels (`<extra_id_0>`), separators and tags is for post-processing to read.
        """
        dropped = (self.pad_id, self.bos_id, *self.input_prefix_ids, *self.target_prefix_ids)
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

    def added_by_id(self) -> dict[int, AddedToken]:
        """Returns the tokens that are never split, those of the files included, by their ids."""
        return {
            token_id: AddedToken(*(getattr(token, field) for field in AddedToken._fields))
            for token_id, token in self._tokenizer.get_added_tokens_decoder().items()
        }

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
        if self.pipeline is not None:
            # Those that the files lack are left out: asking for their id is an error (`_special`).
            named = (self.bos_token, self.pad_token, self.eos_token, self.unk_token)
            present = [t for t in named if t is not None and tokenizer.token_to_id(t) is not None]
            tokenizer.add_special_tokens(present)
        added = [tokenizers.AddedToken(**_added(token)._asdict()) for token in self.added_tokens]
        tokenizer.add_tokens(added)
        tokenizer.encode_special_tokens = self.split_special_tokens
        return tokenizer

    def _make_tokenizer(self) -> "Tokenizer":
        raise NotImplementedError


@dataclass(frozen=True)
class TokenizersVocabulary(_HubVocabulary):
    """A tokenizer.json of the `tokenizers` package or a SentencePiece model, by path.

    Without a `pipeline` it is the tokenizer.json as it is; with one, the file's tokens and merges
    are run as that tokenizer class of transformers runs them, and the tokens that it declares as
    added count only if `added_tokens` has them. A SentencePiece model needs a pipeline.

    The file's own template (its BOS and EOS) is not applied; `input_prefix` and `input_suffix` are,
    and `vocabulary_from_directory` fills them in from the template. See `_HubVocabulary` for the
    fields: `unk_token` may be missing from the file, the others may not.

    Attributes:
        path: The `tokenizer.json`.
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
    added_tokens: Sequence[str | AddedToken] = ()
    pipeline: str | None = None
    prefix_space: str | None = None
    split_special_tokens: bool = False

    def template(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the ids that a tokenizer.json's own template puts before and after one text."""
        import tokenizers

        # Any text does, so long as it has a token: not every model has one for a given letter.
        word = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
        full = self._from_file().post_process(word.encode("a"), add_special_tokens=True)
        places = [i for i, special in enumerate(full.special_tokens_mask) if not special]
        if len(places) != 1:
            raise UserError(f"The template of the tokenizer '{self.path}' does not keep its text.")
        return tuple(full.ids[: places[0]]), tuple(full.ids[places[0] + 1 :])

    def _make_tokenizer(self) -> "Tokenizer":
        if self.pipeline is None:
            return self._from_file()
        if self.path.endswith(".model"):
            pieces = pipelines.from_sentencepiece(self.path, self.pipeline)
        else:
            found = pipelines.from_tokenizer_json(self.path)
            if found is None:
                raise UserError(
                    f"'{self.path}' has no BPE or unigram model; it needs pipeline=None."
                )
            pieces = found
        try:
            return pipelines.build(self.pipeline, pieces, self.prefix_space)
        except UserError:
            raise
        except Exception as error:  # the package raises a bare Exception
            raise UserError(f"The tokens in '{self.path}' do not fit together ({error}).") from None

    def _from_file(self) -> "Tokenizer":
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
    added_tokens: Sequence[str | AddedToken] = ()
    pipeline: str = "gpt2"
    prefix_space: str | None = None
    split_special_tokens: bool = False

    @classmethod
    def bart(
        cls, vocab_path: str, merges_path: str, dict_path: str | None = None
    ) -> "BpeVocabulary":
        """Returns BART's vocabulary from its own files, or from GPT-2's and fairseq's dict.txt.

        Inputs and targets are `<s> ... </s>`, as in its pretraining and in the hub.
        """
        return cls(vocab_path, merges_path, dict_path, **BART_TOKENS)

    def _make_tokenizer(self) -> "Tokenizer":
        vocab = _read_vocab(self.vocab_path)
        if self.dict_path is not None:
            vocab = _fairseq_vocab(vocab, self.vocab_path, self.dict_path)
        merges = _read_merges(self.merges_path)
        try:
            pieces = pipelines.Pieces(vocab, merges)
            return pipelines.build(self.pipeline, pieces, self.prefix_space)
        except UserError:
            raise
        except Exception as error:  # the package raises a bare Exception
            raise UserError(
                f"The merges '{self.merges_path}' do not fit '{self.vocab_path}' ({error})."
            ) from error


def _added(token: str | AddedToken) -> AddedToken:
    return AddedToken(token) if isinstance(token, str) else token


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
