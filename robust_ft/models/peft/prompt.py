"""Soft prompts: trainable vectors beside the embedded input (prompt tuning).

Lester et al., 2021, sections 2 and 3.2; between input and output, Li and Liang, 2021, section 7.3.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from robust_ft.errors import UserError, nearest
from robust_ft.models.axes import with_axes
from robust_ft.models.peft import prompt_values
from robust_ft.models.peft.base import Peft
from robust_ft.ranges import Count, Real, Whole
from robust_ft.types import AnyArray, Batch, Params
from robust_ft.vocabulary import Vocabulary

# An initialization -> the setting that it alone reads, and needs.
INITIALIZATIONS = {
    "sampled_vocabulary": None,
    "random_uniform": None,
    "class_labels": "labels",
    "text": "text",
    "file": "file",
}
POSITIONS = ("before", "infix")


@dataclasses.dataclass(frozen=True)
class Prompt(Peft):
    """A soft prompt of the encoder, or of a decoder-only model's input: `encoder/prompt`.

    Attributes:
        length: Number of prompt vectors P.
        initialization: "sampled_vocabulary" copies the embeddings of tokens drawn without
            replacement; "random_uniform" draws from U[low, high); "class_labels" averages the
            embeddings of each label's tokens, and samples the rest of the prompt; "text" copies
            those of a text's tokens, cut or repeated to fill the prompt; "file" reads the prompt.
        vocabulary_top: Only the first so many token ids are drawn from; SentencePiece orders
            them by frequency, and 5,000 is the published choice.
        first_token: The first id to draw from, so that special tokens are left out.
        low: The papers use both [-0.5, 0.5) and [0, 0.5).
        high: See `low`.
        vocabulary: The model's, for "class_labels" and "text".
        labels: The answers of a classification task, or of several.
        text: For "text".
        file: A `.npy` file [P, embed], as the published code saves prompts; with tasks one for all
            of them, or one for each.
        position: "before" the input, or as an "infix" behind its last token, before the padding;
            a decoder-only model then needs a `Model.separator_id`.
        tasks: Names of tasks that get a prompt each, `encoder/prompt` [tasks, P, embed], none if
            all share one. A row's prompt is that of its "task_index" in the batch.
    """

    name: str = "prompt"
    length: Count = 100
    initialization: str = "sampled_vocabulary"
    vocabulary_top: Count = 5000
    first_token: Whole = 3
    low: Real = -0.5
    high: Real = 0.5
    vocabulary: Vocabulary | None = None
    labels: Sequence[str] = ()
    text: str = ""
    file: str | Sequence[str] = ""
    position: str = "before"
    tasks: Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("labels", "tasks"):
            if isinstance(value := getattr(self, field), str):
                raise UserError(f"Prompt.{field} must be a list; write ['{value}'].")
            object.__setattr__(self, field, tuple(value))
        if not isinstance(self.file, str):
            object.__setattr__(self, "file", tuple(self.file))
        for field, known in (("initialization", INITIALIZATIONS), ("position", POSITIONS)):
            if (value := getattr(self, field)) not in known:
                raise UserError(
                    f"Prompt.{field}='{value}' is not one of {tuple(known)}."
                    + nearest(value, known)
                )
        if self.first_token >= self.vocabulary_top:
            raise UserError(
                f"Prompt.first_token={self.first_token} must be below "
                f"Prompt.vocabulary_top={self.vocabulary_top}."
            )
        if not self.low < self.high:
            raise UserError(f"Prompt.low={self.low} must be below Prompt.high={self.high}.")
        if len(set(self.tasks)) < len(self.tasks):
            raise UserError(f"Prompt.tasks needs different names, not {list(self.tasks)}.")
        self._check_initialization()

    def _check_initialization(self) -> None:
        for initialization, field in INITIALIZATIONS.items():
            used = self.initialization == initialization
            if field and used != bool(getattr(self, field)):
                raise UserError(
                    f"Prompt.initialization='{initialization}' needs Prompt.{field}."
                    if used
                    else f"Prompt.{field} is for Prompt.initialization='{initialization}', not "
                    f"'{self.initialization}'."
                )
        if self.initialization in ("class_labels", "text") and self.vocabulary is None:
            raise UserError(
                f"Prompt.initialization='{self.initialization}' needs Prompt.vocabulary, the "
                "model's."
            )
        if len(self.labels) > self.length:
            raise UserError(
                f"Prompt.length={self.length} has no place for {len(self.labels)} labels."
            )
        if len(self._files) not in (1, len(self.tasks)):
            raise UserError(
                f"Prompt.file needs one file, or one for each of {len(self.tasks)} Prompt.tasks, "
                f"not {len(self._files)}."
            )

    @property
    def _files(self) -> tuple[str, ...]:
        return (self.file,) if isinstance(self.file, str) else tuple(self.file)

    def embed(
        self,
        scope: nn.Module,
        x: Float[Array, "batch length embed"],
        mask: Bool[Array, "batch length"],
        batch: Batch,
    ) -> tuple[Float[Array, "batch longer embed"], Bool[Array, "batch longer"]]:
        shape: tuple[int, ...] = (self.length, x.shape[-1])
        axes: tuple[str | None, ...] = ("prompt", "embed")
        if self.tasks:
            shape, axes = (len(self.tasks), *shape), (None, *axes)
        prompt = scope.param(self.name, with_axes(self._uniform, *axes), shape, jnp.float32)
        # [prompt, embed] for all rows, or with tasks each row's own [batch, prompt, embed]
        prompt = prompt[self._task_index(batch)] if self.tasks else prompt[None]
        prompt = jnp.broadcast_to(prompt.astype(x.dtype), (x.shape[0], *shape[-2:]))
        prompt_mask = jnp.ones(prompt.shape[:2], bool)
        with_it = jnp.concatenate([prompt, x], 1), jnp.concatenate([prompt_mask, mask], 1)
        if self.is_infix:
            with_it = _inserted(x, prompt, mask)
        if (without := batch.get("without_prompt")) is None:
            return with_it
        # In rows without it, the prompt is padding behind the input: positions stay what they are.
        bare = jnp.concatenate([x, prompt], 1), jnp.concatenate([mask, ~prompt_mask], 1)
        is_bare = jnp.asarray(without)[:, None]  # [batch, 1]
        return (
            jnp.where(is_bare[..., None], bare[0], with_it[0]),
            jnp.where(is_bare, bare[1], with_it[1]),
        )

    @property
    def is_infix(self) -> bool:
        return self.position == "infix"

    def input_slots(self) -> int:
        return self.length

    def _task_index(self, batch: Batch) -> Int[AnyArray, "batch"]:
        if "task_index" not in batch:
            raise UserError(
                f"The model has prompts for the tasks {', '.join(self.tasks)}, but the batch does "
                "not say in task_index [batch] which of them each row is of."
            )
        return batch["task_index"]

    def _uniform(self, rng: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.uniform(rng, shape, dtype, self.low, self.high)

    def initialize(self, rng: jax.Array, params: Params, config: Any) -> Mapping[str, Any]:
        if self.initialization == "random_uniform":
            return {}
        if self.tasks:
            rngs = jax.random.split(rng, len(self.tasks))
            value = jnp.stack([self._value(*each, params, config) for each in enumerate(rngs)])
        else:
            value = self._value(0, rng, params, config)
        # Decoder-only models have no encoder, and read the prompt in the decoder.
        stack = "encoder" if "encoder" in params else "decoder"
        return {f"{stack}/{self.name}": value}

    def _value(
        self, task: int, rng: jax.Array, params: Params, config: Any
    ) -> Float[Array, "prompt embed"]:
        """Returns the initial prompt of one task, the first if all tasks share one."""
        if self.initialization == "file":
            file = self._files[task % len(self._files)]
            return jnp.asarray(prompt_values.read(file), jnp.float32)
        table = params["token_embedder"]["embedding"]
        tokens = [self._encoded(text, table.shape[0]) for text in self._texts()]
        if self.initialization == "text":
            value = prompt_values.copied(table, tokens[0], self.length)
        else:
            averaged = [prompt_values.averaged(table, each) for each in tokens]
            candidates = range(self.first_token, min(self.vocabulary_top, table.shape[0]))
            rest = self.length - len(averaged)
            sampled = prompt_values.sampled(table, candidates, rest, rng)
            value = jnp.concatenate([*averaged, sampled])
        # Some models multiply embedded tokens, but not the prompt among them.
        return value * (config.emb_dim**0.5 if getattr(config, "scale_embedding", False) else 1.0)

    def check(self, shapes: Params, config: Any) -> None:
        del config
        size, width = shapes["token_embedder"]["embedding"].shape
        for text in self._texts():
            self._encoded(text, size)
        if self.initialization in ("sampled_vocabulary", "class_labels") and (
            self.first_token >= size
        ):
            raise UserError(
                f"Prompt.first_token={self.first_token} leaves no token of a vocabulary of "
                f"{size} to draw from."
            )
        for file in self._files if self.initialization == "file" else ():
            if (found := prompt_values.read(file).shape) != (self.length, width):
                raise UserError(
                    f"The prompt in '{file}' is {list(found)}, but Prompt.length={self.length} in "
                    f"a model with embeddings of {width} asks for {[self.length, width]}."
                )

    def _texts(self) -> Sequence[str]:
        return (self.text,) if self.initialization == "text" else self.labels

    def _encoded(self, text: str, vocab_size: int) -> list[int]:
        """Returns a text's tokens; a UserError if it has none, or unknown ones."""
        vocabulary: Any = self.vocabulary
        tokens: list[int] = vocabulary.encode(text)
        field = INITIALIZATIONS[self.initialization]
        if not tokens or vocabulary.unk_id in tokens:
            what = f"a part of '{text}'" if tokens else f"'{text}'"
            raise UserError(f"Prompt.vocabulary has no tokens for {what} in Prompt.{field}.")
        if max(tokens) >= vocab_size:
            raise UserError(
                f"Prompt.vocabulary has token {max(tokens)} for '{text}' in Prompt.{field}, but "
                f"the model has {vocab_size} tokens; give the model's own vocabulary."
            )
        return tokens

    def exported(self) -> "Prompt":
        """Returns the prompt as it is used after training, which no longer says how it began."""
        return Prompt(self.name, self.length, position=self.position, tasks=self.tasks)


def _inserted(
    x: Float[Array, "batch length embed"],
    prompt: Float[Array, "batch prompt embed"],
    mask: Bool[Array, "batch length"],
) -> tuple[Float[Array, "batch longer embed"], Bool[Array, "batch longer"]]:
    """Puts the prompt behind each row's last token and moves the padding that follows it."""
    length, added = x.shape[1], prompt.shape[1]
    # One behind the last token that is not padding; tokens differ in number from row to row, so
    # that rows are gathered from [x; prompt], not concatenated.
    ends = jnp.where(mask, jnp.arange(length)[None] + 1, 0)  # [batch, length]
    end = jnp.max(ends, axis=1, keepdims=True, initial=0)  # [batch, 1]
    slots = jnp.arange(length + added)[None]  # [1, longer]
    behind = jnp.where(slots < end + added, length + slots - end, slots - added)
    source = jnp.where(slots < end, slots, behind)  # [batch, longer], indices into [x; prompt]
    x = jnp.take_along_axis(jnp.concatenate([x, prompt], 1), source[..., None], 1)
    prompt_mask = jnp.ones(prompt.shape[:2], bool)
    return x, jnp.take_along_axis(jnp.concatenate([mask, prompt_mask], 1), source, 1)
