"""The decoder: settings of greedy decoding, sampling and beam search in one object."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from robust_ft.decoding.beam_search import beam_search, check_beam_settings
from robust_ft.decoding.greedy import greedy, sample
from robust_ft.decoding.process import banned, chained, forced, min_length, no_repeat_ngrams
from robust_ft.decoding.types import Cache, Decoded, EosIds, ProcessFn, StepFn
from robust_ft.errors import UserError
from robust_ft.ranges import Count, NonNegative, Range, Real, Whole, check_ranges
from robust_ft.types import AnyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    """Decoding settings: greedy by default, beam search, or sampling.

    Hashable, so that it can be a static argument of `jax.jit`.

    Attributes:
        max_decode_len: The most tokens to generate, the end-of-sequence token included.
        min_decode_len: The fewest tokens to generate before the end-of-sequence token.
        beam_size: Live beams; beam search if above 1.
        alpha: Exponent of beam search's length penalty; 0 for none.
        length_penalty: 't5x', ((5 + n) / 6)^alpha, or 'hf', n^alpha and Hugging Face's search; see
            `beam_search`.
        early_stopping: When Hugging Face's search stops: True, False or "never"; see `beam_search`.
        temperature: Sampling if above 0.
        top_k: Sample among the k most likely tokens; 0 for all.
        top_p: Sample among the most likely tokens that hold this share of the probability.
        num_return: Sequences to return for each example.
        banned_tokens: Ids of tokens that are never generated.
        no_repeat_ngram_size: The n of n-grams that the decoder neither repeats nor copies from what
            it has read; 0 for no limit.
        forced_first_token: Id of the token that every sequence starts with, such as BART's `<s>`.
        forced_last_token: Id of the token at max_decode_len, such as BART's `</s>`, if a sequence
            gets there.

    Raises:
        UserError: A setting is out of range, or two contradict each other.
    """

    max_decode_len: Count
    min_decode_len: Whole = 0
    beam_size: Count = 1
    alpha: Real = 0.6
    length_penalty: str = "t5x"
    early_stopping: bool | str = False
    temperature: NonNegative = 0.0
    top_k: Whole = 0
    top_p: Annotated[float, Range(above=0, most=1)] = 1.0
    num_return: Count = 1
    banned_tokens: Sequence[Whole] = ()
    no_repeat_ngram_size: Whole = 0
    forced_first_token: Whole | None = None
    forced_last_token: Whole | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "banned_tokens", tuple(self.banned_tokens))
        check_ranges(self)
        if self.min_decode_len >= self.max_decode_len:
            raise UserError(
                f"Decoder.min_decode_len={self.min_decode_len} must be below "
                f"Decoder.max_decode_len={self.max_decode_len}."
            )
        for name in ("forced_first_token", "forced_last_token"):
            if getattr(self, name) in self.banned_tokens:
                raise UserError(
                    f"Decoder.{name}={getattr(self, name)} is one of the banned_tokens."
                )
        if self.temperature == 0:
            if self.top_k or self.top_p != 1:
                raise UserError("Decoder.top_k and top_p need a temperature above 0.")
            check_beam_settings(
                self.beam_size, self.length_penalty, self.num_return, self.early_stopping
            )
            return
        if self.beam_size != 1:
            raise UserError(
                f"Decoder.temperature={self.temperature}: sampling works with "
                f"Decoder.beam_size=1, not {self.beam_size}."
            )

    def __call__(
        self,
        step_fn: StepFn,
        cache: Cache,
        start_tokens: Int[AnyArray, "batch"],
        eos_id: EosIds,
        pad_id: int,
        rng: jax.Array | None = None,
        history: Int[Array, "batch before"] | None = None,
    ) -> Decoded:
        """Decodes one batch; see `greedy`, `sample` and `beam_search`.

        Args:
            step_fn: The model's decode step.
            cache: The KV cache before the first step, every leaf [batch, ...].
            start_tokens: The first input of each sequence.
            eos_id: The end-of-sequence token, or several.
            pad_id: Fills the output after it.
            rng: A key, for sampling only.
            history: The tokens that the decoder reads before the first generated one, -1 for
                padding at the left; by default the start tokens.

        Returns:
            tokens [batch, num_return, max_decode_len] and scores [batch, num_return].

        Raises:
            UserError: There is no key for sampling, or a token that the vocabulary does not have.
        """
        history = jnp.asarray(start_tokens)[:, None] if history is None else history
        process = chained(self._processors(eos_id, history))
        shared = (step_fn, cache, start_tokens, self.max_decode_len, eos_id)
        if self.temperature > 0:
            if rng is None:
                raise UserError("Decoder: sampling (temperature above 0) needs a random key.")
            return sample(
                *shared,
                rng,
                self.temperature,
                self.top_k,
                self.top_p,
                num_return=self.num_return,
                pad_id=pad_id,
                process=process,
            )
        if self.beam_size == 1:
            return greedy(*shared, pad_id, process=process)
        return beam_search(
            *shared,
            self.beam_size,
            self.alpha,
            self.length_penalty,
            self.num_return,
            self.early_stopping,
            pad_id=pad_id,
            process=process,
        )

    def _processors(self, eos_id: EosIds, history: Int[Array, "batch before"]) -> list[ProcessFn]:
        """Returns the logits processors; forced tokens come last, so that they win."""
        processors: list[ProcessFn] = []
        if self.banned_tokens:
            processors.append(banned(self.banned_tokens))
        if self.no_repeat_ngram_size:
            processors.append(no_repeat_ngrams(self.no_repeat_ngram_size, history))
        if self.min_decode_len:
            processors.append(min_length(self.min_decode_len, eos_id))
        if self.forced_first_token is not None:
            processors.append(forced(self.forced_first_token, 0))
        if self.forced_last_token is not None:
            processors.append(forced(self.forced_last_token, self.max_decode_len - 1))
        return processors
