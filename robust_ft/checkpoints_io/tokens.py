"""The token ids and the vocabulary that a model was trained with, as exports and stages keep them.

A prompt that was trained with a separator answers nonsense without it, and no error tells. So
exports record it: `load` applies it, and recipes that say otherwise are refused.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import robust_ft.vocabulary
from robust_ft import assets, buckets
from robust_ft.checkpoints_io import added_tokens, native
from robust_ft.checkpoints_io.tensors import Checkpoint
from robust_ft.errors import UserError
from robust_ft.models.model import Model
from robust_ft.vocabulary import Vocabulary, vocabulary_from_directory, vocabulary_settings


@dataclasses.dataclass(frozen=True)
class Tokens:
    """How a model was trained to read and write texts.

    Attributes:
        ids: As in `Checkpoint.token_ids`, all of them: what is not there, the model did not have.
        vocab_size: Rows of the model's embedding.
        vocabulary: {"kind": its class, and its fields}, with the paths of its files.
        fingerprint: The vocabulary's.
    """

    ids: Mapping[str, Any]
    vocab_size: int
    vocabulary: Mapping[str, Any]
    fingerprint: str

    @classmethod
    def of(cls, model: Model, vocabulary: Vocabulary) -> "Tokens":
        return cls(
            native.token_ids(model),
            model.config.vocab_size,
            _settings(vocabulary),
            vocabulary.fingerprint,
        )

    @classmethod
    def read(cls, fields: Mapping[str, Any] | None, file: Path) -> "Tokens | None":
        """Returns what a file holds, None if it is of a version that kept nothing.

        Raises:
            UserError: Fields are missing or unknown.
        """
        if fields is None:
            return None
        try:
            return cls(**fields)
        except TypeError:
            names = ", ".join(field.name for field in dataclasses.fields(cls))
            raise UserError(f"The tokens in '{file}' need {names}, and nothing else.") from None

    def check_model(self, model: Model, source: str) -> None:
        """Raises a UserError unless a model has the same ids.

        Args:
            model: The model of a recipe.
            source: What was trained with these.
        """
        own = native.token_ids(model)
        for name in (*self.ids, *own):
            if self.ids.get(name) != own.get(name):
                field = f"Model.{name}_id" + "s" * (name == "stop")
                raise UserError(
                    f"'{source}' was trained with {field}={self.ids.get(name)}, the model has "
                    f"{own.get(name)}."
                )

    def check_vocabulary(self, vocabulary: Vocabulary, source: str, other: str) -> None:
        """Raises a UserError unless a vocabulary gives the same ids.

        Args:
            vocabulary: The vocabulary.
            source: What was trained with these.
            other: What has the vocabulary.
        """
        if vocabulary.fingerprint != self.fingerprint:
            kind, size = type(vocabulary).__name__, vocabulary.vocab_size
            raise UserError(
                f"'{source}' was trained with {self._named}, {other} has a {kind} of {size} tokens "
                f"({vocabulary.fingerprint[:8]})."
            )

    def applied(
        self, base: Checkpoint, source: str, given: Vocabulary | None = None
    ) -> tuple[Checkpoint, Vocabulary]:
        """Returns a base with these ids and as many tokens, and the vocabulary.

        Args:
            base: The model that what was trained is laid over.
            source: What was trained with these.
            given: The vocabulary to use; by default the base's, or the one that was used in
                training.

        Raises:
            UserError: The vocabulary is not there or another one, or the base has more tokens.
        """
        if given is not None:
            self.check_vocabulary(given, source, "the given vocabulary")
        vocabulary = given or self._open(base, source)
        config: Any = base.config
        if config.vocab_size > self.vocab_size:
            raise UserError(
                f"'{source}' was trained on a model of {self.vocab_size} tokens, '{base.source}' "
                f"has {config.vocab_size}."
            )
        config = dataclasses.replace(config, vocab_size=self.vocab_size)
        tensors = added_tokens.extended_tensors(Model(config), base.tensors, base.source)
        settings, files = vocabulary_settings(vocabulary) if is_ours(vocabulary) else (None, ())
        names = {file.name for file in files}
        kept = tuple(file for file in base.files if file.name not in names)
        changed = dataclasses.replace(
            base,
            config=config,
            tensors=tensors,
            token_ids=self.ids,
            vocabulary=settings,
            files=(*kept, *files),
        )
        return changed, vocabulary

    @property
    def _named(self) -> str:
        return f"a {self.vocabulary.get('kind')} (fingerprint {self.fingerprint[:8]})"

    def _open(self, base: Checkpoint, source: str) -> Vocabulary:
        """Returns the vocabulary: the base's own, or its files read as in training."""
        own = base_vocabulary(base)
        if own is not None and own.fingerprint == self.fingerprint:
            return own
        recorded = dict(self.vocabulary)
        paths = {name for name in recorded if name.endswith("path") and recorded[name]}
        # Where the files were, or else those of the same names beside the base.
        named = recorded | {name: Path(recorded[name]).name for name in paths}
        for settings in (recorded, named):
            try:
                vocabulary = native.vocabulary(dataclasses.replace(base, vocabulary=settings))
                if vocabulary is not None and vocabulary.fingerprint == self.fingerprint:
                    return vocabulary
            except UserError:
                continue
        files = ", ".join(f"'{recorded[name]}'" for name in sorted(paths))
        beside = f": {files} is gone or has changed" if files else ""
        raise UserError(
            f"'{source}' was trained with {self._named}, which neither '{base.source}' has nor any "
            f"file{beside}; give load(..., vocabulary=...)."
        )


def agreed(trained: Iterable[tuple[str, Tokens | None]]) -> tuple[str, Tokens] | None:
    """Returns what all of several things were trained with, and the first one's name.

    Args:
        trained: (what to call it in errors, what it was trained with if it is known).

    Raises:
        UserError: They differ.
    """
    known = [(source, tokens) for source, tokens in trained if tokens is not None]
    for source, tokens in known[1:]:
        first, others = known[0]
        for field in ("ids", "vocab_size", "fingerprint"):
            one, two = getattr(others, field), getattr(tokens, field)
            if one != two:
                raise UserError(
                    f"'{first}' and '{source}' were trained with different tokens: their {field} "
                    f"are {one} and {two}."
                )
    return known[0] if known else None


def base_vocabulary(base: Checkpoint) -> Vocabulary | None:
    """Returns a model directory's own vocabulary, None if it has none."""
    try:
        return native.vocabulary(base) or vocabulary_from_directory(base.source)
    except UserError:
        return None


def _settings(vocabulary: Vocabulary) -> dict[str, Any]:
    """Returns a vocabulary's class and fields, with whole paths."""
    kind = type(vocabulary)
    if not is_ours(vocabulary):
        return {"kind": f"{kind.__module__}.{kind.__qualname__}"}
    settings, _ = vocabulary_settings(vocabulary)
    for name in settings:
        if name.endswith("path") and settings[name] is not None:
            settings[name] = located(getattr(vocabulary, name))
    return settings


def is_ours(vocabulary: Vocabulary) -> bool:
    """Returns whether its settings can be kept in a file, unlike those of users' own classes."""
    kind = type(vocabulary)
    return getattr(robust_ft.vocabulary, kind.__name__, None) is kind


def located(path: str) -> str:
    """Returns a path that means the same in any folder; other names as they are."""
    if buckets.is_bucket(path):
        return path
    here = Path(path).expanduser().absolute()
    return assets.named(here) or (str(here) if here.exists() else path)
