"""The inputs of ProMoT's tasks (ProMoT, appendix A.2.1, table 4), word for word.

The answers, which the table appends to the inputs, are the targets. The split `reported` of these
tasks is the one whose scores the paper reports: the development set for SuperGLUE, the test set for
all others.
"""

from collections.abc import Sequence


def entailment(premise: str, hypothesis: str) -> str:
    """RTE: answered with True or False."""
    return f"{premise} question: {hypothesis} Is it true or false? answer:"


def entailment_or_neither(premise: str, hypothesis: str) -> str:
    """CB and SNLI: answered with True, False or Neither."""
    return f"{premise} question: {hypothesis} Is it true or false or neither? answer:"


def wic(sentence1: str, sentence2: str, word: str) -> str:
    """WiC: answered with True or False."""
    return (
        f"{sentence1} {sentence2} question: The word {word} is used in the same way in the two "
        "sentences. Is it true or False? answer:"
    )


def multiple_choice(question: str, options: Sequence[str]) -> str:
    """OpenbookQA: answered with the letter of an option."""
    listed = " ".join(f"{chr(ord('A') + i)}) {option}" for i, option in enumerate(options))
    return f"Q: {question} {listed} A:"


def question(text: str) -> str:
    """Closed-book QA."""
    return f"Q: {text} A:"


def translation(source_language: str, target_language: str, sentence: str) -> str:
    """Translation; languages by their English names."""
    return f"Translate {source_language} to {target_language}: {sentence}"


def summary(article: str) -> str:
    """Summarization in one sentence."""
    return f"Article: {article} One sentence summary:"
