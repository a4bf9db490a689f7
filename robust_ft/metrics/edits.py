"""chrF (Popović 2015) and TER (Snover et al. 2006) of whole corpora, as sacrebleu computes them."""

from collections.abc import Sequence

from robust_ft.metrics.pairs import References, pairs, streams


def chrf(targets: References, predictions: Sequence[str]) -> dict[str, float]:
    """F2 over the n-grams of up to 6 characters, white space apart.

    Args:
        targets: The reference of each example, or several, of which the best one counts.
        predictions: The predicted texts.

    Returns:
        {"chrf": 0..100}.

    Raises:
        UserError: No examples, or not as many targets as predictions.
    """
    from sacrebleu.metrics.chrf import CHRF

    examples = pairs("chrf", targets, predictions)
    result = CHRF().corpus_score(list(predictions), streams(examples))
    return {"chrf": min(result.score, 100.0)}  # a perfect one may be rounded up


def ter(targets: References, predictions: Sequence[str]) -> dict[str, float]:
    """Edits that make a prediction a reference, in percent of the reference's words.

    Less is better: this metric cannot select a checkpoint. Words stand between white space and
    are lower-cased; an edit inserts, deletes or replaces a word or moves several.

    Args:
        targets: The reference of each example, or several, of which the closest one counts; edits
            are a share of their mean length.
        predictions: The predicted texts.

    Returns:
        {"ter": 0 or more; above 100 where predictions are longer than references}.

    Raises:
        UserError: No examples, or not as many targets as predictions.
    """
    return {"ter": ter_parts(targets, predictions)["ter"]}


def ter_parts(targets: References, predictions: Sequence[str]) -> dict[str, float]:
    """Returns the score of `ter`, and its "edits" and "reference_length" in words."""
    from sacrebleu.metrics.ter import TER

    examples = pairs("ter", targets, predictions)
    result = TER().corpus_score(list(predictions), streams(examples))
    return {
        "ter": float(result.score),
        "edits": float(result.num_edits),
        "reference_length": float(result.ref_length),
    }
