"""Puts a vocabulary together from a model directory, in the ways of transformers 5's classes."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from absl import logging

from robust_ft.errors import UserError
from robust_ft.vocabulary import pipelines
from robust_ft.vocabulary.classes import BACKEND, CLASSES, TOKENIZER
from robust_ft.vocabulary.hub import AddedToken, BpeVocabulary, TokenizersVocabulary
from robust_ft.vocabulary.settings import SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG, Settings


class Reader:
    """Reads a vocabulary from the files of a class and the settings beside them."""

    def __init__(self, folder: Path, name: str, files: tuple[str, ...], settings: Settings):
        """Reads the files.

        Args:
            folder: The directory.
            name: A class in `CLASSES`.
            files: Those of the class that are the vocabulary.
            settings: The directory's.
        """
        self._folder, self._name, self._settings = folder, name, settings
        self._paths = tuple(str(folder / file) for file in files)
        self._file = files[0]
        self._is_json = files == TOKENIZER
        self._is_sentencepiece = self._file.endswith(".model")
        self._pipeline = CLASSES[name].pipeline
        self._pieces: pipelines.Pieces | None = None
        if self._is_json:
            _ = TokenizersVocabulary(self._paths[0]).vocab_size  # it is one
        if self._is_sentencepiece:
            self._pipeline = self._pipeline or "sentencepiece"
            self._pieces = pipelines.from_sentencepiece(self._paths[0], self._pipeline)
        elif self._is_json and self._pipeline is not None:
            self._pieces = pipelines.from_tokenizer_json(self._paths[0])
            if not self._file_fits(self._pipeline):
                self._pipeline = None
        self._bare = self._make()
        _ = self._bare.vocab_size  # errors of the files come before those of the settings

    def _file_fits(self, pipeline: str) -> bool:
        """Returns whether a class's way to cut a text is one that a tokenizer.json allows."""
        unigram = self._pieces is not None and self._pieces.scores is not None
        if self._pieces is None or unigram != (pipeline == "t5"):
            return False  # the class would lose the text of such a model
        # GPT-2's class is named for many models that split digits or symbols in ways of their own.
        return pipeline != "gpt2" or pipelines.cuts_alike(self._paths[0], pipeline)

    def vocabulary(
        self, added_tokens: Sequence[str] = (), pad_token: str | None = None
    ) -> TokenizersVocabulary | BpeVocabulary:
        """Returns the vocabulary; see `vocabulary_from_directory`."""
        defaults = CLASSES[self._name].tokens
        if self._name == BACKEND and self._pieces is not None:
            defaults = dict(self._pieces.named)
        named = self._settings.named(defaults)
        contents = {setting: token.content for setting, token in named.items()}
        declared = self._declared(contents.values())
        tokens = self._special_tokens(contents, {token.content for token in declared.values()})
        added = self._added(declared, named, tokens)
        there_already = {token.content for token in (*declared.values(), *added)}
        if pad_token is not None:
            tokens["pad_token"] = pad_token
        vocabulary = self._make(
            **tokens,
            **self._around(contents, tokens),
            added_tokens=(*added, *(t for t in added_tokens if t not in there_already)),
            split_special_tokens=self._settings.flag("split_special_tokens"),
        )
        for token_id, token in declared.items():
            found = vocabulary.token_id(token.content)
            if found != token_id:
                raise UserError(
                    f"'{self._folder}' declares the token '{token.content}' with the id "
                    f"{token_id}, but its {self._file} gives it {found}."
                )
        self._warn()
        return vocabulary

    def _make(self, **fields: Any) -> TokenizersVocabulary | BpeVocabulary:
        is_one_file = self._is_json or self._is_sentencepiece
        kind: Any = TokenizersVocabulary if is_one_file else BpeVocabulary
        space = None if self._pipeline is None else self._prefix_space()
        made = kind(*self._paths, pipeline=self._pipeline, prefix_space=space, **fields)
        return cast(TokenizersVocabulary | BpeVocabulary, made)

    def _prefix_space(self) -> str | None:
        """Returns where the class puts a space before a text, None for its usual place."""
        if self._pipeline in ("llama", "code_llama"):
            if not self._settings.flag("add_prefix_space", True, null=True):
                return "never"
            legacy = self._pipeline == "llama" and self._settings.flag("legacy")
            return "always" if legacy else None
        space = self._pipeline in ("gpt2", "qwen2") and self._settings.flag("add_prefix_space")
        return "always" if space else None

    def _declared(self, named: Iterable[str]) -> dict[int, AddedToken]:
        """Returns the added tokens that have an id, by it."""
        declared = self._settings.added_tokens(named)
        if self._is_json and not self._settings.has_decoder:
            own = TokenizersVocabulary(self._paths[0]).added_by_id()
            declared = dict(sorted((declared | own).items()))
        return declared

    def _added(
        self,
        declared: Mapping[int, AddedToken],
        named: Mapping[str, AddedToken],
        tokens: Mapping[str, Any],
    ) -> list[AddedToken]:
        """Returns the tokens to add, in the order in which new ones get their ids."""
        sentinels = self._sentinels()
        if self._is_sentencepiece and self._pieces is not None:
            own = [AddedToken(token, special) for token, special in self._pieces.declared]
            first, extra = sentinels, self._settings.extra(own)
        else:
            first, extra = [], self._settings.extra()
            extra = sentinels[::-1] if extra is None else extra
        found = {token.content: token for token in first}
        found |= {token.content: token for token in declared.values()}
        for token in (*named.values(), *(extra or ())):
            found.setdefault(token.content, token)
        special = {token.content for token in named.values()}
        wanted = [t._replace(special=t.special or t.content in special) for t in found.values()]
        if self._name == "Qwen2Tokenizer" and self._pipeline is not None:  # it forgets their flags
            special |= {token.content for token in extra or ()}
            wanted = [AddedToken(t.content) if t.content in special else t for t in wanted]
        there = {t.content: t for t in self._make(**tokens).added_by_id().values()}
        return [token for token in wanted if there.get(token.content) != token]

    def _sentinels(self) -> list[AddedToken]:
        """Returns the sentinels of a T5 in the order of their ids behind a SentencePiece model."""
        if self._pipeline != "t5" or self._pieces is None or "▁<extra_id_0>" in self._pieces.ids:
            return []
        count = self._settings.sentinels()
        count = 100 if count is None else count
        return [AddedToken(f"<extra_id_{i}>") for i in reversed(range(count))]

    def _special_tokens(self, named: Mapping[str, str], declared: set[str]) -> dict[str, Any]:
        """Returns the special tokens that a vocabulary has by name."""
        tokens: dict[str, str | None] = {}
        for setting in ("eos_token", "pad_token", "unk_token", "bos_token"):
            token, token_id = named.get(setting), self._settings.token_id(setting)
            is_there = token is not None and self._bare.token_id(token) is not None
            if token_id is not None and not (self._settings.names(setting) or is_there):
                token = self._bare.token(token_id) or token  # config.json's
            tokens[setting] = token
        eos = tokens["eos_token"]
        if eos is None:
            raise UserError(
                f"'{self._folder}' does not say what ends a sequence; give eos_token in its "
                f"{TOKENIZER_CONFIG}."
            )
        if eos not in declared and self._bare.token_id(eos) is None:
            raise UserError(
                f"The vocabulary of '{self._folder}' ({self._file}) has no token '{eos}', which "
                f"is the eos_token of its {TOKENIZER_CONFIG} or {SPECIAL_TOKENS_MAP}; give one "
                "that it has, or declare it in added_tokens_decoder."
            )
        if tokens["unk_token"] == eos:
            tokens["unk_token"] = None  # GPT-2's settings name it, its bytes never need it
        return tokens

    def _around(self, named: Mapping[str, str], tokens: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the tokens around inputs and before targets, as in the hub's tokenizer."""
        bos, eos = tokens["bos_token"], tokens["eos_token"]
        name = self._name if self._pipeline is not None else BACKEND
        if name == "BartTokenizer":
            start = (named["cls_token"],) if "cls_token" in named else ()
            end = named.get("sep_token", eos)
            return {"input_prefix": start, "input_suffix": (end,), "target_prefix": start}
        if name == "T5Tokenizer":
            return {"input_suffix": (eos,)}
        add_bos, add_eos = (self._settings.flag(f"add_{which}_token") for which in ("bos", "eos"))
        if name == "CodeLlamaTokenizer":
            add_bos = self._is_json or self._settings.flag("add_bos_token", True)
            add_eos = add_eos and not self._is_json
        elif self._is_json:  # in the hub its template goes before the flags
            return self._template()
        elif name == "LlamaTokenizer" and not self._settings.tokenizer_class()[0]:
            # A lone tokenizer.model, which the hub cannot read: as Llama was trained.
            add_bos = self._settings.flag("add_bos_token", True)
        return {
            "input_prefix": (bos,) if add_bos and bos is not None else (),
            "input_suffix": (eos,) if add_eos else (),
        }

    def _template(self) -> dict[str, Any]:
        """Returns what the template of the tokenizer.json puts around a text."""
        around = []
        for ids in cast(TokenizersVocabulary, self._bare).template():
            tokens = [self._bare.token(i) for i in ids]
            if None in tokens:
                raise UserError(
                    f"The template of '{self._paths[0]}' (post_processor) has the id "
                    f"{ids[tokens.index(None)]}, which is no token's."
                )
            around.append(tuple(tokens))
        prefix, suffix = around
        # What stands before an encoder-decoder's inputs stands before its targets, too (BART).
        target = prefix if self._name == "BartTokenizer" else ()
        return {"input_prefix": prefix, "input_suffix": suffix, "target_prefix": target}

    def _warn(self) -> None:
        """Says where texts are cut in another way than the vocabulary's own file says."""
        if self._pipeline == "sentencepiece":
            logging.warning(
                "'%s' is read as transformers reads it without a LlamaTokenizer: no space is put "
                "before a text, though SentencePiece puts one.",
                self._paths[0],
            )
        elif self._is_json and CLASSES[self._name].pipeline is not None:
            file = TokenizersVocabulary(self._paths[0])
            if self._pipeline is None:
                logging.warning(
                    "'%s' cuts texts in another way than its class, the %s of transformers, would: "
                    "the file holds here, as the model was trained. For transformers to do the "
                    "same, say tokenizer_class: PreTrainedTokenizerFast in %s.",
                    self._paths[0],
                    self._name,
                    TOKENIZER_CONFIG,
                )
            elif any(file.encode(t) != self._bare.encode(t) for t in pipelines.PROBES):
                logging.warning(
                    "'%s' is read as transformers reads it for a %s, which cuts some texts in "
                    "another way than the file says; TokenizersVocabulary is the file as it is.",
                    self._paths[0],
                    self._name,
                )
