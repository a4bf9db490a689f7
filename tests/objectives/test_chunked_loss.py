"""The loss in blocks of the vocabulary is the loss of all logits."""

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
from robust_ft.objectives import chunked_loss
from robust_ft.objectives.chunked_loss import Setting, Side, Statistics, blocked, plain
from robust_ft.objectives.vocab_chunks import Blocks
from robust_ft.trainable import flatten, merge, split, unflatten

TESTS = Path(__file__).parents[1]
VOCAB = 40
# The last of three blocks begins two tokens before its turn.
UNEVEN = Blocks(VOCAB, 1, 14)
# Two devices' parts; again the last block repeats tokens.
TWO_PARTS = Blocks(VOCAB, 2, 8)
BATCH = batch_of()
TARGETS = BATCH["decoder_target_tokens"]
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
    """What a loss's gradient by each statistic may be; `top` has none."""
    rng = np.random.default_rng(5)
    return [rng.normal(size=TARGETS.shape).astype(np.float32) for _ in range(4)]


def weighted(found):
    values = (found.log_z, found.target, found.total, found.divergence)
    return sum(jnp.sum(w * v) for w, v in zip(random_cotangents(), values, strict=True)), found


def hidden_of(model, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(*TARGETS.shape, model.config.emb_dim)), jnp.float32)


def compared(blocks, model, params, teacher=None, temperature=1.0, frozen=frozenset(), rng=None):
    """Returns (statistics, gradient) of the blocked and of the plain loss, of what is not frozen.

    Gradients are by the hidden states, "hidden", and by the head's parameters.
    """
    hidden = hidden_of(model)
    still, moving = split(model.head_params(params), frozen)
    side = teacher and Side(hidden_of(teacher[0], 1), teacher[0].head_params(teacher[1]))

    def in_blocks(moving, hidden):
        setting = Setting(blocks, model, teacher and teacher[0], temperature)
        student = Side(hidden, merge(moving, still), rng)
        return weighted(blocked(setting, student, side, TARGETS))

    def at_once(moving, hidden):
        logits = model.head(merge(moving, still), hidden, rng)
        other = teacher and teacher[0].head(teacher[1], side.hidden)
        return weighted(plain(logits, TARGETS, other, temperature))

    results = []
    for loss in (in_blocks, at_once):
        gradient_of = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        (by_head, by_hidden), found = gradient_of(moving, hidden)
        results.append((found, flatten(by_head) | {"hidden": by_hidden}))
    return results


def assert_same(results, tolerance=1e-5):
    (found, gradient), (expected, expected_gradient) = results
    for name in Statistics._fields:
        value, wanted = getattr(found, name), getattr(expected, name)
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-5, err_msg=name)
    assert_trees_close(unflatten(gradient), unflatten(expected_gradient), rtol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_blocked_is_plain_for_every_head(case):
    model = student_of(case)
    assert_same(compared(UNEVEN, model, params_of(model), rng=jax.random.key(3)))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("blocks", [UNEVEN, TWO_PARTS], ids=["one part", "two parts"])
def test_blocked_is_plain_with_a_teacher_of_another_architecture(blocks, temperature):
    model, tutor = student_of("t5"), model_of("gpt2")
    assert_same(compared(blocks, model, params_of(model), (tutor, params_of(tutor)), temperature))


def test_what_is_frozen_has_no_gradient_and_costs_none():
    model = student_of("t5")
    params, head = params_of(model), "decoder/logits_dense/kernel"
    results = compared(UNEVEN, model, params, frozen=frozenset({head}))
    assert results[0][1].keys() == {"hidden"}
    assert_same(results)

    def loss(hidden, head):
        side = Side(hidden, unflatten({"decoder/logits_dense/kernel": head}))
        return weighted(blocked(Setting(UNEVEN, model), side, None, TARGETS))[0]

    arguments = (hidden_of(model), flatten(params)[head])
    added = "dynamic_update_slice"  # of a block's gradient into the head's
    assert added not in str(jax.make_jaxpr(jax.grad(loss))(*arguments))
    assert added in str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(*arguments))


def test_bfloat16_parameters_have_gradients_of_their_type():
    model = student_of("t5", param_dtype="bfloat16")
    params = params_of(model)
    results = compared(UNEVEN, model, params)
    assert results[0][1]["decoder/logits_dense/kernel"].dtype == jnp.bfloat16
    # bfloat16 has 8 bits: two roundings of the same number differ by 1/128 at most.
    assert_same(results, tolerance=1 / 128)


@pytest.mark.parametrize("blocks", [UNEVEN, TWO_PARTS], ids=["one part", "two parts"])
def test_the_top_logit_is_that_of_a_token_bit_for_bit(blocks):
    """So that a target is the top one exactly if no token's logit is above its own."""
    model = student_of("t5 tied")
    params = params_of(model)
    hidden = jnp.asarray(hidden_of(model))
    found, head = [], model.head_params(params)
    for token in range(VOCAB):
        targets = jnp.full_like(TARGETS, token)
        found.append(blocked(Setting(blocks, model), Side(hidden, head), None, targets))
    logits = np.stack([each.target for each in found])
    np.testing.assert_array_equal(found[0].top, np.max(logits, axis=0))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_plain_is_what_float64_makes_of_the_definitions(temperature):
    rng = np.random.default_rng(0)
    logits, teacher = (4 * rng.normal(size=(2, 3, 5, 11)) + 3).astype(np.float32)
    targets = rng.integers(0, 11, (3, 5))
    found = plain(jnp.asarray(logits), targets, jnp.asarray(teacher), temperature)
    for row, column in np.ndindex(3, 5):
        here = logits[row, column].astype(np.float64)
        p, q = (
            np.exp(x / temperature) / np.sum(np.exp(x / temperature))
            for x in (teacher[row, column].astype(np.float64), here)
        )
        expected = {
            "log_z": np.log(np.sum(np.exp(here))),
            "target": here[targets[row, column]],
            "total": np.sum(here),
            "top": np.max(here),
            "divergence": np.sum(p * np.log(p / q)),
        }
        for name, value in expected.items():
            assert float(getattr(found, name)[row, column]) == pytest.approx(value, rel=1e-5), name


def test_large_logits_overflow_nowhere():
    model = student_of("t5")
    flat = flatten(params_of(model))
    flat["decoder/logits_dense/kernel"] *= 300
    (found, gradient), (expected, _) = compared(UNEVEN, model, unflatten(flat))
    assert float(np.max(np.abs(expected.log_z))) > 500
    np.testing.assert_allclose(found.log_z, expected.log_z, rtol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in gradient.values())


@given(tokens=st.integers(1, 9), parts=st.integers(1, 3), width=st.integers(1, 9))
@settings(max_examples=15, deadline=None)
def test_blocks_hold_each_token_once(tokens, parts, width):
    blocks = Blocks(tokens * parts, parts, min(width, tokens))
    leaf = np.arange(blocks.vocab) + 100
    seen, sums = [], blocks.zeros(jnp.asarray(leaf), 0)
    for turn in range(blocks.count):
        block = blocks.at(jnp.asarray(turn))
        fresh = np.broadcast_to(block.fresh, block.ids.shape)
        seen += np.asarray(block.ids)[fresh].tolist()
        taken = block.take(jnp.asarray(leaf), 0)
        np.testing.assert_array_equal(taken, np.asarray(block.ids).reshape(-1) + 100)
        sums = block.add(sums, taken * fresh.reshape(-1), 0)
    assert sorted(seen) == list(range(blocks.vocab))
    np.testing.assert_array_equal(sums.reshape(-1), leaf)


@given(
    limit=st.integers(1, 10**6),
    rows=st.integers(1, 64),
    length=st.integers(1, 128),
    vocab=st.integers(1, 300_000),
)
@settings(max_examples=100, deadline=None)
def test_blocks_are_as_few_as_the_limit_allows(limit, rows, length, vocab):
    blocks = Blocks.holding(limit, rows, length, vocab, embed=512)
    positions = rows * length
    if positions * vocab <= limit:
        assert blocks.count == 1
    # Registers are filled: 128 tokens at least, whatever the limit.
    assert blocks.width * positions <= max(limit, 0) + 128 * positions
    assert 1 <= blocks.width <= vocab
    assert (blocks.count - 1) * blocks.width < vocab <= blocks.count * blocks.width


def test_statistics_come_in_blocks_where_logits_are_many(monkeypatch):
    sizes = {"vocab_size": 300, "num_decoder_layers": 1}
    model, tutor = student_of("t5", dropout_rate=0.2, **sizes), student_of("t5 tied", **sizes)
    params = (params_of(model), params_of(tutor, seed=1))

    def gradient_of(limit):
        monkeypatch.setattr(chunked_loss, "MAX_NUMBERS", limit)

        def loss(params, teacher):
            key, pair = jax.random.key(1), (tutor, teacher)
            return weighted(chunked_loss.statistics(model, params, BATCH, key, pair, 2.0))

        compiled = jax.jit(jax.grad(loss, has_aux=True)).lower(*params).compile()
        gradient, found = compiled(*params)
        return (found, flatten(gradient)), compiled.as_text()

    (in_blocks, text), (at_once, whole) = gradient_of(2000), gradient_of(10**6)
    assert_same([in_blocks, at_once])
    assert "f32[2,7,300]" in whole and "f32[2,7,300]" not in text


def test_at_mt5s_size_memory_is_less_than_a_seventh():
    # In a process of its own, where the compiler is not told to hurry.
    script = TESTS.parent / "benchmarks" / "loss_memory.py"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(TESTS.parent)}
    process = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    assert "batch 64, length 128, vocab 250,112" in process.stdout
    shares = [float(share) for share in re.findall(r"blocked/plain ([\d.]+) %", process.stdout)]
    assert len(shares) == 2 and max(shares) <= 15, process.stdout


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
