"""Memory of the loss: all logits at once against the chunked cross-entropy.

    python benchmarks/loss_memory.py [--batch=64] [--length=128] [--vocab=250112] [--embed=512]

Compiles, without running them, the value and gradient of the cross-entropy with respect to hidden
states and output head (untied, as mT5's; its small model has --embed=512), and of the cocktail loss
with a teacher of the same size in bfloat16. Prints the temporary memory of each (arguments and
results are the same for both) and the ratio.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp

from robust_ft.models.model import Model
from robust_ft.models.t5 import T5Config
from robust_ft.objectives.chunked_loss import (
    MAX_CHUNK_ELEMENTS,
    HeadInputs,
    LogitStatistics,
    LossSpec,
    chunked_statistics,
    unchunked_statistics,
)
from robust_ft.objectives.vocab_chunks import VocabChunks


def temporary_bytes(batch: int, length: int, vocab: int, embed: int, teacher: bool) -> list[int]:
    """Returns the temporary memory of the unchunked and of the chunked loss with its gradient."""
    sizes: dict[str, Any] = {"num_encoder_layers": 1, "num_decoder_layers": 1, "emb_dim": embed}
    student = Model(T5Config(vocab_size=vocab, dtype="bfloat16", **sizes))
    other = Model(T5Config(vocab_size=vocab, dtype="bfloat16", param_dtype="bfloat16", **sizes))
    hidden = jax.ShapeDtypeStruct((batch, length, embed), jnp.bfloat16)
    targets = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    chunks = VocabChunks.fitting(MAX_CHUNK_ELEMENTS, batch, length, vocab, embed)

    def mean(statistics: LogitStatistics) -> jax.Array:
        return jnp.mean(statistics.log_z - statistics.target_logit + statistics.kl)

    def chunked(head: Any, hidden: Any, targets: Any, teacher: HeadInputs | None) -> jax.Array:
        spec = LossSpec(chunks, student, None if teacher is None else other)
        return mean(chunked_statistics(spec, HeadInputs(hidden, head), teacher, targets))

    def unchunked(head: Any, hidden: Any, targets: Any, teacher: HeadInputs | None) -> jax.Array:
        logits = student.head(head, hidden)
        teacher_logits = None if teacher is None else other.head(teacher.params, teacher.hidden)
        return mean(unchunked_statistics(logits, targets, teacher_logits))

    head, teacher_head = (m.head_params(m.shapes()) for m in (student, other))
    inputs = HeadInputs(hidden, teacher_head) if teacher else None
    sizes_in_bytes = []
    for loss in (unchunked, chunked):
        gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        compiled = gradient.lower(head, hidden, targets, inputs).compile()
        sizes_in_bytes.append(compiled.memory_analysis().temp_size_in_bytes)
    return sizes_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"batch": 64, "length": 128, "vocab": 250_112, "embed": 512}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = vars(parser.parse_args())
    print(", ".join(f"{name} {value:,}" for name, value in arguments.items()))
    print(f"on {jax.default_backend()}; temporary memory of value and gradient, in MiB")
    for teacher in (False, True):
        unchunked, chunked = temporary_bytes(**arguments, teacher=teacher)
        name = "with a teacher" if teacher else "cross entropy"
        print(
            f"{name:15} unchunked {unchunked / 2**20:9,.1f}   chunked {chunked / 2**20:9,.1f}"
            f"   chunked/unchunked {100 * chunked / unchunked:.1f} %",
            flush=True,
        )


if __name__ == "__main__":
    main()
