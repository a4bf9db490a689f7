"""Prefixes on every family; tests/checkpoints_io/test_peft.py compares logits with PEFT's."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import decode_cached, logits_of, scattered
from tiny_families import CONFIGS, VOCAB, batch_of, model_of, params_of
from tiny_models import random_params, tree_equal

from robust_ft.decoding import Decoder
from robust_ft.errors import UserError
from robust_ft.models import layers
from robust_ft.models.bart import OFFSET
from robust_ft.models.gpt2 import GPT2Config
from robust_ft.models.model import Model
from robust_ft.models.peft import Lora, Prefix
from robust_ft.objectives import CrossEntropy
from robust_ft.optim import AdamW, Schedule
from robust_ft.predictor import Predictor
from robust_ft.train_step import init_state, make_train_step
from robust_ft.trainable import flatten, split, trainable_paths, unflatten
from robust_ft.vocabulary import Vocabulary

HERE = Path(__file__).parent
families = pytest.mark.parametrize("family", CONFIGS)
counted = pytest.mark.parametrize("counted", [False, True], ids=["uncounted", "counted"])
SITES = {
    "encoder": {"encoder/layers_0/attention"},
    "decoder": {f"decoder/layers_{i}/self_attention" for i in range(2)},
    "cross": {f"decoder/layers_{i}/encoder_decoder_attention" for i in range(2)},
}


slow = pytest.mark.slow
mostly_slow = pytest.mark.parametrize(
    "family", [pytest.param("t5", marks=slow), pytest.param("bart", marks=slow), "gpt2", "llama"]
)
MLP = Prefix(length=3, mid_dim=7, counted=True)


def sites_of(model):
    paths = (path for path in flatten(model.shapes()) if model.peft_owns(path))
    return {path.rsplit("/", 2)[0] for path in paths}


@families
def test_shapes_and_switches(family):
    here = ("decoder",) if family in ("gpt2", "llama") else tuple(SITES)
    assert sites_of(model_of(family, Prefix())) == set().union(*(SITES[site] for site in here))
    for site in here:
        only = {switch: switch == site for switch in SITES}
        model = model_of(family, Prefix(length=5, **only))
        assert sites_of(model) == SITES[site]
    shapes = flatten(model.shapes())
    heads = {"t5": (2, 6), "bart": (3, 5), "gpt2": (3, 5), "llama": (2, 6)}[family]
    found = {leaf.shape for path, leaf in shapes.items() if model.peft_owns(path)}
    assert found == {(5, *heads)}


def test_attention_with_slots_is_attention_to_more_keys():
    """An independent computation, with slots for all heads and no bias on them."""
    rng = np.random.default_rng(0)
    module = layers.Attention(2, 3, 7, peft=(Prefix(length=4),), name="self_attention")

    class Whole(layers.nn.Module):
        @layers.nn.compact
        def __call__(self, x, bias):
            attention = module.clone(parent=self)
            return attention(x, attention.project(x), bias, True)

    x = rng.normal(size=(2, 5, 7)).astype(np.float32)
    bias = rng.normal(size=(1, 2, 5, 5)).astype(np.float32)
    inputs = jnp.asarray(x), jnp.asarray(bias)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32),
        layers.nn.unbox(Whole().init(jax.random.key(0), *inputs)["params"]),
    )
    found = Whole().apply({"params": params}, *inputs)
    p = jax.tree.map(np.asarray, params["self_attention"])
    split_ = lambda name: (x @ p[name]["kernel"]).reshape(2, 5, 2, 3)  # noqa: E731
    slots = {k: np.broadcast_to(v, (2, 4, 2, 3)) for k, v in p["prefix"].items()}
    key = np.concatenate([slots["key"], split_("key")], 1)
    value = np.concatenate([slots["value"], split_("value")], 1)
    scores = np.einsum("bqhd,bkhd->bhqk", split_("query"), key)
    scores[..., 4:] += bias
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    mixed = np.einsum("bhqk,bkhd->bqhd", weights, value).reshape(2, 5, 6)
    np.testing.assert_allclose(found, mixed @ p["out"]["kernel"], atol=1e-4)


@families
def test_cached_decoding_is_uncached(family):
    """Of slots that are not counted; for others see the MLP's test."""
    model = model_of(family, Prefix(length=3))
    params, batch = params_of(model), batch_of()
    expected = jax.nn.log_softmax(logits_of(model, params, batch))
    length = batch["decoder_input_tokens"].shape[1]
    cached = decode_cached(model, params, batch, length)
    np.testing.assert_allclose(cached, expected, rtol=0, atol=1e-4)


@families
def test_it_matters_and_is_gone_without(family):
    model = model_of(family, Prefix(length=3))
    plain = model.without("prefix")
    params, batch = params_of(model), batch_of()
    _, pretrained = split(params, trainable_paths(params, [".*/prefix/.*"]))
    assert flatten(pretrained).keys() == flatten(plain.shapes()).keys()
    logits = logits_of(plain, pretrained, batch)
    np.testing.assert_array_equal(logits_of(plain, params, batch), logits)
    assert np.abs(logits_of(model, params, batch) - logits).max() > 0.05


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@counted
def test_padding_is_invisible(family, counted):
    model = model_of(family, Prefix(length=3, counted=counted))
    params, batch = params_of(model), batch_of()
    expected = logits_of(model, params, batch)
    found = logits_of(model, params, scattered(batch))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@mostly_slow
def test_only_it_trains_beside_a_lora(family):
    model = model_of(family, Prefix(length=2, mid_dim=3), Lora(rank=2))
    params = params_of(model)
    trained, frozen = split(params, trainable_paths(params, ["prefix/.*"]))
    switches = ("decoder",) if family in ("gpt2", "llama") else tuple(SITES)
    assert trained["prefix"].keys() == set(switches) and len(flatten(trained)) == 5 * len(switches)
    optimizer = AdamW(Schedule(1e-2))
    step = jax.jit(make_train_step(model, CrossEntropy(), optimizer))
    before = jax.tree.map(np.array, frozen)
    after, _ = step(init_state(optimizer, trained), frozen, None, batch_of(), jax.random.key(0))
    assert tree_equal(frozen, before)
    for path, leaf in flatten(after.trainable).items():
        assert np.any(leaf != flatten(trained)[path]), path


@mostly_slow
def test_remat_changes_nothing(family):
    model = model_of(family, MLP)
    params, batch = params_of(model), batch_of()
    config = dataclasses.replace(model.config, remat="full")
    remat = dataclasses.replace(model, config=config)
    expected = logits_of(model, params, batch)
    np.testing.assert_allclose(logits_of(remat, params, batch), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"length": 0}, "length=0"),
        ({"encoder": False, "decoder": False, "cross": False}, "encoder, decoder, cross"),
        ({"counted": True, "decoder": False}, "Prefix.decoder"),
        ({"mid_dim": 0}, "mid_dim=0"),
        ({"initialization": "words"}, r"initialization='words' is not one of"),
        ({"initialization": "text", "text": "a"}, "Prefix.vocabulary"),
    ],
)
def test_settings_out_of_range(settings, named):
    with pytest.raises(UserError, match=named):
        Prefix(**settings)


def test_slots_that_are_counted_need_positions():
    for family, sentence in {
        "bart": "num_positions=32, of which a prefix takes 40",
        "gpt2": "num_positions=48, of which a prefix takes 40",
    }.items():
        model = model_of(family, Prefix(length=40, counted=True))
        with pytest.raises(UserError, match=sentence):
            model.check_lengths(6, 7)
        model.without("prefix").check_lengths(6, 7)


def test_prefixes_with_positions_come_first():
    one, two = Prefix("one", length=2), Prefix("two", length=3, counted=True)
    model_of("t5", two, one).shapes()
    with pytest.raises(UserError, match="counted must come before"):
        model_of("t5", one, two).shapes()


# --- The MLP


def mlp_of(params, switch):
    return {path: np.asarray(leaf) for path, leaf in flatten(params["prefix"][switch]).items()}


def export_of(model, params):
    return model.exported(), jax.jit(model.export)(params)


@families
def test_the_mlp_is_gone_and_missed_by_no_one_after_export(family):
    model = model_of(family, MLP)
    params, batch = params_of(model), batch_of()
    exported, plain = export_of(model, params)
    assert exported == model_of(family, Prefix(length=3, counted=True))
    shapes = flatten(exported.shapes())
    assert {path: leaf.shape for path, leaf in flatten(plain).items()} == {
        path: leaf.shape for path, leaf in shapes.items()
    }
    expected = logits_of(exported, plain, batch)
    np.testing.assert_allclose(logits_of(model, params, batch), expected, rtol=0, atol=1e-5)
    length = batch["decoder_input_tokens"].shape[1]
    cached = decode_cached(model, params, batch, length)
    np.testing.assert_allclose(cached, jax.nn.log_softmax(expected), rtol=0, atol=1e-4)
    # What is computed already stays as it is.
    assert tree_equal(model.export(plain), plain)


@pytest.mark.parametrize("family", ["t5", "llama", "many layers"])
def test_the_mlp_in_numpy(family):
    model = model_of("gpt2" if family == "many layers" else family, Prefix(length=4, mid_dim=7))
    if family == "many layers":  # layers_10 comes after layers_9, not after layers_1
        config = dataclasses.replace(model.config, num_layers=11)
        model = dataclasses.replace(model, config=config)
    params = random_params(model)
    plain = flatten(export_of(model, params)[1])
    for switch in params["prefix"]:
        mlp = mlp_of(params, switch)
        hidden = np.tanh(mlp["embedding"] @ mlp["hidden/kernel"] + mlp["hidden/bias"])
        flat = hidden @ mlp["out/kernel"].reshape(7, -1) + mlp["out/bias"].reshape(-1)
        stack = "encoder" if switch == "encoder" else "decoder"
        count = getattr(model.config, f"num_{stack}_layers", None) or model.config.num_layers
        # One row has keys and values of layer 0, then of layer 1, and so on.
        rows = flat.reshape(4, count, 2, *mlp["out/kernel"].shape[-2:])
        site = next(iter(SITES[switch])).split("/")[-1]
        for i in range(count):
            for j, part in enumerate(("key", "value")):
                found = plain.pop(f"{stack}/layers_{i}/{site}/prefix/{part}")
                np.testing.assert_allclose(found, rows[:, i, j], rtol=0, atol=1e-5)
    assert not any(model.peft_owns(path) for path in plain)


def test_initial_values_have_the_scale_of_pytorchs():
    model = model_of("t5", Prefix(length=400, mid_dim=100, encoder=False, cross=False))
    draw = jax.jit(lambda rng: model.init(rng)["prefix"])  # nothing else is computed
    mlp = mlp_of({"prefix": draw(jax.random.key(0))}, "decoder")
    assert abs(mlp["embedding"].std() - 1) < 0.02
    for layer, inputs in (("hidden", 16), ("out", 100)):
        for leaf in (mlp[f"{layer}/kernel"], mlp[f"{layer}/bias"]):
            assert np.abs(leaf).max() <= inputs**-0.5 and leaf.std() > 0.4 * inputs**-0.5


def test_numbers_of_parameters():
    """GPT-2 medium with 5 slots: 0.07% of 355M parameters, whatever trained them."""
    config = GPT2Config(emb_dim=1024, num_heads=16, mlp_dim=4096, num_layers=24)
    model = Model(config, (Prefix(length=5, mid_dim=512),))

    def own(model):
        return sum(x.size for path, x in flatten(model.shapes()).items() if model.peft_owns(path))

    mlp = 5 * 1024 + (1024 + 1) * 512 + (512 + 1) * 24 * 2 * 1024
    assert own(model) == mlp == 25_744_896
    assert own(model.exported()) == 5 * 24 * 2 * 1024 == 245_760


def test_the_mlp_is_float32_in_a_model_of_bfloat16():
    config = dataclasses.replace(CONFIGS["t5"], dtype="bfloat16", param_dtype="bfloat16")
    model = Model(config, (Prefix(length=3, mid_dim=7),))
    for params in (model.shapes(), jax.eval_shape(model.export, model.shapes())):
        own = [leaf for path, leaf in flatten(params).items() if model.peft_owns(path)]
        assert own and {leaf.dtype for leaf in own} == {jnp.dtype("float32")}


def test_a_predictor_computes_the_mlp_once():
    model = model_of("t5", Prefix(length=3, mid_dim=7), Lora(rank=2))
    params = params_of(model)
    predictor = Predictor(model, params, Words())
    exported, plain = export_of(model, params)
    assert predictor.model == exported
    assert flatten(predictor.params).keys() == flatten(plain).keys()
    names = ("encoder_input_tokens", "encoder_input_mask")
    batch = {name: np.repeat(batch_of()[name], 4, 0) for name in names}
    decoder = Decoder(max_decode_len=4)
    expected = Predictor(exported, plain, Words()).generate(batch, decoder)
    found = predictor.generate(batch, decoder)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=1e-4)
    without = predictor.without("prefix")
    assert without.model == model_of("t5", Lora(rank=2))
    assert flatten(without.params).keys() == flatten(without.model.shapes()).keys()


# --- The start from words


@dataclasses.dataclass(frozen=True)
class Words(Vocabulary):
    """A vocabulary whose words are numbers."""

    pad_id: int = 0
    eos_id: int = 1
    unk_id: int | None = None
    vocab_size: int = 32
    fingerprint: str = "words"

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(str(int(word)) for word in ids)


TOKENS = [4, 17, 9, 30]


def prefix_of(text, **settings):
    settings = {"length": len(TOKENS), "initialization": "text"} | settings
    return Prefix(text=text, vocabulary=Words(), **settings)


def started(model, params):
    """Returns the parameters of the model after export, the prefix's set by their start."""
    params = jax.jit(model.initialize_peft)(jax.random.key(0), params)
    return export_of(model, params)[1]


def with_words(family, text, **settings):
    """Returns a model and parameters, of which all but the prefix's are the same."""
    model = model_of(family, prefix_of(text, **settings))
    params = flatten(random_params(model, seed=1))
    return model, unflatten(params | flatten(params_of(model_of(family))))


def started_of(family, text, **settings):
    return flatten(started(*with_words(family, text, **settings)))


TEXT = " ".join(map(str, TOKENS))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_decoder_only_model_starts_as_if_it_had_read_the_words(family):
    """A window of Llama's leaves the slots behind as it would the words."""
    model = model_of(family, prefix_of(TEXT, counted=True))
    params, batch = params_of(model), batch_of()
    found = logits_of(model.exported(), started(model, params), batch)
    words = np.broadcast_to(np.array(TOKENS, np.int32), (2, len(TOKENS)))
    longer = {
        "encoder_input_tokens": np.concatenate([words, batch["encoder_input_tokens"]], 1),
        "encoder_input_mask": np.pad(
            batch["encoder_input_mask"], [(0, 0), (len(TOKENS), 0)], constant_values=True
        ),
    }
    expected = logits_of(model.without("prefix"), params, batch | longer)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_decoder_starts_as_if_it_had_written_the_words(family):
    """Where its input is these words too; T5's relative positions reach the slots."""
    model = model_of(family, prefix_of(TEXT, counted=True, encoder=False, cross=False))
    params = params_of(model)
    words = np.broadcast_to(np.array(TOKENS, np.int32), (2, len(TOKENS)))
    targets = batch_of()["decoder_input_tokens"]
    batch = {"encoder_input_tokens": words, "decoder_input_tokens": targets}
    found = logits_of(model.exported(), started(model, params), batch)
    batch["decoder_input_tokens"] = np.concatenate([words, targets], 1)
    expected = logits_of(model.without("prefix"), params, batch)[:, len(TOKENS) :]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_the_first_layers_activations_in_numpy(family):
    model = model_of(family, prefix_of(TEXT))
    params = params_of(model)
    p = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(params).items()}
    x = p["token_embedder/embedding"][TOKENS]

    def t5_norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p[f"{name}/scale"]

    def bart_input(stack):
        y = x + p[f"{stack}/position_embedder/embedding"][OFFSET : OFFSET + len(TOKENS)]
        y = y - y.mean(-1, keepdims=True)
        y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5)
        norm = f"{stack}/embedding_layer_norm"
        return y * p[f"{norm}/scale"] + p[f"{norm}/bias"]

    words = np.array([TOKENS], np.int32)
    module = model.config.module(())
    memory, _ = module.apply(
        {"params": params}, {"encoder_input_tokens": words}, method=type(module)._encode
    )
    read = {"encoder_decoder_attention": np.asarray(memory[0], np.float64)}
    if family == "t5":
        read["attention"] = t5_norm(x, "encoder/layers_0/pre_attention_layer_norm")
        read["self_attention"] = t5_norm(x, "decoder/layers_0/pre_self_attention_layer_norm")
    else:
        read |= {"attention": bart_input("encoder"), "self_attention": bart_input("decoder")}
    found = flatten(started(model, params))
    for site, states in read.items():
        attention = f"{'encoder' if site == 'attention' else 'decoder'}/layers_0/{site}"
        for part in ("key", "value"):
            expected = states @ p[f"{attention}/{part}/kernel"]
            expected = expected + p.get(f"{attention}/{part}/bias", 0)
            slots = found[f"{attention}/prefix/{part}"]
            np.testing.assert_allclose(slots, expected.reshape(slots.shape), rtol=0, atol=1e-4)


def test_words_are_cut_or_repeated():
    for text, same in (("4 17 9 30 5 6", TEXT), ("4 17 9", "4 17 9 4"), ("8", "8 8 8 8")):
        assert tree_equal(started_of("gpt2", text), started_of("gpt2", same))
    assert not tree_equal(started_of("gpt2", "4 17 9"), started_of("gpt2", TEXT))


@families
def test_an_mlp_that_is_wide_enough_starts_from_the_words_exactly(family):
    expected = started_of(family, TEXT)
    found = started_of(family, TEXT, mid_dim=len(TOKENS))
    own = [path for path in expected if "/prefix/" in path]
    assert len(own) == (4 if family in ("gpt2", "llama") else 10)
    for path in own:
        assert np.abs(expected[path]).max() > 0.1
        np.testing.assert_allclose(found[path], expected[path], rtol=0, atol=1e-4, err_msg=path)


@pytest.mark.parametrize("mid_dim", [2, 3, 9])
def test_the_last_layer_is_the_least_squares_solution(mid_dim):
    model, params = with_words("gpt2", "4 17 9 30 5 6", length=6, mid_dim=mid_dim)
    mlp = mlp_of(jax.jit(model.initialize_peft)(jax.random.key(0), params), "decoder")
    before = mlp_of(params, "decoder")
    for path in ("embedding", "hidden/kernel", "hidden/bias"):
        np.testing.assert_array_equal(mlp[path], before[path])
    plain = started_of("gpt2", "4 17 9 30 5 6", length=6)
    slots = [
        [plain[f"decoder/layers_{i}/self_attention/prefix/{part}"] for part in ("key", "value")]
        for i in range(2)
    ]
    wanted = np.moveaxis(np.array(slots, np.float64), 2, 0).reshape(6, -1)
    hidden = np.tanh(mlp["embedding"] @ mlp["hidden/kernel"] + mlp["hidden/bias"])
    inputs = np.concatenate([hidden, np.ones((6, 1))], 1).astype(np.float64)
    solution, *_ = np.linalg.lstsq(inputs, wanted, rcond=None)
    np.testing.assert_allclose(
        mlp["out/kernel"].reshape(mid_dim, -1), solution[:-1], rtol=0, atol=1e-3
    )
    np.testing.assert_allclose(mlp["out/bias"].reshape(-1), solution[-1], rtol=0, atol=1e-3)
    residual = np.abs(inputs @ solution - wanted).max()
    assert (residual < 1e-6) == (mid_dim >= 6)


def test_remat_does_not_hide_the_words():
    config = dataclasses.replace(CONFIGS["t5"], remat="full")
    model = model_of("t5", prefix_of(TEXT))
    remat = dataclasses.replace(model, config=config)
    params = params_of(model)
    expected, found = flatten(started(model, params)), flatten(started(remat, params))
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, rtol=0, atol=1e-5, err_msg=path)


def test_what_is_exported_is_plain():
    settings = {"length": 4, "cross": False, "counted": True}
    method = prefix_of(TEXT, mid_dim=5, **settings).exported()
    assert method == Prefix(**settings)
    assert Prefix(**json.loads(json.dumps(dataclasses.asdict(method)))) == method


@pytest.mark.parametrize(
    ("family", "method", "sentence"),
    [
        ("gpt2", Prefix(decoder=False), "decoder-only models need Prefix.decoder=True"),
        ("t5", prefix_of("  "), "has no tokens to start from"),
        ("t5", prefix_of(f"3 {VOCAB}"), f"the token {VOCAB}, but the model has {VOCAB} tokens"),
        ("bart", prefix_of("3", length=33), "33 tokens do not fit into BartConfig.num_positions"),
        ("gpt2", prefix_of("3", length=48), "do not fit into GPT2Config.num_positions=48"),
    ],
)
def test_methods_that_do_not_fit_a_model(family, method, sentence):
    with pytest.raises(UserError, match=sentence):
        model_of(family, method).check()
    model_of("t5", prefix_of("3", length=33, mid_dim=2)).check()


@slow
def test_on_a_mesh_each_device_has_its_heads():
    """In a process of its own, which makes a mesh of 2 x 2 CPU devices."""
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": ":".join(paths),
    }
    command = [sys.executable, str(HERE / "sharded_prefix.py")]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
