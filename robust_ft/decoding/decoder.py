"""How to decode, as one object that a configuration can build."""

import dataclasses

import jax
from jaxtyping import Array, Int

from robust_ft.decoding.beam_search import beam_search, check_beam_settings
from robust_ft.decoding.greedy import check_sampling, greedy, sample
from robust_ft.decoding.types import Cache, Decoded, StepFn, min_length
from robust_ft.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    """Decoding settings: greedy by default, beam search, or sampling.

    Hashable, so it can be a static argument of `jax.jit`.

    Raises:
      UserError: settings out of range, or that contradict each other.
    """

    max_decode_len: int
    """Most tokens to generate, the end-of-sequence token included."""
    min_decode_len: int = 0
    """Fewest tokens to generate before the end-of-sequence token."""
    beam_size: int = 1
    """Live beams; beam search if above 1."""
    alpha: float = 0.6
    """Exponent of beam search's length penalty; 0 for none."""
    length_penalty: str = "t5x"
    """'t5x', ((5 + n) / 6)^alpha, or 'hf', n^alpha."""
    temperature: float = 0.0
    """Sampling if above 0."""
    top_k: int = 0
    """Sample among the k most likely tokens; 0 for all."""
    top_p: float = 1.0
    """Sample among the most likely tokens that hold this share of the probability."""
    num_return: int = 1
    """Sequences of each example."""

    def __post_init__(self):
        """Checks the settings where they are made, not in the middle of a run."""
        if self.max_decode_len < 1:
            raise UserError(
                f"decoding: max_decode_len must be at least 1, not {self.max_decode_len}."
            )
        if not 0 <= self.min_decode_len < self.max_decode_len:
            raise UserError(
                f"decoding: min_decode_len must be from 0 to below max_decode_len "
                f"({self.max_decode_len}), not {self.min_decode_len}."
            )
        if self.temperature == 0:
            if self.top_k or self.top_p != 1:
                raise UserError("decoding: top_k and top_p need a temperature above 0.")
            check_beam_settings(self.beam_size, self.length_penalty, self.num_return)
            return
        check_sampling(self.temperature, self.top_k, self.top_p)
        if self.beam_size != 1:
            raise UserError(
                f"decoding: sampling (temperature {self.temperature}) works with beam_size 1, "
                f"not {self.beam_size}."
            )
        if self.num_return < 1:
            raise UserError(f"decoding: num_return must be at least 1, not {self.num_return}.")

    def __call__(
        self,
        step_fn: StepFn,
        cache: Cache,
        start_tokens: Int[Array, " batch"],
        eos_id: int,
        pad_id: int,
        rng: jax.Array | None = None,
    ) -> Decoded:
        """Decodes one batch; see `greedy`, `sample` and `beam_search`.

        Returns:
          tokens [batch, num_return, max_decode_len] and scores [batch, num_return].

        Raises:
          UserError: sampling without an rng.
        """
        process = min_length(self.min_decode_len, eos_id) if self.min_decode_len else None
        first = (step_fn, cache, start_tokens, self.max_decode_len, eos_id)
        if self.temperature > 0:
            if rng is None:
                raise UserError("decoding: sampling (temperature above 0) needs a random key.")
            return sample(
                *first,
                rng,
                self.temperature,
                self.top_k,
                self.top_p,
                num_return=self.num_return,
                pad_id=pad_id,
                process=process,
            )
        if self.beam_size == 1:
            return greedy(*first, pad_id, process=process)
        return beam_search(
            *first,
            self.beam_size,
            self.alpha,
            self.length_penalty,
            self.num_return,
            pad_id=pad_id,
            process=process,
        )
