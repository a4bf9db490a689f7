import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import assert_trees_close

from robust_ft.errors import UserError
from robust_ft.optim import Adafactor, AdamW, Schedule, state_axes
from robust_ft.trainable import flatten, unflatten

# --- Schedules, against closed forms written out for each step


def rates(schedule, steps):
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(steps)))


def test_constant_after_warmup():
    np.testing.assert_allclose(rates(Schedule(0.3), 3), [0.3] * 3, rtol=1e-6)
    warm = rates(Schedule(0.4, warmup_steps=4), 6)
    np.testing.assert_allclose(warm, [0.1, 0.2, 0.3, 0.4, 0.4, 0.4], rtol=1e-6)


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_decay_starts_at_the_end_of_warmup_and_arrives_at_0(warmup, decay):
    actual = rates(Schedule(2.0, warmup, decay, decay_steps=12), 15)
    expected = []
    for step in range(15):
        if step < warmup:
            expected.append(2.0 * (step + 1) / warmup)
            continue
        left = max(0.0, (12 - step) / (12 - warmup))
        expected.append(2.0 * (left if decay == "linear" else np.sin(np.pi / 2 * left) ** 2))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    assert actual[warmup] == pytest.approx(2.0) and actual[11] > 0
    np.testing.assert_allclose(actual[12:], 0, atol=1e-6)


def test_rsqrt_is_t5s_once_warmed_up():
    actual = rates(Schedule(1.0, 100, "rsqrt"), 400)
    np.testing.assert_allclose(actual[:100], np.arange(1, 101) / 100, rtol=1e-5)
    np.testing.assert_allclose(actual[99:], (np.arange(100, 401) / 100) ** -0.5, rtol=1e-5)
    np.testing.assert_allclose(rates(Schedule(1.0, 0, "rsqrt"), 9)[8], 1 / 3, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"decay": "cosin"}, "Did you mean 'cosine'"),
        ({"decay": "linear"}, "decay_steps=0"),
        ({"decay": "cosine", "warmup_steps": 5, "decay_steps": 5}, "warmup_steps=5"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
    ],
)
def test_schedules_that_are_none(settings, named):
    with pytest.raises(UserError, match=named):
        Schedule(0.1, **settings)


# --- Adafactor, against the paper's algorithms 4 and 5 with T5's settings, in float64

SHAPES = {
    "factored": (130, 150),
    "wide": (160, 128),
    "square": (128, 128),
    "three": (2, 128, 140),
    "narrow": (127, 300),  # one side below 128: not factored
    "vector": (200,),
    "scalar": (),
}


def rms(x):
    return np.sqrt(np.mean(x**2))


class SlowAdafactor:
    """One leaf; the two largest axes are averaged out if both have at least 128 entries."""

    def __init__(self, shape, rate, scaled, decay, threshold, weight_decay):
        self.rate, self.scaled, self.weight_decay = rate, scaled, weight_decay
        self.decay, self.threshold, self.t = decay, threshold, 0
        self.factored = len(shape) >= 2 and sorted(shape)[-2] >= 128
        self.row = self.column = self.second = 0.0

    def __call__(self, param, grad):
        self.t += 1
        beta = 1 - self.t**-self.decay
        square = grad**2 + 1e-30
        if self.factored:  # the last two axes are the largest ones of all shapes above
            self.row = beta * self.row + (1 - beta) * square.mean(axis=-1, keepdims=True)
            self.column = beta * self.column + (1 - beta) * square.mean(axis=-2, keepdims=True)
            v = self.row * self.column / self.row.mean(axis=-2, keepdims=True)
        else:
            v = self.second = beta * self.second + (1 - beta) * square
        u = grad / np.sqrt(v)
        u = u / max(1.0, rms(u) / self.threshold)
        scale = max(1e-3, rms(param)) if self.scaled else 1.0
        return param - self.rate(self.t - 1) * scale * u - self.weight_decay * param


def problem(shapes, seed=0, steps=5):
    """Returns parameters and five gradients, one of them large and one sparse."""
    rng = np.random.default_rng(seed)
    params = {name: rng.normal(size=shape) * 0.1 for name, shape in shapes.items()}
    gradients = [
        {n: rng.normal(size=s) * rng.uniform(0.1, 3) for n, s in shapes.items()}
        for _ in range(steps)
    ]
    gradients[3] = {n: g * 100 for n, g in gradients[3].items()}
    gradients[4] = {n: np.where(rng.random(g.shape) < 0.5, g, 0) for n, g in gradients[4].items()}
    return params, gradients


def run(optimizer, params, gradients):
    """Returns the parameters after each step."""
    tx = optimizer.build()

    @jax.jit
    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params = {"layer": {n: jnp.asarray(p, jnp.float32) for n, p in params.items()}}
    state, history = tx.init(params), []
    for gradient in gradients:
        gradient = {"layer": {n: jnp.asarray(g, jnp.float32) for n, g in gradient.items()}}
        params, state = step(params, state, gradient)
        history.append(params["layer"])
    return history


def clipped(gradients, limit):
    norms = [np.sqrt(sum(np.sum(g**2) for g in grads.values())) for grads in gradients]
    assert max(norms) > limit
    return [
        {name: g * min(1.0, limit / norm) for name, g in grads.items()}
        for grads, norm in zip(gradients, norms, strict=True)
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"multiply_by_parameter_scale": False, "weight_decay": 1e-2},
        {"clip_norm": 150.0, "decay_rate": 0.6, "clipping_threshold": 0.5, "weight_decay": 1e-5},
    ],
    ids=["T5's finetuning", "prompt tuning", "clipped"],
)
def test_adafactor_is_t5s_step_by_step(settings):
    schedule = Schedule(0.05, warmup_steps=3, decay="linear", decay_steps=8)
    params, gradients = problem(SHAPES)
    params["vector"] *= 1e-4  # its RMS is below the least scale of 1e-3
    history = run(Adafactor(schedule, **settings), params, gradients)
    reference = {
        name: SlowAdafactor(
            shape,
            rate=lambda step: 0.05 * ((step + 1) / 3 if step < 3 else (8 - step) / 5),
            scaled=settings.get("multiply_by_parameter_scale", True),
            decay=settings.get("decay_rate", 0.8),
            threshold=settings.get("clipping_threshold", 1.0),
            weight_decay=settings.get("weight_decay", 0.0),
        )
        for name, shape in SHAPES.items()
    }
    if limit := settings.get("clip_norm"):
        gradients = clipped(gradients, limit)
    for gradient, actual in zip(gradients, history, strict=True):
        expected = {name: reference[name](params[name], gradient[name]) for name in SHAPES}
        # Of what this step changed, at most 1e-4 of the largest change may be wrong.
        change = {n: np.asarray(actual[n], np.float64) - params[n] for n in SHAPES}
        assert_trees_close(
            change, {n: expected[n] - params[n] for n in SHAPES}, rtol=1e-4, atol=1e-6
        )
        params = expected


# --- AdamW


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_adamw_is_pytorchs(clip_norm):
    torch = pytest.importorskip("torch")
    params, gradients = problem({"matrix": (3, 4), "vector": (5,)})
    schedule = Schedule(0.1, warmup_steps=2, decay="cosine", decay_steps=9)
    optimizer = AdamW(schedule, 0.8, 0.95, epsilon=1e-3, weight_decay=0.3, clip_norm=clip_norm)
    history = run(optimizer, params, gradients)
    tensors = {n: torch.nn.Parameter(torch.tensor(p)) for n, p in params.items()}
    reference = torch.optim.AdamW(
        tensors.values(), lr=1.0, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3
    )
    if clip_norm:
        gradients = clipped(gradients, clip_norm)
    for step, (gradient, actual) in enumerate(zip(gradients, history, strict=True)):
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(gradient[name])
        warm = (step + 1) / 2 if step < 2 else (1 + np.cos(np.pi * (step - 2) / 7)) / 2
        reference.param_groups[0]["lr"] = 0.1 * warm
        reference.step()
        assert_trees_close(actual, {n: t.detach().numpy() for n, t in tensors.items()}, rtol=1e-5)


# --- The state


@pytest.mark.parametrize("optimizer", [Adafactor(Schedule(0.1)), AdamW(Schedule(0.1))])
def test_state_of_bfloat16_parameters_is_float32_and_goes_on_moving(optimizer):
    params = {"a": jnp.full((130, 140), 0.5, jnp.bfloat16), "b": jnp.ones(5, jnp.bfloat16)}
    tx = optimizer.build()
    update = jax.jit(tx.update)
    state = tx.init(params)
    for size in [1.0] * 20 + [2.0] * 300:
        gradient = jax.tree.map(lambda p, size=size: jnp.full_like(p, size), params)
        _, state = update(gradient, state, params)
    moments = [leaf for leaf in jax.tree.leaves(state) if jnp.ndim(leaf)]
    assert all(leaf.dtype == jnp.float32 for leaf in moments)
    # All squares were 4 for a long time (the weights of Adam's are 1 - 0.999^320).
    largest = max(float(leaf.max()) for leaf in moments if leaf.size > 1)
    assert largest > 3.5 if isinstance(optimizer, Adafactor) else largest > 1
    updates, _ = update(gradient, state, params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(updates))


def axes_of_state(optimizer, shapes, axes):
    """Returns (shapes, axes) of the optimizer's state, both by the leaf's full path."""
    params = unflatten({p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in shapes.items()})
    state = jax.eval_shape(optimizer.build().init, params)
    found = state_axes(state, params, unflatten(axes))
    is_axes = lambda x: x is None or type(x) is tuple and all(isinstance(a, str) for a in x)  # noqa
    pairs = [
        jax.tree_util.tree_flatten_with_path(tree, is_leaf=leaf)[0]
        for tree, leaf in ((state, None), (found, is_axes))
    ]
    named = [{jax.tree_util.keystr(k): v for k, v in flat} for flat in pairs]
    assert named[0].keys() == named[1].keys()
    return named


FACTORED = {
    "wide": ((128, 300), ("embed", "mlp"), ("embed",), ("mlp",)),
    "tall": ((300, 128), ("mlp", "embed"), ("embed",), ("mlp",)),
    "square": ((128, 128), ("embed", "joined_kv"), ("embed",), ("joined_kv",)),
    "three": ((4, 300, 200), ("a", "b", "c"), ("a", "c"), ("a", "b")),
    "small": ((16, 300), ("embed", "mlp"), None, None),
    "vector": ((300,), ("embed",), None, None),
}


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_axes_of_adafactors_state(clip_norm):
    shapes = {f"encoder/{name}/kernel": entry[0] for name, entry in FACTORED.items()}
    axes = {f"encoder/{name}/kernel": entry[1] for name, entry in FACTORED.items()}
    optimizer = Adafactor(Schedule(0.1), clip_norm=clip_norm)
    state, found = axes_of_state(optimizer, shapes, axes)
    seen = 0
    for path, leaf in state.items():
        name = next((n for n in FACTORED if f"['{n}']" in path), None)
        if name is None:
            assert leaf.shape == () and found[path] is None, path
            continue
        seen += 1
        _, names, row, column = FACTORED[name]
        whole = names if row is None else None
        field = path.split("['encoder']")[0].rsplit(".", 1)[1]
        expected = {"v_row": row, "v_col": column, "v": whole}[field]
        assert found[path] == expected, path
        assert expected is None or len(expected) == len(leaf.shape)
    assert seen == 3 * len(FACTORED)


def test_axes_of_a_square_leaf_are_those_that_optax_keeps():
    # Rows and columns of a square leaf look the same: only their values tell them apart.
    params = {"kernel": jnp.ones((128, 128))}
    tx = Adafactor(Schedule(0.1)).build()
    gradient = {"kernel": jnp.tile(jnp.arange(128.0)[:, None], 128)}
    _, state = jax.jit(tx.update)(gradient, tx.init(params), params)
    flat = jax.tree_util.tree_flatten_with_path(state)[0]
    values = {jax.tree_util.keystr(path): leaf for path, leaf in flat if leaf.shape == (128,)}
    axes = state_axes(state, params, {"kernel": ("rows", "columns")})
    for path, names in jax.tree_util.tree_flatten_with_path(
        axes, is_leaf=lambda x: x in (("rows",), ("columns",))
    )[0]:
        varies = np.std(values[jax.tree_util.keystr(path)]) > 0
        assert names == (("rows",) if varies else ("columns",))
    assert len(values) == 2


def test_axes_of_adamws_state():
    shapes = {"a/kernel": (3, 5), "b/scale": (3,), "b/count": ()}
    axes = {"a/kernel": ("embed", "mlp"), "b/scale": ("embed",), "b/count": ()}
    state, found = axes_of_state(AdamW(Schedule(0.1), clip_norm=1.0), shapes, axes)
    moments = {path: value for path, value in found.items() if "mu" in path or "nu" in path}
    assert len(moments) == 6
    for path, value in moments.items():
        assert value == next(axes[p] for p in axes if path.endswith(f"['{p.split('/')[1]}']"))
    assert all(found[path] is None for path in state.keys() - moments.keys())
    assert flatten({"x": 1}) == {"x": 1}
