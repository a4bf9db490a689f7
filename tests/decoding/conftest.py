"""A model small enough to enumerate: a table of log-probabilities for every possible history."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

EOS, PAD = 1, 0


def node_of(prefix, vocab):
    """Numbers the histories: the root is 0, its children 1 to vocab, and so on."""
    node = 0
    for token in prefix:
        node = node * vocab + token + 1
    return node


@dataclasses.dataclass(frozen=True)
class TableModel:
    """Log-probabilities [batch, history, vocab], looked up by a step function with a real cache."""

    table: np.ndarray
    length: int

    @property
    def batch(self):
        return self.table.shape[0]

    @property
    def vocab(self):
        return self.table.shape[2]

    def log_probs(self, row, prefix):
        return self.table[row, node_of(prefix, self.vocab)].astype(np.float64)

    def cache(self):
        return {
            "row": np.arange(self.batch, dtype=np.int32),  # never changes, as an encoder's output
            "history": np.zeros([self.batch, self.length, 2], np.int32),
            "position": np.zeros([self.batch], np.int32),
        }

    def start(self):
        return np.zeros([self.batch], np.int32)

    def step_fn(self, table=None):
        table = jnp.asarray(self.table if table is None else table)

        def step(cache, tokens):
            position = cache["position"]
            rows = jnp.arange(len(tokens))
            written = cache["history"].at[rows, position - 1].set(tokens[:, None], mode="drop")
            history = jnp.where((position > 0)[:, None, None], written, cache["history"])
            node = jnp.zeros_like(tokens)
            for i in range(self.length):
                child = node * self.vocab + history[:, i, 1] + 1
                node = jnp.where(i < position, child, node)
            return table[cache["row"], node], {
                "row": cache["row"],
                "history": history,
                "position": position + 1,
            }

        return step


def make_table_model(seed, batch, vocab, length, eos_bias=0.0, scale=1.5):
    rng = np.random.default_rng(seed)
    histories = sum(vocab**i for i in range(length))
    logits = rng.normal(size=[batch, histories, vocab]) * scale
    logits[..., EOS] += eos_bias
    table = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    return TableModel(table.astype(np.float32), length)


@pytest.fixture
def table_model():
    """The function that makes a `TableModel` with a random table."""
    return make_table_model
