"""The chunked loss is the loss of all logits."""

import dataclasses
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_families import batch_of, model_of, params_of
from tiny_models import assert_trees_close

from robust_ft.models.peft import Lora, Prefix
from robust_ft.objectives import Teacher, chunked_loss
from robust_ft.objectives.chunked_loss import (
    HeadInputs,
    LogitStatistics,
    LossSpec,
    chunked_statistics,
    unchunked_statistics,
)
from robust_ft.objectives.vocab_chunks import VocabChunks
from robust_ft.trainable import flatten, merge, split, unflatten

TESTS = Path(__file__).parents[1]
VOCAB, TOP = 40, 6
# The last of three chunks overlaps the one before it by two tokens.
UNEVEN = VocabChunks(VOCAB, 1, 14)
# Two shards; again the last chunk overlaps.
TWO_SHARDS = VocabChunks(VOCAB, 2, 8)
DIFFERENTIABLE = ("log_z", "target_logit", "logit_sum", "kl")
BATCH = batch_of()
TARGETS = jnp.asarray(BATCH["decoder_target_tokens"])
CASES = {
    "t5": {},
    "t5 tied": {"logits_via_embedding": True},
    "bart": {},
    "gpt2": {},
    "llama": {},
    "t5 lora": {"peft": (Lora(target="decoder/logits_dense", dropout_rate=0.3), Prefix(mid_dim=3))},
}


def student_of(case, **changes):
    changes = CASES[case] | changes
    model = model_of(case.split()[0], *changes.pop("peft", ()))
    if not changes:
        return model
    return dataclasses.replace(model, config=dataclasses.replace(model.config, **changes))


@functools.cache
def random_cotangents():
    """A loss's gradient by each statistic; `max_logit` has none."""
    rng = np.random.default_rng(5)
    return [rng.normal(size=TARGETS.shape).astype(np.float32) for _ in range(4)]


def weighted(statistics):
    """Returns (a sum that has a gradient by every statistic, the statistics)."""
    values = [getattr(statistics, name) for name in DIFFERENTIABLE]
    terms = [jnp.sum(w * v) for w, v in zip(random_cotangents(), values, strict=True)]
    return functools.reduce(jnp.add, terms), statistics


def hidden_of(model, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(*TARGETS.shape, model.config.emb_dim)), jnp.float32)


def compared(chunks, model, params, teacher=None, temperature=1.0, frozen=frozenset(), rng=None):
    """Returns (statistics, gradient) of the chunked and of the unchunked loss.

    Gradients are by the hidden states, "hidden", and by the head's parameters that are not frozen.
    """
    hidden = hidden_of(model)
    frozen_params, head_params = split(model.head_params(params), frozen)
    inputs = None
    if teacher is not None:
        teacher_head = teacher.model.head_params(teacher.params)
        inputs = HeadInputs(hidden_of(teacher.model, 1), teacher_head)

    def chunked(head_params, hidden):
        spec = LossSpec(chunks, model, teacher and teacher.model, temperature, TOP)
        student = HeadInputs(hidden, merge(head_params, frozen_params), rng)
        return weighted(chunked_statistics(spec, student, inputs, TARGETS))

    def unchunked(head_params, hidden):
        logits = model.head(merge(head_params, frozen_params), hidden, rng)
        teacher_logits = teacher and teacher.model.head(inputs.params, inputs.hidden)
        return weighted(unchunked_statistics(logits, TARGETS, teacher_logits, temperature, TOP))

    results = []
    for loss in (chunked, unchunked):
        gradient_of = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        (by_head, by_hidden), statistics = gradient_of(head_params, hidden)
        results.append((statistics, flatten(by_head) | {"hidden": by_hidden}))
    return results


def assert_same(results, tolerance=1e-5):
    (statistics, gradient), (expected, expected_gradient) = results
    for name in LogitStatistics._fields:
        value, wanted = getattr(statistics, name), getattr(expected, name)
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-5, err_msg=name)
    assert_trees_close(unflatten(gradient), unflatten(expected_gradient), rtol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_chunked_is_unchunked_for_every_head(case):
    model = student_of(case)
    assert_same(compared(UNEVEN, model, params_of(model), rng=jax.random.key(3)))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("chunks", [UNEVEN, TWO_SHARDS], ids=["one shard", "two shards"])
def test_chunked_is_unchunked_with_a_teacher_of_another_architecture(chunks, temperature):
    model, other = student_of("t5"), model_of("gpt2")
    teacher = Teacher(other, params_of(other))
    assert_same(compared(chunks, model, params_of(model), teacher, temperature))


def test_what_is_frozen_has_no_gradient_and_costs_none():
    model = student_of("t5")
    params, head = params_of(model), "decoder/logits_dense/kernel"
    results = compared(UNEVEN, model, params, frozen=frozenset({head}))
    assert results[0][1].keys() == {"hidden"}
    assert_same(results)

    def loss(hidden, head):
        student = HeadInputs(hidden, unflatten({"decoder/logits_dense/kernel": head}))
        return weighted(chunked_statistics(LossSpec(UNEVEN, model), student, None, TARGETS))[0]

    arguments = (hidden_of(model), flatten(params)[head])
    added = "dynamic_update_slice"  # of a chunk's gradient into the head's
    assert added not in str(jax.make_jaxpr(jax.grad(loss))(*arguments))
    assert added in str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(*arguments))


def test_bfloat16_parameters_have_gradients_of_their_type():
    model = student_of("t5", param_dtype="bfloat16")
    params = params_of(model)
    results = compared(UNEVEN, model, params)
    assert results[0][1]["decoder/logits_dense/kernel"].dtype == jnp.bfloat16
    # bfloat16 has 8 bits: two roundings of the same number differ by 1/128 at most.
    assert_same(results, tolerance=1 / 128)


@pytest.mark.parametrize("chunks", [UNEVEN, TWO_SHARDS], ids=["one shard", "two shards"])
def test_the_largest_logit_is_that_of_a_token_bit_for_bit(chunks):
    """So that a target has the largest logit exactly if no token's is above its own."""
    model = student_of("t5 tied")
    params = params_of(model)
    hidden = jnp.asarray(hidden_of(model))
    student, spec = HeadInputs(hidden, model.head_params(params)), LossSpec(chunks, model)
    of_tokens = [
        chunked_statistics(spec, student, None, jnp.full_like(TARGETS, token))
        for token in range(VOCAB)
    ]
    logits = np.stack([statistics.target_logit for statistics in of_tokens])
    np.testing.assert_array_equal(of_tokens[0].max_logit, np.max(logits, axis=0))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_unchunked_is_what_float64_makes_of_the_definitions(temperature):
    rng = np.random.default_rng(0)
    logits, teacher = (4 * rng.normal(size=(2, 3, 5, 11)) + 3).astype(np.float32)
    targets = rng.integers(0, 11, (3, 5))
    statistics = unchunked_statistics(
        jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(teacher), temperature
    )
    for row, column in np.ndindex(3, 5):
        here = logits[row, column].astype(np.float64)
        p, q = (
            np.exp(x / temperature) / np.sum(np.exp(x / temperature))
            for x in (teacher[row, column].astype(np.float64), here)
        )
        expected = {
            "log_z": np.log(np.sum(np.exp(here))),
            "target_logit": here[targets[row, column]],
            "logit_sum": np.sum(here),
            "max_logit": np.max(here),
            "kl": np.sum(p * np.log(p / q)),
        }
        for name, value in expected.items():
            computed = float(getattr(statistics, name)[row, column])
            assert computed == pytest.approx(value, rel=1e-5), name


def test_large_logits_overflow_nowhere():
    model = student_of("t5")
    flat = flatten(params_of(model))
    flat["decoder/logits_dense/kernel"] *= 300
    (statistics, gradient), (expected, _) = compared(UNEVEN, model, unflatten(flat))
    assert float(np.max(np.abs(expected.log_z))) > 500
    np.testing.assert_allclose(statistics.log_z, expected.log_z, rtol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in gradient.values())


@given(tokens=st.integers(1, 9), shards=st.integers(1, 3), width=st.integers(1, 9))
@settings(max_examples=15, deadline=None)
def test_chunks_hold_each_token_once(tokens, shards, width):
    chunks = VocabChunks(tokens * shards, shards, min(width, tokens))
    param = jnp.arange(chunks.vocab_size) + 100
    seen, total = [], chunks.zero_gradient(param, 0)
    for index in range(chunks.count):
        chunk = chunks.chunk(jnp.asarray(index))
        is_new = np.broadcast_to(chunk.is_new, chunk.token_ids.shape)
        seen += np.asarray(chunk.token_ids)[is_new].tolist()
        sliced = chunk.slice(param, 0)
        np.testing.assert_array_equal(sliced, np.asarray(chunk.token_ids).reshape(-1) + 100)
        total = chunk.add_gradient(total, sliced * is_new.reshape(-1).astype(np.int32), 0)
    assert sorted(seen) == list(range(chunks.vocab_size))
    np.testing.assert_array_equal(total.reshape(-1), param)


@given(
    limit=st.integers(1, 10**6),
    batch=st.integers(1, 64),
    length=st.integers(1, 128),
    vocab=st.integers(1, 300_000),
)
@settings(max_examples=100, deadline=None)
def test_chunks_are_as_few_as_the_limit_allows(limit, batch, length, vocab):
    chunks = VocabChunks.fitting(limit, batch, length, vocab, emb_dim=512)
    positions = batch * length
    if positions * vocab <= limit:
        assert chunks.count == 1
    # Registers are filled: 128 tokens at least, whatever the limit.
    assert chunks.width * positions <= max(limit, 0) + 128 * positions
    assert 1 <= chunks.width <= vocab
    assert (chunks.count - 1) * chunks.width < vocab <= chunks.count * chunks.width


def test_statistics_are_chunked_where_logits_are_many(monkeypatch):
    sizes = {"vocab_size": 300, "num_decoder_layers": 1}
    model, other = student_of("t5", dropout_rate=0.2, **sizes), student_of("t5 tied", **sizes)
    params = params_of(model)
    teacher = Teacher(other, params_of(other, seed=1))

    def gradient_of(limit):
        monkeypatch.setattr(chunked_loss, "MAX_CHUNK_ELEMENTS", limit)

        def loss(params, teacher):
            key = jax.random.key(1)
            return weighted(chunked_loss.logit_statistics(model, params, BATCH, key, teacher, 2.0))

        compiled = jax.jit(jax.grad(loss, has_aux=True)).lower(params, teacher).compile()
        gradient, statistics = compiled(params, teacher)
        return (statistics, flatten(gradient)), compiled.as_text()

    (chunked, program), (unchunked, whole_program) = gradient_of(2000), gradient_of(10**6)
    assert_same([chunked, unchunked])
    assert "f32[2,7,300]" in whole_program and "f32[2,7,300]" not in program


def test_at_mt5s_size_memory_is_less_than_a_seventh():
    # In a process of its own, where the compiler is not told to hurry.
    script = TESTS.parent / "benchmarks" / "loss_memory.py"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(TESTS.parent)}
    process = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    assert "batch 64, length 128, vocab 250,112" in process.stdout
    shares = [float(share) for share in re.findall(r"chunked/unchunked ([\d.]+) %", process.stdout)]
    assert len(shares) == 2 and max(shares) <= 15, process.stdout


@pytest.mark.slow
def test_devices_that_split_the_vocabulary_or_the_weights_find_the_same():
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    process = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("sharded_loss.py"))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ["split", "sharded"]
