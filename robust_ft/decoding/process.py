"""Logits processors: they change the log-probabilities before the next token is chosen.

Each function here returns a `ProcessFn`; `chained` composes several. Positions count generated
tokens from 0, without the start token.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from robust_ft.decoding.types import EosIds, ProcessFn, repeat_rows
from robust_ft.errors import UserError

LogProbs = Float[Array, "batch vocab"]
Tokens = Int[Array, "batch length"]
Number = Int[Array, ""]


def chained(processors: Sequence[ProcessFn]) -> ProcessFn | None:
    """Returns a processor that applies these in order; None if there are none."""
    if not processors:
        return None

    def process(log_probs: LogProbs, tokens: Tokens, generated: Number) -> LogProbs:
        for processor in processors:
            log_probs = processor(log_probs, tokens, generated)
        return log_probs

    return process


def min_length(tokens: int, eos_id: EosIds) -> ProcessFn:
    """Returns a processor that bans `eos_id` until `tokens` other tokens were generated."""

    def process(log_probs: LogProbs, _: Tokens, generated: Number) -> LogProbs:
        return log_probs.at[:, jnp.atleast_1d(jnp.asarray(eos_id))].add(
            jnp.where(generated < tokens, -jnp.inf, 0.0)
        )

    return process


def banned(tokens: Sequence[int]) -> ProcessFn:
    """Returns a processor that bans these tokens.

    Raises:
        UserError: When it is used: a token is not in the vocabulary.
    """

    def process(log_probs: LogProbs, _: Tokens, __: Number) -> LogProbs:
        _check("banned_tokens", tokens, log_probs)
        return log_probs.at[:, jnp.array(tokens)].set(-jnp.inf)

    return process


def forced(token: int, position: int) -> ProcessFn:
    """Returns a processor that gives `token` probability 1 at a position.

    Raises:
        UserError: When it is used: the token is not in the vocabulary.
    """

    def process(log_probs: LogProbs, _: Tokens, generated: Number) -> LogProbs:
        _check("a forced token", [token], log_probs)
        only = jnp.full_like(log_probs, -jnp.inf).at[:, token].set(0.0)
        return jnp.where(generated == position, only, log_probs)

    return process


def no_repeat_ngrams(size: int, history: Int[Array, "batch before"]) -> ProcessFn:
    """Returns a processor that bans tokens that would repeat an n-gram.

    Args:
        size: The n of n-grams; 1 bans all repetition.
        history: The tokens read before the first generated one, whose n-grams count too; -1 for
            padding, at the left only.
    """

    def process(log_probs: LogProbs, tokens: Tokens, generated: Number) -> LogProbs:
        prefix = repeat_rows(history, tokens.shape[0] // history.shape[0])  # for every beam
        sequence = jnp.concatenate([prefix, tokens], axis=1)  # [batch, before + length]
        if sequence.shape[1] < size:
            return log_probs
        count = history.shape[1] + generated
        rows = jnp.arange(sequence.shape[0])[:, None]  # [batch, 1]
        # The last token of the n-gram at each position: [batch, ngrams]
        last = sequence[:, size - 1 :]
        # N-grams that lie within what was generated; none do while there are fewer than n tokens.
        is_inside = jnp.arange(last.shape[1]) + size - 1 < count  # [ngrams]
        repeats = is_inside[None] & (last >= 0)
        # An n-gram would be repeated if its first n - 1 tokens are the newest n - 1.
        newest = lax.dynamic_slice_in_dim(sequence, count - size + 1, size - 1, axis=1)
        for i in range(size - 1):
            repeats &= sequence[:, i : i + last.shape[1]] == newest[:, i : i + 1]
        # `min` and not `set`: one token may end several n-grams, of which one repeats.
        return log_probs.at[rows, last].min(jnp.where(repeats, -jnp.inf, jnp.inf))

    return process


def _check(name: str, tokens: Sequence[int], log_probs: LogProbs) -> None:
    vocab = log_probs.shape[-1]
    for token in tokens:
        if not 0 <= token < vocab:
            raise UserError(f"decoding: {name} has {token}, which is no token of {vocab}.")
