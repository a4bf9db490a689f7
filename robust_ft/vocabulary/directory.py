"""Which vocabulary a Hugging Face model directory holds: what `AutoTokenizer` makes of it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from robust_ft import assets
from robust_ft.bucket_copies import local
from robust_ft.errors import UserError, nearest
from robust_ft.files import read_json_object
from robust_ft.vocabulary import pipelines
from robust_ft.vocabulary.base import Vocabulary
from robust_ft.vocabulary.byte import ByteVocabulary
from robust_ft.vocabulary.classes import (
    ALIASES,
    BACKEND,
    BPE,
    CLASSES,
    FAIRSEQ,
    GENERIC,
    LLAMA,
    MISNAMED,
    OPENAI,
    REGISTERED,
    T5,
    TOKENIZER,
)
from robust_ft.vocabulary.reader import Reader
from robust_ft.vocabulary.settings import (
    ADDED_TOKENS,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    Settings,
)

_SETTINGS = (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, ADDED_TOKENS)


def vocabulary_from_directory(
    directory: str | Path, added_tokens: Sequence[str] = (), pad_token: str | None = None
) -> Vocabulary:
    """Returns the vocabulary in a directory of a Hugging Face model (or of its tokenizer alone).

    Its ids are those of transformers 5's `AutoTokenizer`, with one exception (*):

    - The class is `tokenizer_class` in tokenizer_config.json or config.json, else what the
      `model_type` has. A Mistral's is the tokenizer.json as it is, whatever the class; so is a
      Llama's with a byte-level tokenizer.json, and every class that is unknown. A Qwen2's is
      always Qwen2's.
    - tokenizer.json goes before other files. The classes of Llama, GPT-2, Qwen2, BART and T5 take
      only tokens, merges and template from it and cut texts in their own ways.
    - (*) A tokenizer.json that is named GPT-2's or BART's but cuts texts into other words
      (SmolLM2's splits digits), or whose model is of another kind than its class's (words), is
      taken as it is: the model was trained so, and transformers 4 and other servers read it so.
      A warning says it; `tokenizer_class: PreTrainedTokenizerFast` makes transformers 5 agree.
    - Around an input stands what the template in tokenizer.json says, nothing without one;
      `add_bos_token` and `add_eos_token` count only without a tokenizer.json, each false unless
      set. T5 and BART always have theirs, CodeLlama its BOS.
    - Special and added tokens: see `Settings`. A declared id that transformers would change
      without a word is refused.

    A directory that says too little for `AutoTokenizer` (a lone tokenizer.model, say) is read as
    the family of its files.

    Args:
        directory: Its path.
        added_tokens: Tokens to add at the end (a separator for GPT-2, say); not to bytes. Those
            that the directory declares are there already.
        pad_token: The padding token where the model has none, one of its own or an added one.

    Raises:
        UserError: If there is no vocabulary or more than one, a file is missing or corrupt, a
            special token is not in the vocabulary, or a declared id is another one's.
    """
    folder = local(directory).expanduser()
    if not folder.is_dir():
        names = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise UserError(
            f"The model directory '{directory}' does not exist.{nearest(folder.name, names)}"
        )
    settings = Settings(folder)
    name, files = _choose(folder, settings)
    if name == "ByT5Tokenizer":
        if added_tokens or pad_token is not None:
            raise UserError(f"No tokens can be added to the vocabulary of '{folder}' (ByT5).")
        sentinels = settings.sentinels()
        return ByteVocabulary(extra_ids=125 if sentinels is None else sentinels)
    vocabulary = Reader(folder, name, files, settings).vocabulary(added_tokens, pad_token)
    # Read now rather than on first use, so that errors come where the directory is named.
    for field in ("pad_id", "eos_id", "input_prefix_ids", "input_suffix_ids", "target_prefix_ids"):
        getattr(vocabulary, field)
    return vocabulary


def vocabulary_files(directory: str | Path) -> tuple[str, ...]:
    """Returns the names of the files in `directory` that define its vocabulary.

    A copy of them (with config.json, if `tokenizer_class` stands there) gives the same vocabulary.
    """
    known = {name for kind in CLASSES.values() for files in kind.files for name in files}
    present = {path.name for path in local(directory).expanduser().iterdir() if path.is_file()}
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
            files.append(local(assets.resolve(value)).expanduser())
            value = files[-1].name
        settings[field.name] = list(value) if isinstance(value, tuple) else value
    return settings, tuple(files)


def _choose(folder: Path, settings: Settings) -> tuple[str, tuple[str, ...]]:
    """Returns the tokenizer's class and the files that are the vocabulary."""
    present = {path.name for path in folder.iterdir() if path.is_file()}
    declared, file = settings.tokenizer_class()
    declared = declared.removesuffix("Fast")
    name = ALIASES.get(declared, declared)
    registered = REGISTERED.get(settings.model_type, "")
    if not name and not registered and settings.model_type != "llama":
        return _guess(folder, present)
    byte_level = name == "LlamaTokenizer" and settings.model_type not in MISNAMED
    if byte_level and TOKENIZER[0] in present and _is_byte_level(folder / TOKENIZER[0]):
        return BACKEND, TOKENIZER
    if not name or registered == BACKEND or (registered and settings.model_type in MISNAMED):
        name = registered or BACKEND
    known = name in CLASSES
    if not known and name not in GENERIC and TOKENIZER[0] not in present:
        raise UserError(
            f"'{folder}' holds no vocabulary, and its tokenizer '{declared}' ({file}) is not one "
            f"that is supported: {_missing((TOKENIZER,), present)}"
        )
    name = name if known else BACKEND
    if name == "ByT5Tokenizer":
        return name, ()
    kinds = CLASSES[name].files
    complete = [kind for kind in kinds if present.issuperset(kind)]
    if not complete and name == BACKEND:  # transformers would find nothing
        return _guess(folder, present)
    if not complete:
        of = f"{declared} ({file})" if declared else f"{name} (config.json)"
        raise UserError(f"'{folder}' holds no vocabulary of a {of}: {_missing(kinds, present)}")
    if complete[:2] == list(T5) and not _same_content(folder, complete[:2]):
        raise UserError(f"'{folder}' holds both {_listed(complete[:2])}; keep one.")
    return name, complete[0]


def _guess(folder: Path, present: set[str]) -> tuple[str, tuple[str, ...]]:
    kinds = (TOKENIZER, *T5, LLAMA, BPE, FAIRSEQ, OPENAI)
    complete = [kind for kind in kinds if present.issuperset(kind)]
    if FAIRSEQ in complete:
        complete.remove(OPENAI)
    if not complete:
        raise UserError(f"'{folder}' holds no vocabulary: {_missing(kinds, present)}")
    if len(complete) > 1:
        raise UserError(
            f"'{folder}' holds several vocabularies ({_listed(complete, '; ')}) and does not say "
            "whose they are: give tokenizer_class in tokenizer_config.json, or keep one."
        )
    names = dict.fromkeys(T5, "T5Tokenizer") | {
        TOKENIZER: BACKEND,
        LLAMA: "LlamaTokenizer",
        FAIRSEQ: "BartTokenizer",
        OPENAI: "GPT2Tokenizer",
        BPE: "GPT2Tokenizer",
    }
    name = names[complete[0]]
    if complete[0] == BPE:
        ids = read_json_object(folder / "vocab.json", default={})
        name = "BartTokenizer" if (ids.get("<s>"), ids.get("</s>")) == (0, 2) else name
    return name, complete[0]


def _is_byte_level(file: Path) -> bool:
    """Returns whether a tokenizer.json cuts or joins texts as bytes, as GPT-2 and Llama 3 do."""
    content = pipelines.tokenizer_json(str(file))
    steps: list[Any] = [content.get("pre_tokenizer"), content.get("decoder")]
    while steps:
        step = steps.pop()
        if isinstance(step, dict):
            if step.get("type") == "ByteLevel":
                return True
            steps += [*(step.get("pretokenizers") or ()), *(step.get("decoders") or ())]
    return False


def _same_content(folder: Path, kinds: Sequence[tuple[str, ...]]) -> bool:
    return len({(folder / kind[0]).read_bytes() for kind in kinds}) == 1


def _listed(kinds: Sequence[tuple[str, ...]], separator: str = " and ") -> str:
    return separator.join(" + ".join(kind) for kind in kinds)


def _missing(kinds: Sequence[tuple[str, ...]], present: set[str]) -> str:
    for kind in kinds:
        lacking = [name for name in kind if name not in present]
        if len(lacking) < len(kind):
            have = [name for name in kind if name in present]
            return f"beside {' and '.join(have)}, {' and '.join(lacking)} is missing."
    return f"there is none of {_listed(kinds, ', ')}."
