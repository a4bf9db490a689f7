"""Answers to questions: exact match and F1 over words, with SQuAD's or TriviaQA's normalization.

Of several answers the one that fits best counts. Natural Questions and WebQuestions are scored as
SQuAD is (Rajpurkar et al. 2016); TriviaQA's own script (Joshi et al. 2017) reads "_" as a space and
makes punctuation spaces, where SQuAD's drops it: "twenty-one" is "twenty one" in the former and
"twentyone" in the latter.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from robust_ft.metrics.pairs import References, pairs

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_SQUAD_PUNCTUATION = str.maketrans("", "", string.punctuation)
_TRIVIA_QA_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`", " "))


def exact_match(targets: References, predictions: Sequence[str]) -> dict[str, float]:
    """Percentage of predictions that equal an answer once both are normalized as SQuAD's are.

    Args:
        targets: The answer to each question, or several of which any may match.
        predictions: The predicted answers.

    Returns:
        {"exact_match": 0..100}.

    Raises:
        UserError: No examples, or not as many targets as predictions.
    """
    return _mean("exact_match", targets, predictions, squad_normalize, _equal)


def token_f1(targets: References, predictions: Sequence[str]) -> dict[str, float]:
    """Mean F1 between the words of prediction and answer, normalized as SQuAD's are.

    Args:
        targets: The answer to each question, or several of which the best one counts.
        predictions: The predicted answers.

    Returns:
        {"token_f1": 0..100}.

    Raises:
        UserError: No examples, or not as many targets as predictions.
    """
    return _mean("token_f1", targets, predictions, squad_normalize, _word_f1)


def trivia_qa_exact_match(targets: References, predictions: Sequence[str]) -> dict[str, float]:
    """`exact_match` with TriviaQA's normalization: {"trivia_qa_exact_match": 0..100}."""
    name = "trivia_qa_exact_match"
    return _mean(name, targets, predictions, trivia_qa_normalize, _equal)


def trivia_qa_f1(targets: References, predictions: Sequence[str]) -> dict[str, float]:
    """`token_f1` with TriviaQA's normalization: {"trivia_qa_f1": 0..100}."""
    return _mean("trivia_qa_f1", targets, predictions, trivia_qa_normalize, _word_f1)


def squad_normalize(text: str) -> str:
    """Lower-cases, drops ASCII punctuation, then articles, and makes white space single."""
    return _squeeze(text.lower().translate(_SQUAD_PUNCTUATION))


def trivia_qa_normalize(text: str) -> str:
    """Lower-cases, makes punctuation spaces, drops articles, and makes white space single."""
    return _squeeze(text.lower().translate(_TRIVIA_QA_PUNCTUATION))


def _squeeze(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text).split())


def _mean(
    name: str,
    targets: References,
    predictions: Sequence[str],
    normalize: Callable[[str], str],
    score: Callable[[str, str], float],
) -> dict[str, float]:
    best = [
        max(score(normalize(reference), normalize(prediction)) for reference in references)
        for references, prediction in pairs(name, targets, predictions)
    ]
    return {name: 100 * float(np.mean(best))}


def _equal(reference: str, prediction: str) -> float:
    return float(reference == prediction)


def _word_f1(reference: str, prediction: str) -> float:
    wanted, given = reference.split(), prediction.split()
    if not wanted or not given:  # as SQuAD 2.0 defines it for texts without words
        return float(wanted == given)
    return 2 * (Counter(wanted) & Counter(given)).total() / (len(wanted) + len(given))
