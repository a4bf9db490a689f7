"""Which vocabulary a Hugging Face model directory holds."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from robust_ft import assets
from robust_ft.errors import UserError, nearest
from robust_ft.files import read_json_object
from robust_ft.vocabulary.base import Vocabulary
from robust_ft.vocabulary.byte import ByteVocabulary
from robust_ft.vocabulary.hub import BART_TOKENS, BpeVocabulary, TokenizersVocabulary
from robust_ft.vocabulary.sentence_piece import SentencePieceVocabulary

# Sets of files that each define a vocabulary, and those of each family, in order of preference.
_TOKENIZER = ("tokenizer.json",)
_BPE = ("vocab.json", "merges.txt")
_OPENAI = ("encoder.json", "vocab.bpe")
_FAIRSEQ = (*_OPENAI, "dict.txt")
_LLAMA = ("tokenizer.model",)
_T5 = (("spiece.model",), ("sentencepiece.model",))
_KINDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "t5": (*_T5, _TOKENIZER),
    "byt5": (),
    "gpt2": (_TOKENIZER, _BPE, _OPENAI),
    "bart": (_TOKENIZER, _BPE, _FAIRSEQ),
    "llama": (_TOKENIZER, _LLAMA),
    "qwen": (_TOKENIZER,),  # its own pre-tokenization is in no other file
}
_SETTINGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# `tokenizer_class` without 'Tokenizer' and 'Fast', and `model_type`, in lower case.
_FAMILIES = {
    "t5": "t5", "mt5": "t5", "umt5": "t5", "byt5": "byt5", "gpt2": "gpt2", "bart": "bart",
    "roberta": "bart", "llama": "llama", "codellama": "llama", "mistral": "llama",
    "qwen2": "qwen", "qwen3": "qwen",
}  # fmt: skip
_NO_FAMILY = ("", "pretrained", "tokenizersbackend", "auto")
_SENTENCE_PIECE_TOKENS = {"unk_token": "<unk>", "eos_token": "</s>"}
_TOKENS: dict[str, dict[str, Any]] = {
    "t5": {**_SENTENCE_PIECE_TOKENS, "pad_token": "<pad>"},
    "gpt2": {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"},
    "bart": {name: BART_TOKENS[name] for name in BART_TOKENS if name.endswith("_token")},
    "llama": {**_SENTENCE_PIECE_TOKENS, "bos_token": "<s>"},
    "qwen": {"eos_token": "<|endoftext|>"},
}
_SENTINEL = re.compile(r"▁?<extra_id_\d+>")


def vocabulary_from_directory(
    directory: str | Path, added_tokens: Sequence[str] = (), pad_token: str | None = None
) -> Vocabulary:
    """Returns the vocabulary in a directory of a Hugging Face model (or of its tokenizer alone).

    Recognised are spiece.model and sentencepiece.model (T5, mT5), tokenizer.json, vocab.json with
    merges.txt, OpenAI's encoder.json with vocab.bpe (GPT-2) and with fairseq's dict.txt over them
    (BART), tokenizer.model (Llama 2), and ByT5, which has no file. `tokenizer_class` in
    tokenizer_config.json or config.json, else `model_type`, says which of several counts; special
    tokens come from tokenizer_config.json, special_tokens_map.json, the ids in config.json, or are
    the family's own.

    Args:
        directory: Its path.
        added_tokens: Tokens to add at the end (a separator for GPT-2, say); not to SentencePiece
            models and bytes. Those that the directory declares are there already.
        pad_token: The padding token where the model has none, one of its own or an added one.

    Raises:
        UserError: If there is no vocabulary or more than one, a file is missing or corrupt, or a
            special token is not in the vocabulary.
    """
    folder = Path(directory).expanduser()
    if not folder.is_dir():
        names = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise UserError(
            f"The model directory '{directory}' does not exist.{nearest(folder.name, names)}"
        )
    settings = _Settings(folder)
    family, files = _choose(folder, settings)
    vocabulary: Vocabulary
    if family == "byt5" or files[0].endswith(".model"):
        if added_tokens or pad_token is not None:
            kind = files[0] if files else "ByT5"
            raise UserError(f"No tokens can be added to the vocabulary of '{folder}' ({kind}).")
        vocabulary = _plain(folder, family, files, settings)
    else:
        vocabulary = _hub(folder, family, files, settings, added_tokens, pad_token)
    # Read now rather than on first use, so that errors come where the directory is named.
    for name in ("pad_id", "eos_id", "input_prefix_ids", "input_suffix_ids", "target_prefix_ids"):
        getattr(vocabulary, name)
    return vocabulary


def vocabulary_files(directory: str | Path) -> tuple[str, ...]:
    """Returns the names of the files in `directory` that define its vocabulary.

    A copy of them (with config.json, if `tokenizer_class` stands there) gives the same vocabulary.
    """
    known = {name for kinds in _KINDS.values() for kind in kinds for name in kind}
    present = {path.name for path in Path(directory).expanduser().iterdir() if path.is_file()}
    return tuple(sorted(present & {*known, *_SETTINGS}))


def vocabulary_settings(vocabulary: Vocabulary) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """Returns settings that define a vocabulary, for a JSON file beside copies of its files.

    Returns:
        {'kind': name of its class, and its fields}, with files by their names alone; and the files.
    """
    settings: dict[str, Any] = {"kind": type(vocabulary).__name__}
    files = []
    for field in dataclasses.fields(cast(Any, vocabulary)):
        value = getattr(vocabulary, field.name)
        if field.name.endswith("path") and value is not None:
            files.append(Path(assets.resolve(value)).expanduser())
            value = files[-1].name
        settings[field.name] = list(value) if isinstance(value, tuple) else value
    return settings, tuple(files)


class _Settings:
    """The settings of a tokenizer in the JSON files of a directory."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._tokenizer = read_json_object(folder / "tokenizer_config.json", default={})
        self._special = read_json_object(folder / "special_tokens_map.json", default={})
        self._added = read_json_object(folder / "added_tokens.json", default={})
        self._model = read_json_object(folder / "config.json", default={})

    def get(self, name: str) -> Any:
        """Returns an entry of tokenizer_config.json, None if it is not there."""
        return self._tokenizer.get(name)

    def source(self) -> tuple[str, str]:
        """Returns the name of the tokenizer's class or the model's type, and the file it is in."""
        classes = (
            (self._tokenizer.get("tokenizer_class"), "tokenizer_config.json"),
            (self._model.get("tokenizer_class"), "config.json"),
            (self._model.get("model_type"), "config.json"),
        )
        for name, file in classes:
            if isinstance(name, str) and _plain_name(name) not in _NO_FAMILY:
                return name, file
        return "", ""

    def token(self, name: str) -> str | None:
        """Returns a special token by its setting ('eos_token'), None if no file names it."""
        for file in (self._tokenizer, self._special):
            value = file.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                return value
        return None

    def token_id(self, name: str) -> int | None:
        """Returns config.json's id of a special token, of several the first."""
        value = self._model.get(f"{name}_id")
        value = value[0] if isinstance(value, list) and value else value
        return value if isinstance(value, int) else None

    def added_tokens(self) -> dict[str, int]:
        """Returns the added tokens that the settings declare, by id."""
        ids = {token: i for token, i in self._added.items() if isinstance(i, int)}
        try:
            for key, value in (self._tokenizer.get("added_tokens_decoder") or {}).items():
                ids[value["content"] if isinstance(value, dict) else str(value)] = int(key)
        except (AttributeError, KeyError, ValueError) as error:
            raise UserError(
                f"'{self.folder / 'tokenizer_config.json'}' has an added_tokens_decoder that is "
                "not tokens by their ids."
            ) from error
        return dict(sorted(ids.items(), key=lambda item: item[1]))

    def sentinels(self) -> int | None:
        """Returns how many sentinels the settings declare, None if they declare nothing."""
        extra_ids = self._tokenizer.get("extra_ids")
        if isinstance(extra_ids, int) and extra_ids > 0:
            return extra_ids
        named = self._tokenizer.get("additional_special_tokens") or []
        names = {str(t.get("content") if isinstance(t, dict) else t) for t in named}
        names |= set(self.added_tokens())
        return sum(1 for name in names if _SENTINEL.fullmatch(name)) or extra_ids


def _choose(folder: Path, settings: _Settings) -> tuple[str, tuple[str, ...]]:
    """Returns the family ('' if unknown) and the files that are the vocabulary."""
    present = {path.name for path in folder.iterdir() if path.is_file()}
    source, file = settings.source()
    family = _FAMILIES.get(_plain_name(source), "")
    if family:
        if family == "byt5":
            return family, ()
        complete = [kind for kind in _KINDS[family] if present.issuperset(kind)]
        if not complete:
            raise UserError(
                f"'{folder}' holds no vocabulary of a {source} ({file}): "
                f"{_missing(_KINDS[family], present)}"
            )
        if complete[0] in _T5 and not _sentencepiece_is_enough(settings):
            if _TOKENIZER not in complete:
                raise UserError(
                    f"'{folder}' declares added tokens that are not in its {complete[0][0]}; they "
                    "need a tokenizer.json."
                )
            return family, _TOKENIZER
        if complete[:2] == list(_T5) and not _same_content(folder, complete[:2]):
            raise UserError(f"'{folder}' holds both {_listed(complete[:2])}; keep one.")
        return family, complete[0]
    return _guess(folder, present, source)


def _guess(folder: Path, present: set[str], source: str) -> tuple[str, tuple[str, ...]]:
    kinds = (_TOKENIZER, *_T5, _LLAMA, _BPE, _FAIRSEQ, _OPENAI)
    complete = [kind for kind in kinds if present.issuperset(kind)]
    if _FAIRSEQ in complete:
        complete.remove(_OPENAI)
    if source and _TOKENIZER in complete:  # a class that we do not know; the file is complete
        return "", _TOKENIZER
    if not complete or source:
        named = f", and its tokenizer '{source}' is not one that is supported" if source else ""
        raise UserError(f"'{folder}' holds no vocabulary{named}: {_missing(kinds, present)}")
    if len(complete) > 1:
        raise UserError(
            f"'{folder}' holds several vocabularies ({_listed(complete, '; ')}) and does not say "
            "whose they are: give tokenizer_class in tokenizer_config.json, or keep one."
        )
    families: dict[tuple[str, ...], str] = dict.fromkeys(_T5, "t5")
    families |= {_FAIRSEQ: "bart", _OPENAI: "gpt2", _LLAMA: "llama"}
    family = families.get(complete[0], "")
    if complete[0] == _BPE:
        ids = read_json_object(folder / "vocab.json", default={})
        family = "bart" if (ids.get("<s>"), ids.get("</s>")) == (0, 2) else "gpt2"
    return family, complete[0]


def _plain(
    folder: Path, family: str, files: tuple[str, ...], settings: _Settings
) -> ByteVocabulary | SentencePieceVocabulary:
    sentinels = settings.sentinels()
    if family == "byt5":
        return ByteVocabulary(extra_ids=125 if sentinels is None else sentinels)
    path = str(folder / files[0])
    if family == "llama":
        return SentencePieceVocabulary(path, decoder_only=True)
    own = SentencePieceVocabulary(path)
    if own.token_id("▁<extra_id_0>") is not None or own.token_id("<extra_id_0>") is not None:
        return own  # mT5's
    return SentencePieceVocabulary(path, extra_ids=100 if sentinels is None else sentinels)


def _hub(
    folder: Path,
    family: str,
    files: tuple[str, ...],
    settings: _Settings,
    added_tokens: Sequence[str],
    pad_token: str | None,
) -> TokenizersVocabulary | BpeVocabulary:
    kind: Any = TokenizersVocabulary if files == _TOKENIZER else BpeVocabulary
    make = functools.partial(kind, *(str(folder / name) for name in files))
    bare = make()
    _ = bare.vocab_size  # reads the files: their errors come before those of the settings
    declared = settings.added_tokens()
    missing = [token for token in declared if bare.token_id(token) is None]
    tokens = _special_tokens(folder, family, settings, bare)
    if pad_token is not None:
        tokens["pad_token"] = pad_token
    around = _around(folder, family, settings, bare, tokens)
    more = BART_TOKENS["added_tokens"] if family == "bart" and kind is BpeVocabulary else ()
    everything = tuple(dict.fromkeys([*more, *missing, *added_tokens]))
    vocabulary: TokenizersVocabulary | BpeVocabulary = make(
        **tokens, **around, added_tokens=everything
    )
    for token, token_id in declared.items():
        if vocabulary.token_id(token) != token_id:
            raise UserError(
                f"'{folder}' declares the token '{token}' with the id {token_id}, but its "
                f"{files[0]} gives it {vocabulary.token_id(token)}."
            )
    return vocabulary


def _special_tokens(
    folder: Path,
    family: str,
    settings: _Settings,
    bare: TokenizersVocabulary | BpeVocabulary,
) -> dict[str, Any]:
    tokens: dict[str, Any] = {}
    for name in ("eos_token", "pad_token", "unk_token", "bos_token"):
        token = settings.token(name)
        token_id = settings.token_id(name)
        if token is None and token_id is not None:
            token = bare.token(token_id)
        tokens[name] = token if token is not None else _TOKENS.get(family, {}).get(name)
    if tokens["eos_token"] is None:
        raise UserError(
            f"'{folder}' does not say what ends a sequence; give eos_token in its "
            "tokenizer_config.json."
        )
    if tokens["unk_token"] == tokens["eos_token"]:
        tokens["unk_token"] = None  # GPT-2's settings name it, its bytes never need it
    return tokens


def _around(
    folder: Path,
    family: str,
    settings: _Settings,
    bare: TokenizersVocabulary | BpeVocabulary,
    tokens: Mapping[str, Any],
) -> dict[str, tuple[str, ...]]:
    """Returns the tokens around inputs and before targets, as in the hub's tokenizer."""
    bos, eos = tokens["bos_token"], tokens["eos_token"]
    if family == "bart":
        start = (bos,) if bos is not None else ()
        return {"input_prefix": start, "input_suffix": (eos,), "target_prefix": start}
    if family == "t5":
        return {"input_suffix": (eos,)}
    flags = settings.get("add_bos_token"), settings.get("add_eos_token")
    if any(flag is not None for flag in flags):  # in the hub they override the template
        if flags[0] and bos is None:
            raise UserError(f"'{folder}' has add_bos_token, but no bos_token.")
        return {
            "input_prefix": (bos,) if flags[0] else (),
            "input_suffix": (eos,) if flags[1] else (),
        }
    if not isinstance(bare, TokenizersVocabulary):
        return {"input_prefix": (), "input_suffix": ()}
    prefix, suffix = bare.template()
    return {"input_prefix": prefix, "input_suffix": suffix}


def _sentencepiece_is_enough(settings: _Settings) -> bool:
    ordinary = {"<pad>", "</s>", "<unk>", "<s>"}
    return all(t in ordinary or _SENTINEL.fullmatch(t) for t in settings.added_tokens())


def _same_content(folder: Path, kinds: Sequence[tuple[str, ...]]) -> bool:
    return len({(folder / kind[0]).read_bytes() for kind in kinds}) == 1


def _plain_name(name: str) -> str:
    return name.removesuffix("Fast").removesuffix("Tokenizer").lower()


def _listed(kinds: Sequence[tuple[str, ...]], separator: str = " and ") -> str:
    return separator.join(" + ".join(kind) for kind in kinds)


def _missing(kinds: Sequence[tuple[str, ...]], present: set[str]) -> str:
    for kind in kinds:
        lacking = [name for name in kind if name not in present]
        if len(lacking) < len(kind):
            have = [name for name in kind if name in present]
            return f"beside {' and '.join(have)}, {' and '.join(lacking)} is missing."
    return f"there is none of {_listed(kinds, ', ')}."
