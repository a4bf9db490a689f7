"""BLEU (Papineni et al. 2002), of whole corpora: sacrebleu's, and that of the WebNLG challenge.

`bleu` is for plain text. `webnlg_bleu` gives the number that the WebNLG challenge of 2017 and the
papers on its data report. The functions ending in `_parts` also return a score's components.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from robust_ft.metrics.pairs import References, pairs, streams
from robust_ft.metrics.tokens import Ngram, ngrams

_ORDER = 4
WEBNLG_REFERENCES = 3  # the official scripts compare with the first three
# Latin letters and punctuation that Unicode's decomposition leaves alone.
_ASCII = str.maketrans(
    dict(zip("–—‘’“”øıłđðħ", "--''\"\"oilddh", strict=True))
    | {"ß": "ss", "æ": "ae", "œ": "oe", "þ": "th"}
)


def bleu(targets: References, predictions: Sequence[str]) -> dict[str, float]:
    """BLEU as sacrebleu computes it by default: 13a tokens, with case, exponential smoothing.

    Args:
        targets: The reference of each example, or several (not always as many).
        predictions: The predicted texts, not tokenized.

    Returns:
        {"bleu": 0..100}.

    Raises:
        UserError: No examples, or not as many targets as predictions.
    """
    return _score("bleu", bleu_parts(targets, predictions))


def bleu_parts(targets: References, predictions: Sequence[str]) -> dict[str, float]:
    """Returns the score of `bleu` and its components, named as in `multi_bleu_parts`."""
    from sacrebleu.metrics.bleu import BLEU

    examples = pairs("bleu", targets, predictions)
    # Forced: it would only warn of tokenized text, which WebNLG's is.
    result = BLEU(force=True).corpus_score(list(predictions), streams(examples))
    lengths = result.sys_len, result.ref_len
    return _parts("bleu", result.score, result.precisions, result.bp, *lengths)


def multi_bleu(targets: References, predictions: Sequence[str]) -> dict[str, float]:
    """BLEU as Moses's `multi-bleu.perl -lc` computes it: lower-cased words between white space.

    There is no smoothing: without a common 4-gram the score is 0.

    Args:
        targets: The reference of each example, or several. An example with fewer than others has
            blank lines in reference files, and so it has here: empty references, which count for
            the brevity penalty when they are the closest in length.
        predictions: The predicted texts, tokenized.

    Returns:
        {"multi_bleu": 0..100}.

    Raises:
        UserError: No examples, or not as many targets as predictions.
    """
    return _score("multi_bleu", multi_bleu_parts(targets, predictions))


def multi_bleu_parts(targets: References, predictions: Sequence[str]) -> dict[str, float]:
    """Returns the score of `multi_bleu` and its components.

    Returns:
        {"multi_bleu": 0..100, "precision_1".."precision_4": 0..100, "brevity_penalty": 0..1,
        "ratio" of lengths, "prediction_length" and "reference_length" in tokens}.
    """
    return _multi_bleu_of(multi_bleu_counts(targets, predictions).sum(axis=0))


def multi_bleu_counts(
    targets: References, predictions: Sequence[str]
) -> Int[np.ndarray, "examples 10"]:
    """Returns the sufficient statistics of `multi_bleu`, which are summed over examples.

    Returns:
        For each example its length and that of the closest reference, in tokens, and the matching
        and all n-grams of the prediction, n from 1 to 4.
    """
    examples = pairs("multi_bleu", targets, predictions)
    width = max(len(references) for references, _ in examples)
    return np.stack(
        [
            _counts(prediction, [*references, *[""] * (width - len(references))])
            for references, prediction in examples
        ]
    )


def _multi_bleu_of(total: Int[np.ndarray, "10"]) -> dict[str, float]:
    length, reference_length = int(total[0]), int(total[1])
    precisions = 100 * total[2 : 2 + _ORDER] / np.maximum(total[2 + _ORDER :], 1)
    penalty = min(1.0, math.exp(1 - reference_length / length)) if length else 0.0
    score = penalty * math.exp(np.log(precisions).mean()) if precisions.all() else 0.0
    return _parts("multi_bleu", score, precisions, penalty, length, reference_length)


def webnlg_bleu(targets: References, predictions: Sequence[str]) -> dict[str, float]:
    """BLEU of the WebNLG challenge 2017: `webnlg_text` scored with `multi_bleu`.

    Text that is in the challenge's form already, such as its own files, stays as it is.

    Args:
        targets: The reference of each example, or several, of which the first three count.
        predictions: The predicted texts.

    Returns:
        {"webnlg_bleu": 0..100}.

    Raises:
        UserError: No examples, or not as many targets as predictions.
    """
    return _score("webnlg_bleu", webnlg_bleu_parts(targets, predictions))


def webnlg_bleu_parts(targets: References, predictions: Sequence[str]) -> dict[str, float]:
    """Returns the score of `webnlg_bleu` and its components, named as in `multi_bleu_parts`."""
    parts = _multi_bleu_of(webnlg_bleu_counts(targets, predictions).sum(axis=0))
    return {"webnlg_bleu": parts.pop("multi_bleu"), **parts}


def webnlg_bleu_counts(
    targets: References, predictions: Sequence[str]
) -> Int[np.ndarray, "examples 10"]:
    """Returns the sufficient statistics of `webnlg_bleu`, as `multi_bleu_counts`."""
    examples = pairs("webnlg_bleu", targets, predictions)
    references = [list(map(webnlg_text, texts[:WEBNLG_REFERENCES])) for texts, _ in examples]
    return multi_bleu_counts(references, [webnlg_text(text) for text in predictions])


def bleu_counts(targets: References, predictions: Sequence[str]) -> Int[np.ndarray, "examples 10"]:
    """Returns the sufficient statistics of `bleu`, as `multi_bleu_counts`."""
    from sacrebleu.metrics.bleu import BLEU

    # The effective order changes a sentence's score, which is not used, and no count.
    scorer = BLEU(force=True, effective_order=True)
    scores = [
        scorer.sentence_score(prediction, references)
        for references, prediction in pairs("bleu", targets, predictions)
    ]
    return np.array([[s.sys_len, s.ref_len, *s.counts, *s.totals] for s in scores], np.int64)


def bleu_of_counts(total: Int[np.ndarray, "10"]) -> float:
    """Returns `bleu` from summed counts."""
    from sacrebleu.metrics.bleu import BLEU

    length, reference_length, *ngrams_counted = (int(count) for count in total)
    matching, predicted = ngrams_counted[:_ORDER], ngrams_counted[_ORDER:]
    result = BLEU.compute_bleu(matching, predicted, length, reference_length, smooth_method="exp")
    return min(result.score, 100.0)


def multi_bleu_of_counts(total: Int[np.ndarray, "10"]) -> float:
    """Returns `multi_bleu` (or `webnlg_bleu`) from summed counts."""
    return _multi_bleu_of(total)["multi_bleu"]


def webnlg_text(text: str) -> str:
    """Returns text as the challenge's scripts compare it: lower-case words and single characters.

    Everything but letters, digits and "_" stands alone. Latin letters and punctuation are spelt
    in ASCII; other scripts, which the challenge's scripts would transcribe, stay as they are.
    """
    plain = unicodedata.normalize("NFKD", text.lower()).translate(_ASCII)
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    return " ".join(re.sub(r"(\W)", r" \1 ", plain).split())


def _counts(prediction: str, references: Sequence[str]) -> Int[np.ndarray, "10"]:
    """Returns length, closest reference length, matching n-grams (1 to 4) and all n-grams."""
    words = prediction.lower().split()
    predicted = ngrams(words, _ORDER)
    allowed: Counter[Ngram] = Counter()
    lengths = []
    for reference in references:
        tokens = reference.lower().split()
        lengths.append(len(tokens))
        allowed |= ngrams(tokens, _ORDER)
    # Of two equally close references the shorter one counts.
    closest = min(lengths, key=lambda length: (abs(length - len(words)), length))
    sums = np.zeros((2, _ORDER), np.int64)
    for ngram, count in predicted.items():
        sums[:, len(ngram) - 1] += min(count, allowed[ngram]), count
    return np.concatenate([[len(words), closest], *sums])


def _parts(
    name: str,
    score: float,
    precisions: Sequence[float] | np.ndarray,
    penalty: float,
    length: int,
    reference_length: int,
) -> dict[str, float]:
    return {
        name: min(score, 100.0),  # a perfect one may be rounded up
        **{f"precision_{n}": float(value) for n, value in enumerate(precisions, 1)},
        "brevity_penalty": penalty,
        "ratio": length / reference_length if reference_length else 0.0,
        "prediction_length": length,
        "reference_length": reference_length,
    }


def _score(name: str, parts: dict[str, float]) -> dict[str, float]:
    return {name: parts[name]}
