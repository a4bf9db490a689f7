"""Beam search: several hypotheses at a time, ranked by length-normalised log-probability."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from robust_ft.decoding.types import Cache, Decoded, ProcessFn, StepFn, repeat_rows
from robust_ft.errors import UserError, nearest

LENGTH_PENALTIES: Mapping[str, Callable[[Any, float], Array]] = {
    "t5x": lambda length, alpha: ((5.0 + length) / 6.0) ** alpha,
    "hf": lambda length, alpha: (1.0 * length) ** alpha,
}
"""What a sum of log-probabilities is divided by; length counts the end-of-sequence token."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SearchState:
    """Where the search stands between two steps. Beams and finished sequences: best first."""

    step: Int[Array, ""]
    """Number of tokens generated so far, 0 to length."""
    live_log_probs: Float[Array, "batch beam"]
    """Sum of log-probabilities of each live beam; -inf for a beam that holds nothing."""
    live_tokens: Int[Array, "batch beam length"]
    """Tokens of each live beam, padding beyond `step`."""
    finished_scores: Float[Array, "batch num_return"]
    """Penalised scores of the best sequences that have ended; -inf where there is none yet."""
    finished_tokens: Int[Array, "batch num_return length"]
    """Their tokens, padding after the end-of-sequence token."""
    last: Int[Array, " batch*beam"]
    """Input of the next step: the last token of each live beam."""
    cache: Cache
    """The model's cache, every leaf [batch * beam, ...], the beams of an example together."""


def beam_search(
    step_fn: StepFn,
    cache: Cache,
    start_tokens: Int[Array, " batch"],
    max_decode_len: int,
    eos_id: int,
    beam_size: int = 4,
    alpha: float = 0.6,
    length_penalty: str = "t5x",
    num_return: int = 1,
    *,
    pad_id: int = 0,
    process: ProcessFn | None = None,
) -> Decoded:
    """Searches for the sequences with the highest penalised log-probability.

    At each step the 2 * beam_size best extensions of the live beams are looked at: those that end
    compete for the num_return finished places, the beam_size best others live on. An example is
    done when no live beam can still beat its worst finished place; the search stops when all are.
    (Only num_return finished sequences are kept, for no other could be returned.) One beam is
    greedy decoding.

    Args:
      step_fn: the model; see `StepFn`. It is called with batch * beam_size rows.
      cache: the model's cache before the first step, every leaf [batch, ...].
      start_tokens: the first input of each sequence; not part of the output.
      max_decode_len: most tokens to generate, the end-of-sequence token included.
      eos_id: the end-of-sequence token.
      beam_size: live beams of an example.
      alpha: exponent of the length penalty; 0 for none, negative favours short sequences.
      length_penalty: 't5x', ((5 + n) / 6)^alpha, or 'hf', n^alpha (Hugging Face's).
      num_return: sequences to return of each example.
      pad_id: fills the output after `eos_id`.
      process: changes the log-probabilities before the beams are extended.

    Returns:
      tokens [batch, num_return, max_decode_len] and scores [batch, num_return]: sums of
      log-probabilities divided by the penalty. Ended sequences come first, the best first; places
      left over go to the best beams that were still live at the maximum length.

    Raises:
      UserError: an unknown length penalty, or a size out of its range.
    """
    check_beam_settings(beam_size, length_penalty, num_return)
    batch = start_tokens.shape[0]

    def penalty(length):
        return LENGTH_PENALTIES[length_penalty](length, alpha)

    def may_improve(state: SearchState):
        return (state.step < max_decode_len) & ~jnp.all(_is_done(state, max_decode_len, penalty))

    def extend(state: SearchState) -> SearchState:
        log_probs, cache = step_fn(state.cache, state.last)
        log_probs = log_probs.astype(jnp.float32)
        if process is not None:
            tokens = state.live_tokens.reshape(batch * beam_size, max_decode_len)
            log_probs = process(log_probs, tokens, state.step)
        log_probs = log_probs.reshape(batch, beam_size, -1) + state.live_log_probs[..., None]

        log_probs, tokens, parents = _best_extensions(state, log_probs)
        ended = tokens[:, :, state.step] == eos_id
        finished_scores, (finished_tokens,) = _keep_best(
            num_return,
            jnp.concatenate(
                [
                    state.finished_scores,
                    jnp.where(ended, log_probs / penalty(state.step + 1), -jnp.inf),
                ],
                axis=1,
            ),
            jnp.concatenate([state.finished_tokens, tokens], axis=1),
        )
        live_log_probs, (live_tokens, parents) = _keep_best(
            beam_size, jnp.where(ended, -jnp.inf, log_probs), tokens, parents
        )
        return SearchState(
            step=state.step + 1,
            live_log_probs=live_log_probs,
            live_tokens=live_tokens,
            finished_scores=finished_scores,
            finished_tokens=finished_tokens,
            last=live_tokens[:, :, state.step].reshape(batch * beam_size),
            cache=_reorder(cache, state.cache, parents),
        )

    state = _first_state(cache, start_tokens, max_decode_len, beam_size, num_return, pad_id)
    state = jax.lax.while_loop(may_improve, extend, state)
    return _fill_with_live(state, num_return, penalty(max_decode_len), pad_id)


def check_beam_settings(beam_size: int, length_penalty: str, num_return: int) -> None:
    """Raises UserError for beam search settings that make no sense."""
    if length_penalty not in LENGTH_PENALTIES:
        raise UserError(
            f"beam search: there is no length penalty '{length_penalty}', only "
            f"{' and '.join(LENGTH_PENALTIES)}.{nearest(length_penalty, LENGTH_PENALTIES)}"
        )
    if beam_size < 1:
        raise UserError(f"beam search: beam_size must be at least 1, not {beam_size}.")
    if not 1 <= num_return <= beam_size:
        raise UserError(
            f"beam search: num_return must be from 1 to beam_size ({beam_size}), not {num_return}."
        )


def _first_state(
    cache: Cache,
    start_tokens: Int[Array, " batch"],
    max_decode_len: int,
    beam_size: int,
    num_return: int,
    pad_id: int,
) -> SearchState:
    """Every beam starts out the same, so all but the first hold nothing."""
    batch = start_tokens.shape[0]
    return SearchState(
        step=jnp.array(0, jnp.int32),
        live_log_probs=jnp.full([batch, beam_size], -jnp.inf).at[:, 0].set(0.0),
        live_tokens=jnp.full([batch, beam_size, max_decode_len], pad_id, jnp.int32),
        finished_scores=jnp.full([batch, num_return], -jnp.inf),
        finished_tokens=jnp.full([batch, num_return, max_decode_len], pad_id, jnp.int32),
        last=jnp.repeat(start_tokens.astype(jnp.int32), beam_size),
        cache=repeat_rows(cache, beam_size),
    )


def _is_done(
    state: SearchState, max_decode_len: int, penalty: Callable[[Any], Any]
) -> Array:  # Bool[Array, " batch"]
    """Whether no continuation of a live beam can beat the worst finished place.

    A continuation's log-probability is at most the beam's, which is at most 0, so its score is at
    most the beam's divided by the largest penalty ahead. The penalty is monotone in the length,
    rising for alpha > 0 and falling for alpha < 0: the largest is at one of the two ends.
    """
    largest = jnp.maximum(penalty(state.step + 1), penalty(max_decode_len))
    return state.live_log_probs[:, 0] / largest <= state.finished_scores[:, -1]


def _best_extensions(
    state: SearchState, log_probs: Float[Array, "batch beam vocab"]
) -> tuple[Float[Array, "batch k"], Int[Array, "batch k length"], Int[Array, "batch k"]]:
    """The 2 * beam best extensions (fewer if there are not so many): sums, tokens, parent beams.

    Twice as many as beams, so that enough live on even if every beam's best extension ends it. A
    single beam looks at its best extension only, and so is greedy decoding for every alpha.
    The best are taken of each beam first, which keeps a sharded vocabulary in its place and spares
    sorting beam * vocab values at once.
    """
    beam_size, vocab = log_probs.shape[1:]
    wanted = 2 * beam_size if beam_size > 1 else 1
    of_each = min(wanted, vocab)
    values, choices = jax.lax.top_k(log_probs, of_each)
    values, index = jax.lax.top_k(
        values.reshape(-1, beam_size * of_each), min(wanted, beam_size * of_each)
    )
    parents = index // of_each
    chosen = jnp.take_along_axis(choices.reshape(-1, beam_size * of_each), index, axis=1)
    tokens = _take(state.live_tokens, parents).at[:, :, state.step].set(chosen)
    return values, tokens, parents


def _keep_best(
    count: int, scores: Float[Array, "batch k"], *arrays: Array
) -> tuple[Float[Array, "batch count"], list[Array]]:
    """The `count` highest scores and the matching rows of `arrays`, each [batch, k, ...]."""
    scores, index = jax.lax.top_k(scores, count)
    return scores, [_take(array, index) for array in arrays]


def _take(array: Array, index: Int[Array, "batch k"]) -> Array:
    """Gathers along axis 1 within each example: [batch, n, ...] -> [batch, k, ...]."""
    return jax.vmap(lambda rows, rows_index: rows[rows_index])(array, index)


def _reorder(cache: Cache, before: Cache, parents: Int[Array, "batch beam"]) -> Cache:
    """Gives each beam its parent's rows: one gather for each leaf.

    A leaf that the step returned untouched is the same for all beams of an example, as it was at
    the start; it needs no gather. That spares the largest leaves, the encoder's keys and values.
    """

    def gather(after, before):
        if after is before:
            return after
        rows = after.reshape(*parents.shape, *after.shape[1:])
        return _take(rows, parents).reshape(after.shape)

    return jax.tree.map(gather, cache, before)


def _fill_with_live(state: SearchState, num_return: int, penalty: Any, pad_id: int) -> Decoded:
    """Puts the best live beams into the finished places that stayed empty.

    A place can only be empty after max_decode_len steps, or when nothing lives any more.
    """
    empty = jnp.isneginf(state.finished_scores)
    # Finished places are filled from the front: the first empty one gets the first live beam.
    nth = jnp.cumsum(empty, axis=1) - 1
    scores = jnp.where(
        empty,
        jnp.take_along_axis(state.live_log_probs, jnp.maximum(nth, 0), axis=1) / penalty,
        state.finished_scores,
    )
    live = _take(state.live_tokens, jnp.maximum(nth, 0))
    tokens = jnp.where(empty[..., None], live, state.finished_tokens)
    return Decoded(jnp.where(jnp.isneginf(scores)[..., None], pad_id, tokens), scores)
