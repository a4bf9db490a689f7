"""From one feature of a task's example, a text or token ids, to the token ids of a run."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import seqio

from robust_ft.data.cache import TaskData
from robust_ft.data.task_rows import FEATURES, LISTS, WHOLE
from robust_ft.errors import UserError
from robust_ft.vocabulary import Vocabulary, cut


class Tokenized(NamedTuple):
    """One feature of one example.

    Attributes:
        ids: Token ids, int64[tokens], truncated to the feature's length.
        length: Number of tokens before truncation.
    """

    ids: np.ndarray
    length: int


class FeatureTokenizer:
    """Turns one feature ('inputs' or 'targets') of a task's examples into token ids."""

    def __init__(self, task: seqio.Task, feature: str, data: TaskData):
        self._where = f"Task '{task.name}', feature '{feature}'"
        self._feature = feature
        self._vocabulary = data.vocabulary
        self._length = data.lengths[feature]
        declared = task.output_features.get(feature)
        ours = data.vocabulary
        self._prefix: tuple[int, ...] = ours.target_prefix_ids
        self._suffix: tuple[int, ...] = (ours.eos_id,)
        if feature == "inputs":
            # The task says whether its inputs end in EOS, the vocabulary which ids that takes.
            has_end = declared is None or declared.add_eos
            self._prefix = ours.input_prefix_ids
            self._suffix = ours.input_suffix_ids if has_end else ()
        if self._length <= len(self._prefix) + len(self._suffix):
            raise UserError(
                f"{feature}_length of task '{task.name}' is {self._length}, which leaves no place "
                "for a token between those that the model puts around every text."
            )
        self._declared = declared.vocabulary if declared is not None else None
        self._checked = False

    def __call__(self, example: Mapping[str, Any]) -> Tokenized:
        """Tokenizes the feature of an example, truncated on the right.

        A text keeps its EOS, as with seqio's `append_eos_after_trim`.

        Raises:
            UserError: The task tokenizes by itself, and not with the run's vocabulary.
        """
        value = example[self._feature]
        suffix: tuple[int, ...] = ()
        if isinstance(value, bytes):
            suffix = self._suffix
            tokens = [*self._prefix, *self._vocabulary.encode(value.decode("utf-8")), *suffix]
        else:
            self._check(value)
            tokens = value.tolist()
        ids = np.asarray(cut(tokens, self._length, suffix), np.int64)
        return Tokenized(ids, len(tokens))

    def fits(self, text: str) -> bool:
        """Whether a text needs no truncation."""
        around = len(self._prefix) + len(self._suffix)
        return around + len(self._vocabulary.encode(text)) <= self._length

    def _check(self, value: Any) -> None:
        """Checks ids that the task made itself against the run's vocabulary."""
        if getattr(value, "ndim", None) != 1 or value.dtype.kind not in "iu":
            raise UserError(f"{self._where} is neither a text nor a list of token ids.")
        ours, theirs = self._vocabulary, self._declared
        if not self._checked and theirs is not None:
            self._checked = True
            if not isinstance(theirs, seqio.PassThroughVocabulary) and _differ(ours, theirs):
                raise UserError(
                    f"{self._where} is tokenized by the task with another vocabulary ({theirs}; "
                    f"{theirs.vocab_size} ids, EOS {theirs.eos_id}) than the model's "
                    f"({ours}; {ours.vocab_size} ids, EOS {ours.eos_id})."
                )
        if len(value) and not 0 <= value.min() <= value.max() < ours.vocab_size:
            raise UserError(
                f"{self._where} has a token id {value.max()}, outside the vocabulary of"
                f" {ours.vocab_size} ids."
            )


def _differ(ours: Vocabulary, theirs: seqio.Vocabulary) -> bool:
    # Two vocabularies cannot be compared in general: a text with most of what differs tells.
    probe = "Is it true or false? The 12 tests of Zürich. <extra_id_0> question: answer:"
    same_ids = (ours.eos_id, ours.pad_id) == (theirs.eos_id, theirs.pad_id)
    # Ours may have more extra ids.
    smaller = theirs.vocab_size <= ours.vocab_size
    return not (same_ids and smaller and list(theirs.encode(probe)) == ours.encode(probe))


def texts(
    example: Mapping[str, Any],
    features: Mapping[str, Tokenized],
    vocabulary: Vocabulary,
    is_evaluated: bool,
) -> dict[str, Any]:
    """Returns what the cache keeps beside the token ids.

    Args:
        example: The task's example.
        features: Its features, which are decoded where the task gives token ids and no text.
        vocabulary: Decodes them.
        is_evaluated: Whether to keep the texts of inputs and targets, too.
    """
    texts: dict[str, Any] = {}
    for feature in FEATURES if is_evaluated else ():
        value = example.get(f"{feature}_pretokenized", example[feature])
        if isinstance(value, bytes):
            texts[feature] = value.decode("utf-8")
        else:
            texts[feature] = vocabulary.decode(features[feature].ids.tolist())
    for name in LISTS:
        if name in example:
            texts[name] = [text.decode("utf-8") for text in np.atleast_1d(example[name]).tolist()]
    if "id" in example and np.issubdtype(np.asarray(example["id"]).dtype, np.integer):
        texts["id"] = int(example["id"])
    if WHOLE in example:
        texts[WHOLE] = example[WHOLE]
    return texts
