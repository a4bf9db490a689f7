"""Mistakes that a user can fix, each reported in one sentence."""

import difflib
from collections.abc import Iterable

# Ctrl-C: the exit status, 128 + SIGINT, and the sentence.
INTERRUPTED = 130
INTERRUPTION = "Interrupted; the same command goes on from what has been saved."


class UserError(ValueError):
    """A mistake that a user can fix; its message is one sentence that names the place.

    Command lines print the message alone, without a traceback, and exit with status 2.
    """


class Diverged(UserError):
    """A model has come to NaN or infinity, as after training at too high a rate."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns `" Did you mean 'x'?"` for the choice closest to `name`, or `""` if none is close."""
    matches = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""
