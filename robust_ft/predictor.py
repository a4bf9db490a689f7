"""Predictors: a model, its parameters and a vocabulary that decode and score texts."""

import abc
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, Int32

from robust_ft import multihost, ranking, text_batches
from robust_ft.decoding import Decoded, Decoder, NotANumber
from robust_ft.errors import UserError, nearest
from robust_ft.models.model import LanguageModel, Model
from robust_ft.partitioning import Partitioner
from robust_ft.ranking import Ranked, compiled_log_likelihoods
from robust_ft.text_batches import check_texts, filled
from robust_ft.trainable import flatten, merge, split
from robust_ft.types import Batch, Params
from robust_ft.vocabulary import Vocabulary, encode_inputs

DECODE_LENGTH = 64


class BasePredictor(abc.ABC):
    """Decodes and scores batches and texts with one model, or with an `Ensemble` of several.

    Attributes:
        model: The model.
        params: All of its parameters.
        vocabulary: Encodes and decodes texts.
        partitioner: Places batches on the mesh.
    """

    model: LanguageModel
    params: Any
    vocabulary: Vocabulary
    partitioner: Partitioner

    @abc.abstractmethod
    def without(self, *names: str) -> "BasePredictor":
        """Returns the predictor without these PEFT methods and their parameters."""

    def generate(
        self,
        batch: dict[str, np.ndarray],
        decoder: Decoder | None = None,
        rng: jax.Array | None = None,
        **settings: Any,
    ) -> Decoded:
        """Decodes one batch. Each process decodes its shard, and all get all outputs.

        Args:
            batch: NumPy arrays under t5x's feature names: `encoder_input_tokens` [batch, source],
                whole inputs; `encoder_input_mask` [batch, source], False or 0 at padding, unless
                all are tokens; and `task_index` [batch] if tasks have prompts of their own
                (`Model.task_index`).
            decoder: Settings of greedy decoding, beam search or sampling; by default greedy, up to
                64 tokens.
            rng: A key, for sampling only.
            **settings: Fields of `Decoder` that override those of `decoder`, such as beam_size=4.

        Returns:
            tokens [batch, num_return, length], best first, and scores [batch, num_return].

        Raises:
            UserError: A setting is unknown or out of range, the mask is missing, the model has no
                positions for inputs and outputs of this length, or its probabilities are NaN.
        """
        decoder = _decoder(decoder, settings)
        batch = text_batches.whole_inputs(batch, self.model.pad_id, self.model.eos_id)
        self.model.check_inputs(batch["encoder_input_mask"], decoder.max_decode_len)
        with self.partitioner.activate():
            sharded = self.partitioner.share_batch(batch)
            decoded: Decoded = multihost.whole(
                decode(self.model, decoder, self.params, sharded, rng)
            )
        broken = np.isnan(np.asarray(decoded.scores)).any(axis=1)  # [batch]
        if broken.any():
            row = int(np.argmax(broken))
            raise NotANumber(row, f"row {row} of the batch")
        return decoded

    def predict(
        self,
        texts: Sequence[str],
        decoder: Decoder | None = None,
        inputs_length: int | None = None,
        batch_size: int = 32,
        rng: jax.Array | None = None,
        task: str | Sequence[str] | None = None,
        **settings: Any,
    ) -> list[str]:
        """Returns the best output for each text.

        Args:
            texts: Inputs, without special tokens.
            decoder: As in `generate`.
            inputs_length: Number of tokens, the end-of-sequence token included, to which inputs are
                truncated and padded. By default none is truncated, and texts are padded to the
                length of their bucket.
            batch_size: The most texts to decode at once.
            rng: A key, for sampling only.
            task: The task whose prompt to use, if tasks have prompts of their own (`Model.tasks`):
                one for all texts, or one for each.
            **settings: As in `generate`.

        Raises:
            UserError: The model has no positions for inputs of this length, or an argument is
                wrong.
        """
        check_texts("texts", texts)
        batch_size = self._divisible(batch_size)
        decoder = _decoder(decoder, settings)
        tasks = self._task_indices(task, len(texts))
        encoded = [encode_inputs(self.vocabulary, text, inputs_length) for text in texts]
        outputs = [""] * len(texts)
        for i, indices in enumerate(self._batches([len(ids) for ids in encoded], batch_size)):
            batch_rng = None if rng is None else jax.random.fold_in(rng, i)
            rows = filled(indices, batch_size, self.partitioner.batch_shards)
            batch = text_batches.input_batch(
                [encoded[n] for n in rows], inputs_length, self.vocabulary.pad_id
            )
            batch |= _task_rows(tasks, rows)
            try:
                decoded = self.generate(batch, decoder, batch_rng)
            except NotANumber as error:
                row = rows[error.row]
                raise NotANumber(row, _input(row, texts[row], task)) from None
            best = np.asarray(decoded.tokens)[:, 0]  # [batch, length]
            # Not strict: rows behind the last index are padding.
            for index, tokens in zip(indices, best, strict=False):
                outputs[index] = self.text(tokens)
        return outputs

    def text(self, tokens: Int[np.ndarray, " length"]) -> str:
        """Returns the text of generated tokens, up to the first that ends decoding."""
        ends = np.isin(tokens, self.model.eos_ids)  # [length]
        length = int(np.argmax(ends)) if ends.any() else len(tokens)
        return self.vocabulary.decode(tokens[:length].tolist())

    def score(
        self,
        inputs: Sequence[str],
        targets: Sequence[str],
        per_token: bool = False,
        inputs_length: int | None = None,
        targets_length: int = 512,
        batch_size: int = 32,
        task: str | Sequence[str] | None = None,
    ) -> Float[np.ndarray, "texts"]:
        """Returns log p(target | input) for each pair, in nats, as float32.

        The sum is over the tokens that the model is trained on: the end-of-sequence token counts,
        and so does what the vocabulary puts before targets (BART's `<s>`).

        Args:
            inputs: Inputs, without special tokens.
            targets: One target for each input.
            per_token: Divide each sum by its number of tokens.
            inputs_length: As in `predict`.
            targets_length: The most tokens of a target. A longer one is an error, since truncated
                it would have another target's score.
            batch_size: The most pairs to score at once.
            task: As in `predict`.

        Raises:
            UserError: There is not one target for each input, a target is too long, or the model
                has no positions for texts of this length.
        """
        check_texts("targets", targets)
        ranked = self.rank(
            inputs,
            [[target] for target in targets],
            per_token,
            inputs_length,
            targets_length,
            batch_size,
            task,
        )
        return ranked.scores[:, 0]

    def rank(
        self,
        inputs: Sequence[str],
        choices: Sequence[Sequence[str]],
        per_token: bool = False,
        inputs_length: int | None = None,
        targets_length: int = 512,
        batch_size: int = 32,
        task: str | Sequence[str] | None = None,
    ) -> Ranked:
        """Ranks each input's answer choices by log p(choice | input), see `score`.

        Each input is encoded once for all its choices. Inputs may differ in their numbers of
        choices.

        Args:
            inputs: Inputs, without special tokens.
            choices: The answer choices of each input, at least one.
            per_token: Divide log-likelihoods by the choices' numbers of tokens.
            inputs_length: As in `predict`.
            targets_length: The most tokens of a choice, as in `score`.
            batch_size: The most choices to score at once, unless a single input has more.
            task: As in `predict`.

        Raises:
            UserError: There is not one list of choices for each input, an input has no choice, a
                choice is too long, or the model has no positions for texts of this length.
        """
        check_texts("inputs", inputs)
        self._divisible(batch_size)
        if len(inputs) != len(choices):
            raise UserError(
                f"Each input needs targets of its own, not {len(inputs)} inputs and "
                f"{len(choices)} targets."
            )
        encode = functools.partial(ranking.encoded_choices, self.vocabulary)
        return self.rank_tokens(
            [encode_inputs(self.vocabulary, text, inputs_length) for text in inputs],
            [encode(i, texts, targets_length) for i, texts in enumerate(choices)],
            per_token,
            inputs_length,
            batch_size,
            task,
        )

    def rank_tokens(
        self,
        input_ids: Sequence[Sequence[int]],
        choice_ids: Sequence[Sequence[Sequence[int]]],
        per_token: bool = False,
        inputs_length: int | None = None,
        batch_size: int = 32,
        task: str | Sequence[str] | None = None,
    ) -> Ranked:
        """Ranks choices as `rank` does, by the tokens of inputs and choices as they are given."""
        tasks = self._task_indices(task, len(input_ids))
        counts = [len(of_input) for of_input in choice_ids]
        scores = np.full((len(counts), max(counts, default=1)), -np.inf, np.float32)
        shards = self.partitioner.batch_shards
        for indices, batch_rows in ranking.groups(input_ids, choice_ids, batch_size, shards):
            self.model.check_lengths(
                max(len(input_ids[n]) for n in indices),
                max(len(ids) for n in indices for ids in choice_ids[n]),
            )
            batch = text_batches.ranking_batch(
                [input_ids[n] for n in batch_rows],
                [choice_ids[n] for n in batch_rows],
                inputs_length,
                self.vocabulary.pad_id,
            )
            batch |= _task_rows(tasks, batch_rows)
            with self.partitioner.activate():
                sharded = self.partitioner.share_batch(batch)
                log_likelihoods = np.asarray(
                    multihost.whole(compiled_log_likelihoods(self.model, self.params, sharded))
                )  # [batch, choices]
            for index, row in zip(indices, log_likelihoods, strict=False):
                scores[index, : counts[index]] = row[: counts[index]]
                # False also for NaN. A choice may be impossible, but not all of them.
                if not np.max(row[: counts[index]]) > -np.inf:
                    text = self.vocabulary.decode(list(input_ids[index]))
                    raise NotANumber(index, _input(index, text, task))
        if per_token:
            scores = ranking.per_token(scores, choice_ids)
        return Ranked(np.argmax(scores, axis=1), scores)

    def _task_indices(
        self, task: str | Sequence[str] | None, count: int
    ) -> Int32[np.ndarray, "texts"] | None:
        """Returns each text's index in `Model.tasks`, None if tasks have no prompts."""
        known = self.model.tasks
        if not known:
            if task is not None:
                raise UserError("No task has a prompt of its own in this model; leave out task.")
            return None
        if task is None:
            raise UserError(f"Say whose prompt to take, task=...: one of {', '.join(known)}.")
        names = [task] * count if isinstance(task, str) else task
        if len(names) != count:
            raise UserError(f"task needs one name, or one for each of {count} texts.")
        return np.array([self.model.task_index(name) for name in names], np.int32)

    def _divisible(self, batch_size: int) -> int:
        """Returns the largest batch size up to this one that divides over the devices."""
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1.")
        devices = self.partitioner.batch_shards
        return max(batch_size // devices, 1) * devices

    def _batches(self, lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
        """Yields the indices of texts of similar length, the longest first."""
        order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]


class Predictor(BasePredictor):
    """Decodes and scores with one set of parameters.

    Attributes:
        model: The model with its PEFT methods as exported: reparameterizations are computed once,
            not at every token.
    """

    model: Model

    def __init__(
        self,
        model: Model,
        params: Params,
        vocabulary: Vocabulary,
        partitioner: Partitioner | None = None,
    ):
        self.partitioner = partitioner or Partitioner()
        if model.peft:
            peft, base = split(params, frozenset(filter(model.peft_owns, flatten(params))))
            with self.partitioner.activate():
                params = merge(_export(model, peft), base)
            model = model.exported()
        self.model = model
        self.params = params
        self.vocabulary = vocabulary

    def without(self, *names: str) -> "Predictor":
        if not names:
            return self
        removed = [method for method in self.model.peft if method.name in names]
        paths = {path for path in flatten(self.params) if any(m.owns(path) for m in removed)}
        _, params = split(self.params, frozenset(paths))
        return Predictor(self.model.without(*names), params, self.vocabulary, self.partitioner)


@functools.partial(jax.jit, static_argnums=0)
def _export(model: Model, peft: Params) -> Params:
    # Jitted, since arrays may be sharded over processes. Only PEFT parameters: a jitted function
    # copies what it returns.
    return model.export(peft)


@functools.partial(jax.jit, static_argnums=(0, 1))
def decode(
    model: LanguageModel, decoder: Decoder, params: Any, batch: Batch, rng: jax.Array | None
) -> Decoded:
    """Decodes a batch of inputs on the devices; `Predictor.generate` calls it."""

    def step_fn(cache: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        return model.step(params, cache, tokens)

    start, cache = model.prefill(params, batch, decoder.max_decode_len)
    history = model.history(batch)
    return decoder(step_fn, cache, start, model.eos_ids, model.pad_id, rng, history)


def _task_rows(
    tasks: Int32[np.ndarray, "texts"] | None, rows: Sequence[int]
) -> dict[str, np.ndarray]:
    """Returns the "task_index" of a batch of texts."""
    return {} if tasks is None else {"task_index": tasks[list(rows)]}


def _decoder(decoder: Decoder | None, settings: Mapping[str, Any]) -> Decoder:
    known = [field.name for field in dataclasses.fields(Decoder)]
    for name in settings:
        if name not in known:
            raise UserError(f"Decoder has no setting '{name}'." + nearest(name, known))
    return dataclasses.replace(decoder or Decoder(max_decode_len=DECODE_LENGTH), **settings)


def _input(index: int, text: str, task: str | Sequence[str] | None) -> str:
    """Returns which input of a call is meant, in words."""
    prompt = task if isinstance(task, str) or task is None else task[index]
    under = f" under the prompt of '{prompt}'" if prompt else ""
    return f"input {index}, '{text[:40]}'{under}"
