"""From a model's output to the text that is scored (ProMoT, section A.2.2).

Each function takes (output, example=None, is_target=False), as seqio calls it, and can be called
with the output alone. seqio also passes every target, with is_target=True.
"""

import re
from typing import Any

_FIRST_SENTINEL, _SECOND_SENTINEL = "<extra_id_0>", "<extra_id_1>"
# As words of their own: not the end of "FAQ:", nor the start of "Translated". Word-level
# vocabularies put a space before the colon.
_TASK_PREFIX = re.compile(r"\b(?:Q\s*:|Translate\b|Article\s*:)")


def identity(output: str, example: Any = None, is_target: bool = False) -> str:
    """Returns the output as it is."""
    del example, is_target
    return output


def promot(output: str, example: Any = None, is_target: bool = False) -> str:
    """Extracts the answer as ProMoT does for every task.

    The paper: "we first extract the text after `<extra_id_0>` and before `<extra_id_1>`, then trim
    the text by locating and remove the text after the second prefix token (Q:, Translate,
    Article:)".
    Read here as:

    - Pretrained T5 models answer in the format of span corruption. Without `<extra_id_0>` the text
      starts at the output's start (a finetuned model writes no sentinels), without `<extra_id_1>`
      after it, it goes to the output's end.
    - The first prefix is the one in the input, so the second is the first one in the output, where
      a model that has answered goes on to make up another exemplar. The prefix goes as well.
    - A target has nothing to trim: it may contain such a word by right.

    Args:
        output: The decoded text.
        example: Unused.
        is_target: Whether `output` is a target and not a model's output.

    Returns:
        The answer, without space at its ends; may be empty.
    """
    del example
    text = output.partition(_FIRST_SENTINEL)[2] if _FIRST_SENTINEL in output else output
    text = text.partition(_SECOND_SENTINEL)[0]
    if not is_target:
        text = _TASK_PREFIX.split(text, maxsplit=1)[0]
    return text.strip()


def first_word(output: str, example: Any = None, is_target: bool = False) -> str:
    """Reads a one-word label: the first word of what `promot` extracts.

    The paper: for classification "we check whether the first output token is True or False". The
    first token of "True." or "A) red" is "True" or "A", so a word ends where its letters and
    digits do. Text that starts with something else gives what stands before the first space.

    Args:
        output: The decoded text.
        example: Unused.
        is_target: Whether `output` is a target; labels must then be of one word.

    Returns:
        The word, or "" if there is none.
    """
    text = promot(output, example, is_target)
    word = re.match(r"\w+", text)
    return word.group() if word else text.partition(" ")[0]
