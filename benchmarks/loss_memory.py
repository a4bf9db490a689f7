"""Memory of the loss: all logits at once against blocks of the vocabulary.

    python benchmarks/loss_memory.py [--batch=64] [--length=128] [--vocab=250112] [--embed=512]

Compiles, without running it, value and gradient of the cross entropy by hidden states and output
head (a head of its own, as mT5 has; embed=512 is mT5-small's), and of the cocktail loss with a
teacher of the same size in bfloat16. Prints the temporary memory that each needs (arguments and
results are the same for both) and how many percent of the plain one's the blocked one's is.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp

from robust_ft.models.model import Model
from robust_ft.models.t5 import T5Config
from robust_ft.objectives import chunked_loss
from robust_ft.objectives.chunked_loss import Setting, Side, blocked, plain
from robust_ft.objectives.vocab_chunks import Blocks


def temporary_bytes(batch: int, length: int, vocab: int, embed: int, teacher: bool) -> list[int]:
    """Returns the temporary memory of the plain and of the blocked loss with its gradient."""
    sizes: dict[str, Any] = {"num_encoder_layers": 1, "num_decoder_layers": 1, "emb_dim": embed}
    student = Model(T5Config(vocab_size=vocab, dtype="bfloat16", **sizes))
    tutor = Model(T5Config(vocab_size=vocab, dtype="bfloat16", param_dtype="bfloat16", **sizes))
    hidden = jax.ShapeDtypeStruct((batch, length, embed), jnp.bfloat16)
    targets = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    blocks = Blocks.holding(chunked_loss.MAX_NUMBERS, batch, length, vocab, embed)

    def mean(found: chunked_loss.Statistics) -> jax.Array:
        return jnp.mean(found.log_z - found.target + found.divergence)

    def in_blocks(head: Any, hidden: Any, targets: Any, taught: Any) -> jax.Array:
        side = None if taught is None else Side(*taught)
        setting = Setting(blocks, student, None if taught is None else tutor)
        return mean(blocked(setting, Side(hidden, head), side, targets))

    def at_once(head: Any, hidden: Any, targets: Any, taught: Any) -> jax.Array:
        other = None if taught is None else tutor.head(taught[1], taught[0])
        return mean(plain(student.head(head, hidden), targets, other))

    head, taught_head = (m.head_params(m.shapes()) for m in (student, tutor))
    taught = (hidden, taught_head) if teacher else None
    found = []
    for loss in (at_once, in_blocks):
        gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        compiled = gradient.lower(head, hidden, targets, taught).compile()
        found.append(compiled.memory_analysis().temp_size_in_bytes)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"batch": 64, "length": 128, "vocab": 250_112, "embed": 512}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = vars(parser.parse_args())
    print(", ".join(f"{name} {value:,}" for name, value in arguments.items()))
    print(f"on {jax.default_backend()}; temporary memory of value and gradient, in MiB")
    for teacher in (False, True):
        plain_bytes, blocked_bytes = temporary_bytes(**arguments, teacher=teacher)
        name = "with a teacher" if teacher else "cross entropy"
        print(
            f"{name:15} plain {plain_bytes / 2**20:9,.1f}   blocked {blocked_bytes / 2**20:9,.1f}"
            f"   blocked/plain {100 * blocked_bytes / plain_bytes:.1f} %",
            flush=True,
        )


if __name__ == "__main__":
    main()
