"""METEOR (Lavie and Agarwal 2007) with words, stems and WordNet's synonyms, by NLTK."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from robust_ft.errors import UserError
from robust_ft.metrics.pairs import References, pairs
from robust_ft.metrics.tokens import tokenizer_13a


def meteor(targets: References, predictions: Sequence[str]) -> dict[str, float]:
    """Mean METEOR of the examples, in English.

    It is what NLTK computes, not METEOR 1.5, whose Java program knows paraphrases, has other
    weights and searches for the alignment with the fewest chunks: compare only scores of this one.

    Args:
        targets: The reference of each example, or several, of which the best one counts.
        predictions: The predicted texts, not tokenized.

    Returns:
        {"meteor": 0..100}.

    Raises:
        UserError: No examples, not as many targets as predictions, or WordNet is not there.
    """
    from nltk.translate.meteor_score import meteor_score

    examples = pairs("meteor", targets, predictions)
    wordnet, tokenize = _wordnet(), tokenizer_13a()
    scores = [
        meteor_score(list(map(tokenize, references)), tokenize(prediction), wordnet=wordnet)
        for references, prediction in examples
    ]
    return {"meteor": 100 * float(np.mean(scores))}


def _wordnet() -> Any:
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except LookupError:
        raise UserError(
            "meteor needs WordNet, which is not among NLTK's data: download it with 'python -m "
            "nltk.downloader wordnet', or set NLTK_DATA to a folder that holds corpora/wordnet."
        ) from None
    return wordnet
