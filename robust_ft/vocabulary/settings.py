"""What the JSON files beside a tokenizer say, read as transformers 5 reads them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from robust_ft.errors import UserError
from robust_ft.files import read_json_object
from robust_ft.vocabulary.hub import AddedToken

NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
SENTINEL = re.compile(r"▁?<extra_id_\d+>")


class Settings:
    """The settings of the tokenizer in a directory.

    tokenizer_config.json goes before all others if it has an added_tokens_decoder: then
    special_tokens_map.json and added_tokens.json, which older versions of transformers wrote, are
    not read, as there. Without one, special_tokens_map.json goes first.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._tokenizer = read_json_object(folder / TOKENIZER_CONFIG, default={})
        self._special = read_json_object(folder / SPECIAL_TOKENS_MAP, default={})
        self._added = read_json_object(folder / ADDED_TOKENS, default={})
        self._model = read_json_object(folder / "config.json", default={})
        if self.has_decoder:
            self._special, self._added = {}, {}

    @property
    def has_decoder(self) -> bool:
        """Whether tokenizer_config.json lists the added tokens."""
        return "added_tokens_decoder" in self._tokenizer

    @property
    def model_type(self) -> str:
        """`model_type` of config.json, '' if it has none."""
        value = self._model.get("model_type")
        return value if isinstance(value, str) else ""

    def tokenizer_class(self) -> tuple[str, str]:
        """Returns the name of the tokenizer's class and the file that it is in, '' without one."""
        for settings, file in ((self._tokenizer, TOKENIZER_CONFIG), (self._model, "config.json")):
            name = settings.get("tokenizer_class")
            if isinstance(name, str) and name:
                return name, file
        return "", ""

    def flag(self, name: str, default: bool = False, null: bool = False) -> bool:
        """Returns a flag of tokenizer_config.json, `default` without it, `null` if it is null.

        Raises:
            UserError: If it is neither true nor false.
        """
        value = self._tokenizer.get(name, default)
        if value is not None and not isinstance(value, bool):
            raise UserError(
                f"'{self.folder / TOKENIZER_CONFIG}' has {name}: {value!r}; it is true or false."
            )
        return null if value is None else value

    def names(self, setting: str) -> bool:
        """Returns whether a file names a special token."""
        return self._value(setting)[0] is not None

    def named(self, defaults: Mapping[str, str]) -> dict[str, AddedToken]:
        """Returns special tokens by their settings, in the order in which new ones get their ids.

        Args:
            defaults: Those that the class has where the files have none.
        """
        more = [
            name
            for name, value in self._tokenizer.items()
            if name.endswith("_token") and name not in NAMED and isinstance(value, str | dict)
        ]
        found: dict[str, AddedToken] = {}
        for name in [*NAMED, *more, *(name for name in defaults if name not in NAMED)]:
            value, file = self._value(name)
            if value is not None:
                found[name] = self._parse(value, f"{file} has {name}", special=True)
            elif not self._has(name) and name in defaults:
                found[name] = AddedToken(defaults[name])
        extra = self._value("extra_special_tokens")[0]
        for name, value in extra.items() if isinstance(extra, dict) else ():
            found[name] = self._parse(value, f"extra_special_tokens.{name}", special=True)
        return found

    def token_id(self, name: str) -> int | None:
        """Returns config.json's id of a special token, of several the first."""
        value = self._model.get(f"{name}_id")
        value = value[0] if isinstance(value, list) and value else value
        return value if isinstance(value, int) else None

    def added_tokens(self, named: Iterable[str]) -> dict[int, AddedToken]:
        """Returns the added tokens that the settings declare, by id and in the order of their ids.

        Args:
            named: Special tokens: added_tokens.json does not say which of its tokens are special.

        Raises:
            UserError: If a file's entry is not a token and its id, or two have one id.
        """
        if self.has_decoder:
            return self._decoder()
        special = {*named, *(token.content for token in self.extra() or ())}
        found: dict[int, AddedToken] = {}
        for content, token_id in self._added.items():
            if type(token_id) is not int or token_id < 0:
                raise UserError(
                    f"'{self.folder / ADDED_TOKENS}' gives '{content}' the id {token_id!r}, which "
                    "is no id."
                )
            if token_id in found:
                raise UserError(
                    f"'{self.folder / ADDED_TOKENS}' gives the id {token_id} to both "
                    f"'{found[token_id].content}' and '{content}'."
                )
            found[token_id] = AddedToken(content, content in special, content not in special)
        return dict(sorted(found.items()))

    def extra(self, own: Sequence[AddedToken] | None = None) -> list[AddedToken] | None:
        """Returns the further special tokens, without names of their own; None if nothing is said.

        Args:
            own: Those of a SentencePiece model: tokenizer_config.json goes before them, and they
                before special_tokens_map.json.
        """
        for file in (self._tokenizer, {} if own is not None else self._special):
            for name in ("extra_special_tokens", "additional_special_tokens"):
                if file.get(name) or (name in file and file is self._tokenizer):
                    value = file[name]
                    tokens = value if isinstance(value, list) else []
                    return [self._parse(t, name, special=True) for t in tokens]
        return None if own is None else list(own)

    def sentinels(self) -> int | None:
        """Returns how many sentinels the settings declare, None if they declare nothing."""
        extra_ids = self._tokenizer.get("extra_ids")
        if type(extra_ids) is int and extra_ids > 0:
            return extra_ids
        names = {token.content for token in self.extra() or ()}
        names |= {token.content for token in self.added_tokens(()).values()}
        count = sum(1 for name in names if SENTINEL.fullmatch(name))
        return count or (extra_ids if type(extra_ids) is int else None)

    def _has(self, name: str) -> bool:
        return name in self._special or name in self._tokenizer

    def _value(self, name: str) -> tuple[Any, str]:
        if name in self._special:
            return self._special[name], SPECIAL_TOKENS_MAP
        return self._tokenizer.get(name), TOKENIZER_CONFIG

    def _decoder(self) -> dict[int, AddedToken]:
        found: dict[int, AddedToken] = {}
        try:
            for key, value in (self._tokenizer["added_tokens_decoder"] or {}).items():
                entry = self._parse(value, f"added_tokens_decoder.{key}", special=False)
                found[int(key)] = entry
        except (AttributeError, ValueError) as error:
            raise UserError(
                f"'{self.folder / TOKENIZER_CONFIG}' has an added_tokens_decoder that is not "
                "tokens by their ids."
            ) from error
        return dict(sorted(found.items()))

    def _parse(self, value: Any, where: str, special: bool) -> AddedToken:
        """Returns a token that a file spells as a string or an object with flags."""
        if isinstance(value, str):
            return AddedToken(value)
        content = value.get("content") if isinstance(value, dict) else None
        if not isinstance(content, str):
            raise UserError(f"'{self.folder}': {where}: {value!r}, which is not a token.")
        special = bool(value.get("special", special))
        flags = {name: bool(value.get(name, False)) for name in ("lstrip", "rstrip", "single_word")}
        normalized = bool(value.get("normalized", not special))
        return AddedToken(content, special, normalized, **flags)
