"""Writes a vocabulary as the tokenizer's files of a Hugging Face directory."""

import json
import shutil
from pathlib import Path
from typing import Any

from robust_ft import assets
from robust_ft.bucket_copies import local
from robust_ft.errors import UserError
from robust_ft.files import read_json_object, write_json
from robust_ft.vocabulary.base import Vocabulary
from robust_ft.vocabulary.byte import ByteVocabulary
from robust_ft.vocabulary.directory import vocabulary_from_directory
from robust_ft.vocabulary.hub import BpeVocabulary, TokenizersVocabulary
from robust_ft.vocabulary.sentence_piece import SentencePieceVocabulary

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
_SPECIAL = ("pad_token", "eos_token", "bos_token", "unk_token")
_ADDED = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")


def write_hub_files(vocabulary: Vocabulary, folder: Path) -> None:
    """Makes a directory's tokenizer this vocabulary; nothing changes where it is already.

    A tokenizer_config.json that is there keeps its class, its chat template and its flags.

    Args:
        vocabulary: The vocabulary.
        folder: Where a model was written, with the tokenizer's files of the one it came from.

    Raises:
        UserError: It cannot be said in Hugging Face's files.
    """
    if _same(vocabulary, folder):
        return
    settings = read_json_object(folder / CONFIG, default={})
    if isinstance(vocabulary, ByteVocabulary):
        settings |= {"tokenizer_class": "ByT5Tokenizer", "extra_ids": vocabulary.extra_ids}
    elif isinstance(vocabulary, SentencePieceVocabulary):
        name = "tokenizer.model" if vocabulary.decoder_only else "spiece.model"
        source = local(assets.resolve(vocabulary.path)).expanduser()
        if source.resolve() != (folder / name).resolve():
            shutil.copyfile(source, folder / name)
        settings.setdefault(
            "tokenizer_class", "LlamaTokenizer" if vocabulary.decoder_only else "T5Tokenizer"
        )
        if not vocabulary.decoder_only:
            settings["extra_ids"] = vocabulary.extra_ids
    elif isinstance(vocabulary, TokenizersVocabulary | BpeVocabulary):
        tokenizer = json.loads(vocabulary.to_json())
        settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        # Flags such as add_bos_token do not count beside a tokenizer.json.
        tokenizer["post_processor"] = _template(vocabulary)
        write_json(folder / TOKENIZER, tokenizer)
        settings["added_tokens_decoder"] = {
            str(token["id"]): {name: token[name] for name in _ADDED}
            for token in tokenizer["added_tokens"]
        }
        named = {name: getattr(vocabulary, name) for name in _SPECIAL}
        settings |= {name: token for name, token in named.items() if token is not None}
        for name in ("special_tokens_map.json", "added_tokens.json"):
            (folder / name).unlink(missing_ok=True)  # tokenizer_config.json has all of them
    write_json(folder / CONFIG, settings)
    _check(vocabulary, folder)


def _same(vocabulary: Vocabulary, folder: Path) -> bool:
    try:
        return vocabulary_from_directory(folder).fingerprint == vocabulary.fingerprint
    except UserError:
        return False


def _template(vocabulary: TokenizersVocabulary | BpeVocabulary) -> dict[str, Any] | None:
    """Returns the post-processor that puts the vocabulary's tokens around an input."""
    around = [
        [(vocabulary.token(token_id), token_id) for token_id in ids]
        for ids in (vocabulary.input_prefix_ids, vocabulary.input_suffix_ids)
    ]
    if not any(around):
        return None
    before, after = (
        [{"SpecialToken": {"id": t, "type_id": 0}} for t, _ in each] for each in around
    )
    return {
        "type": "TemplateProcessing",
        "single": [*before, {"Sequence": {"id": "A", "type_id": 0}}, *after],
        "pair": [
            *before,
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
            *after,
        ],
        "special_tokens": {
            token: {"id": token, "ids": [token_id], "tokens": [token]}
            for each in around
            for token, token_id in each
        },
    }


def _check(vocabulary: Vocabulary, folder: Path) -> None:
    """Raises a UserError unless the files give the vocabulary's ids back."""
    found = vocabulary_from_directory(folder)
    added = getattr(vocabulary, "added_tokens", ())
    text = " ".join(["The", *(t if isinstance(t, str) else t.content for t in added), "a 1."])
    for name in ("pad_id", "eos_id", "vocab_size", "input_prefix_ids", "input_suffix_ids"):
        ours, theirs = getattr(vocabulary, name), getattr(found, name)
        if ours != theirs:
            raise UserError(
                f"Hugging Face's files cannot say this vocabulary: its {name} is {ours}, and would "
                f"be read as {theirs}; convert with --to=robust_ft."
            )
    if vocabulary.encode(text) != found.encode(text):
        raise UserError(
            f"Hugging Face's files cannot say this vocabulary: '{text}' is "
            f"{vocabulary.encode(text)}, and would be read as {found.encode(text)}; convert with "
            "--to=robust_ft."
        )
