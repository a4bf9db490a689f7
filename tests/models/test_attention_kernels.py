"""Where cuDNN's attention applies, and that the way to it computes what our own attention does.

There is no GPU here: programs are lowered for one, and on CPUs the kernel is replaced.
"""

import dataclasses
import functools
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_families
from checks import logits_of
from jax._src.cudnn import fused_attention_stablehlo

from robust_ft.errors import UserError
from robust_ft.models import attention, attention_kernels
from robust_ft.models.model import Model
from robust_ft.models.peft import Prefix
from robust_ft.models.t5 import T5Config
from robust_ft.partitioning import Partitioner

HOPPER = SimpleNamespace(compute_capability="9.0", device_kind="NVIDIA H100")
VOLTA = SimpleNamespace(compute_capability="7.0", device_kind="Tesla V100")
BATCH, QUERIES, KEYS, HEADS, HEAD_DIM = 2, 6, 8, 4, 16


@pytest.fixture
def hopper(monkeypatch):
    """A GPU and cuDNN, as far as tracing asks for them."""
    monkeypatch.setattr(attention_kernels, "nvidia_gpu", lambda: HOPPER)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


def operands(seed=0, parts=(KEYS,), bias=(BATCH, HEADS, QUERIES), dtype="float32"):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    blocks = [
        {name: draw(BATCH, part, HEADS, HEAD_DIM) for name in ("key", "value")} for part in parts
    ]
    scores = draw(*bias, sum(parts)).astype(jnp.float32)
    return draw(BATCH, QUERIES, HEADS, HEAD_DIM), blocks, scores


def says(query, blocks, choice="auto", dropped=False):
    return attention_kernels.uses_cudnn(choice, query, blocks, dropped)


@pytest.mark.parametrize(
    ("bias", "parts"),
    [
        ((BATCH, HEADS, QUERIES), (KEYS,)),
        ((1, HEADS, QUERIES), (KEYS,)),
        ((BATCH, 1, 1), (KEYS,)),
        ((BATCH, 1, QUERIES), (3, 5)),
    ],
    ids=["full", "positions", "padding", "prefix"],
)
def test_the_fused_way_is_our_own_attention(bias, parts):
    query, blocks, scores = operands(bias=bias, parts=parts)
    scores = scores.at[..., 1].set(attention.MASKED)

    cotangent = operands(seed=1)[0].reshape(BATCH, QUERIES, -1)

    @functools.partial(jax.jit, static_argnums=0)
    def values_and_gradients(way):
        mixed, pull = jax.vjp(way, query, blocks, scores)
        return mixed, pull(cotangent)

    found, expected = (
        values_and_gradients(lambda *inputs: attention_kernels.fused(*inputs, 0.5, "xla")),
        values_and_gradients(lambda *inputs: attention.attend(*inputs, None, 0.5)),
    )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5, strict=True)


@pytest.mark.parametrize("family", tiny_families.CONFIGS)
def test_every_family_reads_the_same_logits(family, monkeypatch):
    model = tiny_families.model_of(family, Prefix(length=3))
    params, batch = tiny_families.params_of(model), tiny_families.batch_of()
    expected = logits_of(model, params, batch)
    fused, calls = attention_kernels.fused, []

    def counted(*inputs):
        calls.append(inputs)
        return fused(*inputs, implementation="xla")

    monkeypatch.setattr(attention_kernels, "obstacle", lambda *_: None)
    monkeypatch.setattr(attention_kernels, "fused", counted)
    # A function of its own, which no cache knows.
    found = jax.jit(lambda params, batch: model.logits(params, batch))(params, batch)
    assert len(calls) == (5 if family in ("t5", "bart") else 2)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_auto_takes_cudnn_where_it_applies(hopper):
    query, blocks, _ = operands(dtype="bfloat16", parts=(2, 6))
    assert says(query, blocks) and says(query, blocks, "cudnn")
    assert not says(query, blocks, "xla")


def test_here_it_does_not_apply():
    query, blocks, _ = operands(dtype="bfloat16")
    assert not says(query, blocks)
    with pytest.raises(UserError, match="no NVIDIA GPU; 'auto' takes it where it does"):
        says(query, blocks, "cudnn")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"query": ("float32", QUERIES, HEAD_DIM)}, "dtype='bfloat16'"),
        ({"query": ("bfloat16", QUERIES, 12)}, "heads of 12"),
        ({"query": ("bfloat16", QUERIES, 136)}, "heads of 136"),
        ({"query": ("bfloat16", 5, HEAD_DIM)}, "5 queries and 8 keys"),
        ({"keys": 7}, "6 queries and 7 keys"),
        ({"dropped": True}, "dropout"),
        ({"gpu": VOLTA}, "Tesla V100 is older"),
    ],
)
@pytest.mark.usefixtures("hopper")
def test_what_is_in_its_way(changes, said, monkeypatch):
    dtype, length, head_dim = changes.get("query", ("bfloat16", QUERIES, HEAD_DIM))
    query = jnp.zeros((BATCH, length, HEADS, head_dim), dtype)
    key = jnp.zeros((BATCH, changes.get("keys", KEYS), HEADS, head_dim), dtype)
    monkeypatch.setattr(attention_kernels, "nvidia_gpu", lambda: changes.get("gpu", HOPPER))
    dropped = changes.get("dropped", False)
    assert not says(query, [{"key": key}], dropped=dropped)
    with pytest.raises(UserError, match=f"attention='cudnn' does not apply: .*{said}"):
        says(query, [{"key": key}], "cudnn", dropped)


@pytest.mark.usefixtures("hopper")
def test_a_split_sequence_is_in_its_way():
    query, blocks, _ = operands(dtype="bfloat16")
    with Partitioner(rules=[("length", ("data", "sequence"))]).on(jax.devices()).activate():
        assert says(query, blocks) == (jax.device_count() == 1)


@pytest.mark.usefixtures("hopper")
def test_a_step_of_decoding_does_not_ask():
    query = jnp.zeros((BATCH, 1, HEADS, HEAD_DIM))
    assert not says(query, [{"key": query}], "cudnn")


def half(family, **changes):
    """Returns a tiny model in bfloat16 whose heads are of 8."""
    config = tiny_families.CONFIGS[family]
    sizes = {"head_dim": 8} if hasattr(config, "head_dim") else {"emb_dim": 8 * config.num_heads}
    return Model(dataclasses.replace(config, dtype="bfloat16", **sizes, **changes))


def lowered_for_cuda(model, rows, differentiated):
    def loss(params, batch, rng=None):
        return jnp.sum(model.logits(params, batch, rng))

    function = jax.grad(loss) if differentiated else loss
    tokens = jax.ShapeDtypeStruct((2, rows), jnp.int32)
    batch = {"encoder_input_tokens": tokens, "decoder_input_tokens": tokens}
    traced = jax.jit(function).trace(model.shapes(), batch)
    return re.findall(r"__cudnn\$(\w+)", traced.lower(lowering_platforms=("cuda",)).as_text())


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("family", tiny_families.CONFIGS)
def test_lowered_for_cuda_every_attention_is_cudnns(family):
    calls = lowered_for_cuda(half(family), rows=4, differentiated=True)
    layers_of = 5 if family in ("t5", "bart") else 2
    assert calls.count("fmhaScaleBiasSoftmax") == layers_of
    assert calls.count("fmhaScaleBiasSoftmaxBackward") == layers_of
    assert len(calls) == 2 * layers_of
    assert not lowered_for_cuda(half(family, attention="xla"), rows=4, differentiated=False)


def test_shapes_are_known_where_it_does_not_apply():
    model = half("t5", attention="cudnn")
    assert model.shapes() == half("t5").shapes()
    with pytest.raises(UserError, match="no NVIDIA GPU"):
        jax.eval_shape(model.logits, model.shapes(), tiny_families.batch_of())


def test_an_unknown_kernel_is_one_sentence():
    with pytest.raises(UserError, match=r"T5Config.attention='cuddn' .* Did you mean 'cudnn'\?"):
        T5Config(attention="cuddn")


def test_on_a_mesh():
    script = Path(__file__).parent / "sharded_attention.py"
    ended = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=False, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["same"] * 3
