"""Beam search: several hypotheses at a time, ranked by length-normalized log-probability."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from robust_ft.decoding.types import (
    Cache,
    Decoded,
    EosIds,
    ProcessFn,
    StepFn,
    ends,
    is_nan,
    repeat_rows,
)
from robust_ft.errors import UserError, nearest
from robust_ft.types import AnyArray

Scalar = Float[Array, ""] | float

# From a length and alpha to what a sum of log-probabilities is divided by. The length counts the
# end-of-sequence token.
LENGTH_PENALTIES: Mapping[str, Callable[[Scalar, Scalar], Scalar]] = {
    "t5x": lambda length, alpha: ((5.0 + length) / 6.0) ** alpha,
    "hf": lambda length, alpha: length**alpha,
}

# From a length to the penalty.
Penalty = Callable[[Scalar], Scalar]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SearchState:
    """The state of the search between two steps; live and finished hypotheses are best first.

    Attributes:
        step: Number of tokens generated so far, 0 to length.
        done: Whether an example's finished hypotheses are final.
        live_log_probs: Sum of log-probabilities of each live beam; -inf for an empty beam.
        live_tokens: Tokens of each live beam, padding beyond `step`.
        finished_scores: Length-penalized scores of the best hypotheses that have ended; -inf in an
            empty slot.
        finished_tokens: Their tokens, padding after the end-of-sequence token.
        broken: Whether the model's log-probabilities of a live beam were NaN at a step.
        last: Input of the next step: the last token of each live beam.
        cache: The KV cache, every leaf [batch * beam, ...], the beams of an example together.
    """

    step: Int[Array, ""]
    done: Bool[Array, "batch"]
    live_log_probs: Float[Array, "batch beam"]
    live_tokens: Int[Array, "batch beam length"]
    finished_scores: Float[Array, "batch slots"]
    finished_tokens: Int[Array, "batch slots length"]
    broken: Bool[Array, "batch"]
    last: Int[Array, "batch*beam"]
    cache: Cache


def beam_search(
    step_fn: StepFn,
    cache: Cache,
    start_tokens: Int[AnyArray, "batch"],
    max_decode_len: int,
    eos_id: EosIds,
    beam_size: int = 4,
    alpha: Scalar = 0.6,
    length_penalty: str = "t5x",
    num_return: int = 1,
    early_stopping: bool | str = False,
    *,
    pad_id: int = 0,
    process: ProcessFn | None = None,
) -> Decoded:
    """Searches for the sequences with the highest length-penalized log-probability.

    At each step the 2 * beam_size best extensions of the live beams are considered (with n > 1
    end-of-sequence tokens, the (n + 1) * beam_size best): those that end compete for the finished
    slots, and the beam_size best others stay live. An example is done when
    no live beam can beat its worst finished hypothesis; the search stops when all examples are
    done. With one beam it is greedy decoding.

    There are two variants. In t5x's, hypotheses that ended come before those that did not within
    `max_decode_len`, and the search never stops too early; there are num_return finished slots,
    since nothing else is returned. In Hugging Face's, an extension may end only if it is among the
    beam_size best; at the maximum length all beams end and compete by score; there are beam_size
    finished slots, and `early_stopping` says when they are final.

    Args:
        step_fn: The model's decode step; it gets batch * beam_size rows.
        cache: The KV cache before the first step, every leaf [batch, ...].
        start_tokens: The first input of each sequence; not part of the output.
        max_decode_len: The most tokens to generate, the end-of-sequence token included.
        eos_id: The end-of-sequence token, or several.
        beam_size: Live beams of each example.
        alpha: Exponent of the length penalty; 0 for none, negative favours short sequences.
        length_penalty: 't5x', ((5 + n) / 6)^alpha and t5x's search, or 'hf', n^alpha and Hugging
            Face's.
        num_return: Sequences to return for each example.
        early_stopping: In Hugging Face's search, True stops an example as soon as its finished
            slots are full; False when no live beam, penalized at its present length, beats the
            worst of them; "never" only when none can beat it at any length.
        pad_id: Fills the output after `eos_id`.
        process: A logits processor.

    Returns:
        tokens [batch, num_return, max_decode_len] and scores [batch, num_return]: sums of
        log-probabilities divided by the penalty, the best first (in t5x's search, the best of those
        that ended).

    Raises:
        UserError: The length penalty is unknown, or a setting is out of range.
    """
    check_beam_settings(beam_size, length_penalty, num_return, early_stopping)
    batch, like_hf = start_tokens.shape[0], length_penalty == "hf"
    slots, stopping = (beam_size, early_stopping) if like_hf else (num_return, "never")

    def penalty(length: Scalar) -> Scalar:
        return LENGTH_PENALTIES[length_penalty](length, alpha)

    def unfinished(state: SearchState) -> Bool[Array, ""]:
        return (state.step < max_decode_len) & ~jnp.all(state.done)

    def extend(state: SearchState) -> SearchState:
        log_probs, cache = step_fn(state.cache, state.last)
        log_probs = log_probs.astype(jnp.float32)
        broken = _broken(state, is_nan(log_probs))
        if process is not None:
            tokens = state.live_tokens.reshape(batch * beam_size, max_decode_len)
            log_probs = process(log_probs, tokens, state.step)
        log_probs = log_probs.reshape(batch, beam_size, -1)  # [batch, beam, vocab]
        log_probs += state.live_log_probs[..., None]

        length = (state.step + 1).astype(jnp.float32)

        # [batch, k], [batch, k, length], [batch, k]
        log_probs, tokens, parents = _best_extensions(state, log_probs, 1 + np.size(eos_id))
        ended = ends(tokens[:, :, state.step], eos_id)
        scores = jnp.where(ended, log_probs, -jnp.inf)
        if like_hf:
            ended |= state.step + 1 == max_decode_len
            may_end = ended & (jnp.arange(ended.shape[1]) < beam_size)[None]
            scores = jnp.where(may_end & ~state.done[:, None], log_probs, -jnp.inf)
        finished_scores, (finished_tokens,) = _keep_best(
            slots,
            jnp.concatenate([state.finished_scores, scores / penalty(length)], axis=1),
            jnp.concatenate([state.finished_tokens, tokens], axis=1),
        )
        live_log_probs, (live_tokens, parents) = _keep_best(
            beam_size, jnp.where(ended, -jnp.inf, log_probs), tokens, parents
        )
        best_live, worst_finished = live_log_probs[:, 0], finished_scores[:, -1]
        done = _is_done(best_live, worst_finished, length, max_decode_len, penalty, stopping)
        return SearchState(
            step=state.step + 1,
            done=state.done | done,
            live_log_probs=live_log_probs,
            live_tokens=live_tokens,
            finished_scores=finished_scores,
            finished_tokens=finished_tokens,
            broken=broken,
            last=live_tokens[:, :, state.step].reshape(batch * beam_size),
            cache=_reorder(cache, state.cache, parents),
        )

    state = _first_state(cache, start_tokens, max_decode_len, beam_size, slots, pad_id)
    state = jax.lax.while_loop(unfinished, extend, state)
    tokens, scores = state.finished_tokens, state.finished_scores  # [batch, slots, ...]
    if not like_hf:
        tokens, scores = _fill_with_live(state, penalty(max_decode_len), pad_id)
    scores = jnp.where(state.broken[:, None], jnp.nan, scores)
    return Decoded(tokens[:, :num_return], scores[:, :num_return])


def check_beam_settings(
    beam_size: int, length_penalty: str, num_return: int, early_stopping: bool | str
) -> None:
    """Raises a UserError for settings of beam search that are out of range."""
    if length_penalty not in LENGTH_PENALTIES:
        raise UserError(
            f"Decoder.length_penalty='{length_penalty}' is not one of "
            f"{', '.join(LENGTH_PENALTIES)}.{nearest(length_penalty, LENGTH_PENALTIES)}"
        )
    if beam_size < 1:
        raise UserError(f"Decoder.beam_size must be at least 1, not {beam_size}.")
    if not 1 <= num_return <= beam_size:
        raise UserError(
            f"Decoder.num_return must be from 1 to beam_size ({beam_size}), not {num_return}."
        )
    if not isinstance(early_stopping, bool) and early_stopping != "never":
        raise UserError(
            f"Decoder.early_stopping must be True, False or 'never', not {early_stopping!r}."
        )
    if early_stopping is not False and length_penalty != "hf":
        raise UserError(
            f"Decoder.early_stopping={early_stopping!r} is for length_penalty='hf'; t5x's "
            "search goes on while a better sequence can be found."
        )


def _first_state(
    cache: Cache,
    start_tokens: Int[AnyArray, "batch"],
    max_decode_len: int,
    beam_size: int,
    slots: int,
    pad_id: int,
) -> SearchState:
    batch = start_tokens.shape[0]
    return SearchState(
        step=jnp.array(0, jnp.int32),
        done=jnp.zeros([batch], bool),
        # All beams start out the same, so all but the first are empty.
        live_log_probs=jnp.full([batch, beam_size], -jnp.inf).at[:, 0].set(0.0),
        live_tokens=jnp.full([batch, beam_size, max_decode_len], pad_id, jnp.int32),
        finished_scores=jnp.full([batch, slots], -jnp.inf),
        finished_tokens=jnp.full([batch, slots, max_decode_len], pad_id, jnp.int32),
        broken=jnp.zeros([batch], bool),
        last=jnp.repeat(jnp.asarray(start_tokens, jnp.int32), beam_size),
        cache=repeat_rows(cache, beam_size),
    )


def _broken(state: SearchState, is_nan: Bool[Array, "rows"]) -> Bool[Array, "batch"]:
    """Returns `state.broken` after a step at which these beams' log-probabilities are NaN."""
    is_live = ~jnp.isneginf(state.live_log_probs) & ~state.done[:, None]  # [batch, beam]
    return state.broken | jnp.any(is_live & is_nan.reshape(is_live.shape), axis=1)


def _is_done(
    best_live: Float[Array, "batch"],
    worst_finished: Float[Array, "batch"],
    length: Float[Array, ""],
    max_decode_len: int,
    penalty: Penalty,
    stopping: bool | str,
) -> Bool[Array, "batch"]:
    """Returns whether no continuation of a live beam can get into a finished slot.

    A continuation's log-probability is at most the beam's, which is at most 0, so its score is at
    most the beam's divided by the largest penalty ahead. The penalty is monotone in the length,
    rising for alpha > 0 and falling for alpha < 0, so the largest is at one of the two ends.
    Hugging Face's search, where it may stop too early, takes the present length's instead.
    """
    if stopping == "never":
        largest: Scalar = jnp.maximum(penalty(length + 1), penalty(max_decode_len))
    else:
        largest = penalty(length)
    done = best_live / largest <= worst_finished
    return done | (worst_finished > -jnp.inf) if stopping is True else done


def _best_extensions(
    state: SearchState, log_probs: Float[Array, "batch beam vocab"], per_live: int
) -> tuple[Float[Array, "batch k"], Int[Array, "batch k length"], Int[Array, "batch k"]]:
    """Returns the k best extensions: sums of log-probabilities, tokens, parent beams.

    They are `per_live` times as many as beams, one more than there are end-of-sequence tokens: so
    enough stay live even if every beam's best extensions end it. A single beam considers its best
    extension only, and so is greedy decoding for every alpha.
    """
    beam_size, vocab = log_probs.shape[1:]
    k = per_live * beam_size if beam_size > 1 else 1
    per_beam = min(k, vocab)
    # The best of each beam first: that does not gather a sharded vocabulary, and spares sorting
    # beam * vocab values at once.
    values, token_ids = jax.lax.top_k(log_probs, per_beam)  # [batch, beam, per_beam]
    values = values.reshape(-1, beam_size * per_beam)
    values, index = jax.lax.top_k(values, min(k, beam_size * per_beam))  # [batch, k]
    parents = index // per_beam
    chosen = jnp.take_along_axis(token_ids.reshape(-1, beam_size * per_beam), index, axis=1)
    tokens = _take(state.live_tokens, parents).at[:, :, state.step].set(chosen)
    return values, tokens, parents


def _keep_best(
    count: int, scores: Float[Array, "batch k"], *arrays: Array
) -> tuple[Float[Array, "batch count"], list[Array]]:
    """Returns the `count` highest scores and the matching rows of arrays [batch, k, ...]."""
    scores, index = jax.lax.top_k(scores, count)
    return scores, [_take(array, index) for array in arrays]


def _take(array: Array, index: Int[Array, "batch k"]) -> Array:
    """Gathers along axis 1 within each example: [batch, n, ...] -> [batch, k, ...]."""
    taken: Array = jax.vmap(lambda rows, rows_index: rows[rows_index])(array, index)
    return taken


def _reorder(cache: Cache, before: Cache, parents: Int[Array, "batch beam"]) -> Cache:
    """Gives each beam its parent's KV cache, with one gather for each leaf."""

    def gather(after: Array, before: Array) -> Array:
        # A leaf that the step returned as it came is the same for all beams of an example. Not
        # gathering it spares the largest leaves, the encoder's keys and values.
        if after is before:
            return after
        rows = after.reshape(*parents.shape, *after.shape[1:])  # [batch, beam, ...]
        return _take(rows, parents).reshape(after.shape)

    return jax.tree.map(gather, cache, before)


def _fill_with_live(
    state: SearchState, penalty: Scalar, pad_id: int
) -> tuple[Int[Array, "batch slots length"], Float[Array, "batch slots"]]:
    """Returns tokens and scores, the best live beams in the finished slots that stayed empty.

    A slot can only be empty after max_decode_len steps, or when no beam is live.
    """
    empty = jnp.isneginf(state.finished_scores)  # [batch, slots]
    # Slots are filled from the front: the first empty one gets the first live beam.
    beam = jnp.maximum(jnp.cumsum(empty, axis=1) - 1, 0)  # [batch, slots]
    live_scores = jnp.take_along_axis(state.live_log_probs, beam, axis=1) / penalty
    scores = jnp.where(empty, live_scores, state.finished_scores)
    live = _take(state.live_tokens, beam)
    tokens = jnp.where(empty[..., None], live, state.finished_tokens)
    return jnp.where(jnp.isneginf(scores)[..., None], pad_id, tokens), scores
