"""CIDEr (Vedantam et al. 2015): cosine similarity of TF-IDF weighted n-gram counts."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from robust_ft.metrics.pairs import References, pairs
from robust_ft.metrics.tokens import Ngram, ngrams, tokenizer_13a

_ORDER = 4
_SIGMA = 6.0  # words; how far lengths may differ
# What coco-caption drops from its tokens.
_PUNCTUATION = {"'", "''", "`", "``", ".", "?", "!", ",", ":", "-", "--", "...", ";"} | set(
    '"()[]{}'
)


def cider(targets: References, predictions: Sequence[str]) -> dict[str, float]:
    """CIDEr-D of a whole corpus, as coco-caption and the E2E challenge compute it.

    Words are told apart by mteval-v13a's rules, lower-cased and without punctuation; the
    Stanford tokenizer of coco-caption also takes "isn't" apart, so that scores may differ a bit.

    Args:
        targets: The reference of each example, or several, over which the mean is taken.
        predictions: The predicted texts, not tokenized.

    Returns:
        {"cider": 0..10}, on the scale of the papers' tables; a single example has no rare n-grams
        and scores 0.

    Raises:
        UserError: No examples, or not as many targets as predictions.
    """
    tokenize = tokenizer_13a()

    def counts(text: str) -> Counter[Ngram]:
        return ngrams([word for word in tokenize(text) if word not in _PUNCTUATION], _ORDER)

    examples = [
        ([counts(reference) for reference in references], counts(prediction))
        for references, prediction in pairs("cider", targets, predictions)
    ]
    seen_in = Counter(ngram for references, _ in examples for ngram in set().union(*references))
    # Inverse document frequency; the references of an example are one document.
    idf = {ngram: math.log(len(examples) / number) for ngram, number in seen_in.items()}
    unseen = math.log(len(examples))
    scores = []
    for references, prediction in examples:
        vector = _Vector(prediction, idf, unseen)
        scores.append(np.mean([vector.similarity(_Vector(r, idf, unseen)) for r in references]))
    return {"cider": 10 * float(np.mean(scores))}


class _Vector:
    """A text as TF-IDF weights of its n-grams, with a norm for each n."""

    def __init__(self, counts: Counter[Ngram], idf: Mapping[Ngram, float], unseen: float):
        self.weights = {n: count * idf.get(n, unseen) for n, count in counts.items()}
        squares = np.zeros(_ORDER)
        for ngram, weight in self.weights.items():
            squares[len(ngram) - 1] += weight**2
        self.norms = np.sqrt(squares)
        self.length = sum(count for ngram, count in counts.items() if len(ngram) == 1)

    def similarity(self, reference: "_Vector") -> float:
        """Returns the mean over n of the cosine with clipped weights, with a penalty for length."""
        products = np.zeros(_ORDER)  # [n]
        for ngram, weight in self.weights.items():
            other = reference.weights.get(ngram, 0.0)
            products[len(ngram) - 1] += min(weight, other) * other
        norms = self.norms * reference.norms
        cosines = np.divide(products, norms, out=np.zeros(_ORDER), where=norms > 0)
        difference = self.length - reference.length
        return float(cosines.mean()) * math.exp(-(difference**2) / (2 * _SIGMA**2))
