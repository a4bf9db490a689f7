"""NIST (Doddington 2002): n-gram precision in which a rare n-gram tells more than a common one."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from robust_ft.metrics.pairs import References, pairs
from robust_ft.metrics.tokens import Ngram, ngrams, tokenizer_13a

_ORDER = 5
# Halves the score of predictions two thirds as long as their references.
_BETA = math.log(0.5) / math.log(1.5) ** 2


def nist(targets: References, predictions: Sequence[str]) -> dict[str, float]:
    """NIST of a whole corpus as mteval-v13a and the E2E challenge compute it, without case.

    Args:
        targets: The reference of each example, or several: an n-gram may come from any of them, and
            their mean length is the length that a prediction should have.
        predictions: The predicted texts, not tokenized.

    Returns:
        {"nist": mean information of a predicted n-gram in bits, summed over n = 1..5}: from 0 up,
        not a percentage; about 8 for good systems on E2E.

    Raises:
        UserError: No examples, or not as many targets as predictions.
    """
    tokenize = tokenizer_13a()
    examples = [
        ([tokenize(reference) for reference in references], tokenize(prediction))
        for references, prediction in pairs("nist", targets, predictions)
    ]
    occurrences: Counter[Ngram] = Counter()
    for references, _ in examples:
        for reference in references:
            occurrences.update(ngrams(reference, _ORDER))
            occurrences[()] += len(reference)

    def information(ngram: Ngram) -> float:
        return math.log2(occurrences[ngram[:-1]] / occurrences[ngram])

    # [order]: information of the matching n-grams, and number of predicted n-grams.
    matched, predicted = np.zeros(_ORDER), np.zeros(_ORDER)
    length = reference_length = 0.0
    for references, prediction in examples:
        allowed: Counter[Ngram] = Counter()
        for reference in references:
            allowed |= ngrams(reference, _ORDER)
        counts = ngrams(prediction, _ORDER)
        for ngram, count in counts.items():
            predicted[len(ngram) - 1] += count
        for ngram, count in (counts & allowed).items():
            matched[len(ngram) - 1] += count * information(ngram)
        length += len(prediction)
        reference_length += float(np.mean([len(reference) for reference in references]))
    if not length or not reference_length:
        return {"nist": 0.0}
    penalty = math.exp(_BETA * math.log(min(1.0, length / reference_length)) ** 2)
    return {"nist": penalty * float((matched / np.maximum(predicted, 1)).sum())}
