"""Greedy decoding and sampling."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
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
from robust_ft.errors import UserError
from robust_ft.types import AnyArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SearchState:
    """The state of the decoding loop between two steps.

    Attributes:
        step: Number of tokens generated so far, 0 to length.
        done: Whether a sequence has its end-of-sequence token.
        last: Input of the next step: the start token, then the token generated last.
        tokens: Generated tokens, padding beyond `step` and after the end-of-sequence token.
        scores: Sums of the log-probabilities of the generated tokens.
        broken: Whether the model's log-probabilities were NaN at a step.
        cache: The KV cache, every leaf [batch, ...].
    """

    step: Int[Array, ""]
    done: Bool[Array, "batch"]
    last: Int[Array, "batch"]
    tokens: Int[Array, "batch length"]
    scores: Float[Array, "batch"]
    broken: Bool[Array, "batch"]
    cache: Cache


def greedy(
    step_fn: StepFn,
    cache: Cache,
    start_tokens: Int[AnyArray, "batch"],
    max_decode_len: int,
    eos_id: EosIds,
    pad_id: int = 0,
    *,
    process: ProcessFn | None = None,
) -> Decoded:
    """Takes the most likely token at each step until every sequence has ended.

    Args:
        step_fn: The model's decode step.
        cache: The KV cache before the first step, every leaf [batch, ...].
        start_tokens: The first input of each sequence; not part of the output.
        max_decode_len: The most tokens to generate, the end-of-sequence token included.
        eos_id: The end-of-sequence token, or several.
        pad_id: Fills the output after `eos_id`.
        process: A logits processor.

    Returns:
        tokens [batch, 1, max_decode_len] and scores [batch, 1], the sums of log-probabilities.
    """

    def choose(log_probs: Float[Array, "batch vocab"], _: Int[Array, ""]) -> Int[Array, "batch"]:
        # As argmax, ties to the first token; argmax takes several times as long on CPUs.
        best = jnp.max(log_probs, axis=-1, keepdims=True)
        vocab = log_probs.shape[-1]
        token_ids = jnp.arange(vocab)[None]
        return jnp.min(jnp.where(log_probs == best, token_ids, vocab - 1), axis=-1)

    state = _run(step_fn, cache, start_tokens, max_decode_len, eos_id, pad_id, process, choose)
    return Decoded(state.tokens[:, None], state.scores[:, None])


def sample(
    step_fn: StepFn,
    cache: Cache,
    start_tokens: Int[AnyArray, "batch"],
    max_decode_len: int,
    eos_id: EosIds,
    rng: jax.Array,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    *,
    num_return: int = 1,
    pad_id: int = 0,
    process: ProcessFn | None = None,
) -> Decoded:
    """Draws each token from the model's distribution, changed by temperature, top-k and top-p.

    Args:
        step_fn: The model's decode step.
        cache: The KV cache before the first step, every leaf [batch, ...].
        start_tokens: The first input of each sequence; not part of the output.
        max_decode_len: The most tokens to generate, the end-of-sequence token included.
        eos_id: The end-of-sequence token, or several.
        rng: A key.
        temperature: Divides the log-probabilities; above 0 (greedy decoding is `greedy`).
        top_k: Only the k most likely tokens are drawn; 0 for all.
        top_p: Of these, only the fewest most likely tokens whose probabilities reach top_p
            (nucleus sampling, Holtzman et al., 2020); 1 for all.
        num_return: Independent samples for each example.
        pad_id: Fills the output after `eos_id`.
        process: A logits processor.

    Returns:
        tokens [batch, num_return, max_decode_len] and scores [batch, num_return], the sums of the
        model's log-probabilities before temperature, top-k and top-p, the best first.

    Raises:
        UserError: temperature, top_k, top_p or num_return is out of range.
    """
    check_sampling(temperature, top_k, top_p)
    if num_return < 1:
        raise UserError(f"Decoder.num_return must be at least 1, not {num_return}.")

    def choose(log_probs: Float[Array, "batch vocab"], step: Int[Array, ""]) -> Int[Array, "batch"]:
        logits = reshape_distribution(log_probs, temperature, top_k, top_p)
        return jax.random.categorical(jax.random.fold_in(rng, step), logits)

    batch = start_tokens.shape[0]
    cache, start_tokens = repeat_rows((cache, start_tokens), num_return)
    state = _run(step_fn, cache, start_tokens, max_decode_len, eos_id, pad_id, process, choose)
    scores, order = jax.lax.top_k(state.scores.reshape(batch, num_return), num_return)
    tokens = state.tokens.reshape(batch, num_return, max_decode_len)
    return Decoded(jnp.take_along_axis(tokens, order[..., None], axis=1), scores)


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raises a UserError for sampling settings out of range."""
    if temperature <= 0:
        raise UserError(f"Decoder.temperature must be above 0, not {temperature}.")
    if top_k < 0:
        raise UserError(f"Decoder.top_k must be 0 (all tokens) or more, not {top_k}.")
    if not 0 < top_p <= 1:
        raise UserError(f"Decoder.top_p must be above 0 and at most 1, not {top_p}.")


def reshape_distribution(
    log_probs: Float[Array, "batch vocab"], temperature: float, top_k: int, top_p: float
) -> Float[Array, "batch vocab"]:
    """Returns unnormalized log-probabilities, -inf for the tokens that must not be drawn.

    Temperature is applied first, then top-k, then top-p. Tokens as likely as the last one kept are
    kept too.
    """
    logits = log_probs / temperature
    if 0 < top_k < logits.shape[-1]:
        last_kept = jax.lax.top_k(logits, top_k)[0][:, -1:]  # [batch, 1]
        logits = jnp.where(logits < last_kept, -jnp.inf, logits)
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)  # [batch, vocab]
        probs = jax.nn.softmax(ordered, axis=-1)
        # A token is kept if the more likely ones do not reach top_p; so the first always is.
        kept = jnp.cumsum(probs, axis=-1) - probs < top_p
        last_kept = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < last_kept, -jnp.inf, logits)
    return logits


def _run(
    step_fn: StepFn,
    cache: Cache,
    start_tokens: Int[AnyArray, "batch"],
    max_decode_len: int,
    eos_id: EosIds,
    pad_id: int,
    process: ProcessFn | None,
    choose: Callable[[Float[Array, "batch vocab"], Int[Array, ""]], Int[Array, "batch"]],
) -> SearchState:
    """Runs the decoding loop, in which `choose` picks the next token of each sequence."""

    def unfinished(state: SearchState) -> Bool[Array, ""]:
        return (state.step < max_decode_len) & ~jnp.all(state.done)

    def extend(state: SearchState) -> SearchState:
        log_probs, cache = step_fn(state.cache, state.last)
        log_probs = log_probs.astype(jnp.float32)
        broken = state.broken | (is_nan(log_probs) & ~state.done)
        if process is not None:
            log_probs = process(log_probs, state.tokens, state.step)
        chosen = choose(log_probs, state.step).astype(jnp.int32)
        log_prob = jnp.take_along_axis(log_probs, chosen[:, None], axis=-1)[:, 0]  # [batch]
        chosen = jnp.where(state.done, pad_id, chosen)
        return SearchState(
            step=state.step + 1,
            done=state.done | ends(chosen, eos_id),
            last=chosen,
            tokens=state.tokens.at[:, state.step].set(chosen),
            scores=state.scores + jnp.where(state.done, 0.0, log_prob),
            broken=broken,
            cache=cache,
        )

    batch = start_tokens.shape[0]
    state: SearchState = jax.lax.while_loop(
        unfinished,
        extend,
        SearchState(
            step=jnp.array(0, jnp.int32),
            done=jnp.zeros([batch], bool),
            last=jnp.asarray(start_tokens, jnp.int32),
            tokens=jnp.full([batch, max_decode_len], pad_id, jnp.int32),
            scores=jnp.zeros([batch], jnp.float32),
            broken=jnp.zeros([batch], bool),
            cache=cache,
        ),
    )
    scores = jnp.where(state.broken, jnp.nan, state.scores)
    return dataclasses.replace(state, scores=scores)
