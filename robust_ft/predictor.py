"""From text to text: a model, its parameters and a vocabulary behind one object."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_ft.decoding import Decoded, Decoder
from robust_ft.models.model import Model
from robust_ft.partitioning import Partitioner
from robust_ft.trainable import flatten, split
from robust_ft.types import Batch, Params
from robust_ft.vocabulary import Vocabulary, encode_inputs


class Predictor:
    """Decodes batches and texts with one set of parameters.

    Attributes:
        model: The architecture with its PEFT methods.
        params: All of its parameters.
        vocabulary: Turns text into tokens and back.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        vocabulary: Vocabulary,
        partitioner: Partitioner | None = None,
    ):
        self.model = model
        self.params = params
        self.vocabulary = vocabulary
        self._partitioner = partitioner or Partitioner()

    def without(self, *names: str) -> "Predictor":
        """Returns a predictor with these PEFT methods, and their parameters, removed."""
        if not names:
            return self
        gone = frozenset(
            path
            for path in flatten(self.params)
            if any(p.owns(path) for p in self.model.peft if p.name in names)
        )
        _, params = split(self.params, gone)
        return Predictor(self.model.without(*names), params, self.vocabulary, self._partitioner)

    def generate(
        self, batch: dict[str, np.ndarray], decoder: Decoder, rng: jax.Array | None = None
    ) -> Decoded:
        """Decodes one batch.

        Args:
            batch: NumPy arrays under t5x's names; `encoder_input_tokens` [batch, source].
            decoder: Greedy, beam search or sampling, with its settings.
            rng: A key, for sampling only.

        Returns:
            tokens [batch, num_return, length], best first, and scores [batch, num_return].
        """
        inputs = {k: v for k, v in batch.items() if k.startswith("encoder_")}
        with self._partitioner.activate():
            placed = self._partitioner.put_batch(inputs)
            return _generate(self.model, decoder, self.params, placed, rng)

    def predict(
        self,
        texts: Sequence[str],
        decoder: Decoder,
        inputs_length: int = 512,
        batch_size: int = 32,
        rng: jax.Array | None = None,
    ) -> list[str]:
        """Returns the best output for each text.

        Args:
            texts: Inputs, cut at `inputs_length` tokens with the end-of-sequence token.
            decoder: Greedy, beam search or sampling, with its settings.
            inputs_length: Number of tokens to which inputs are padded.
            batch_size: Texts decoded at once.
            rng: A key, for sampling only.
        """
        outputs: list[str] = []
        for start, rows in _padded_batches(texts, self.vocabulary, inputs_length, batch_size):
            batch_rng = None if rng is None else jax.random.fold_in(rng, start)
            decoded = self.generate({"encoder_input_tokens": rows}, decoder, batch_rng)
            best = np.asarray(decoded.tokens)[:, 0]
            count = min(batch_size, len(texts) - start)
            outputs += [self.vocabulary.decode(tokens.tolist()) for tokens in best[:count]]
        return outputs


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(
    model: Model, decoder: Decoder, params: Params, batch: Batch, rng: jax.Array | None
) -> Decoded:
    def step_fn(cache: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        return model.step(params, cache, tokens)

    cache = model.prefill(params, batch, decoder.max_decode_len)
    rows = batch["encoder_input_tokens"].shape[0]
    start = jnp.full((rows,), model.start_id, jnp.int32)
    return decoder(step_fn, cache, start, model.eos_id, model.pad_id, rng)


def _padded_batches(
    texts: Sequence[str], vocabulary: Vocabulary, length: int, batch_size: int
) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(texts), batch_size):
        rows = np.full((batch_size, length), vocabulary.pad_id, np.int32)
        for row, text in zip(rows, texts[start : start + batch_size], strict=False):
            tokens = encode_inputs(vocabulary, text, length)
            row[: len(tokens)] = tokens
        yield start, rows
