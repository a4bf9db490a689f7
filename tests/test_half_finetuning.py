"""Half finetuning against NumPy in float64: who is frozen, for how long, and what the others do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from robust_ft.finite import checked
from robust_ft.half_finetuning import HalfFinetuning
from robust_ft.optim import AdamW, Schedule, apply_updates
from robust_ft.train_step import TrainState
from robust_ft.trainable import flatten, unflatten

RATE, BETAS, EPSILON, DECAY, CLIP = 0.05, (0.8, 0.9), 1e-4, 0.1, 0.7
ADAMW = AdamW(
    Schedule(RATE, decay="linear", decay_steps=20),
    beta1=BETAS[0],
    beta2=BETAS[1],
    epsilon=EPSILON,
    weight_decay=DECAY,
    clip_norm=CLIP,
)
HFT = HalfFinetuning(optimizer=ADAMW, period=3, seed=7)
PATHS = [
    *(f"decoder/layers_{i}/attention/{m}/kernel" for i in (0, 1) for m in ("query", "out")),
    *(f"decoder/layers_{i}/attention/query/bias" for i in (0, 1)),
    *(f"decoder/layers_{i}/mlp/wi/kernel" for i in (0, 1)),
    *(f"decoder/layers_{i}/mlp_norm/scale" for i in (0, 1)),
    "token_embedder/embedding",
    "decoder/decoder_norm/scale",
]
KINDS = {"/attention/": 4, "/mlp/": 2, "/mlp_norm/": 2, "embed": 1, "decoder_norm": 1}
STEPS = 9


def drawn(seed):
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=(2, 3)).astype(np.float32) for path in sorted(PATHS)}


@functools.cache
def trained(optimizer=HFT):
    """Returns the parameters and the optimizer's states before and after each step."""
    tx = optimizer.build()
    params = jax.tree.map(jnp.asarray, unflatten(drawn(0)))
    params["token_embedder"]["embedding"] = jnp.full((2, 3), -0.0)  # stays as it is while frozen
    states = [(params, tx.init(params))]

    @jax.jit
    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return apply_updates(params, updates), state

    for i in range(STEPS):
        states.append(step(*states[-1], unflatten(drawn(1 + i))))
    return states


def frozen_in(step, states):
    """Returns the paths whose bits a step has not changed."""
    before, after = (flatten(states[i][0]) for i in (step, step + 1))
    return {p for p in before if np.asarray(before[p]).tobytes() == np.asarray(after[p]).tobytes()}


def test_half_of_each_kind_is_frozen_for_a_period():
    states = trained()
    choices = [frozen_in(step, states) for step in range(STEPS)]
    for start in range(0, STEPS, HFT.period):
        assert len({frozenset(c) for c in choices[start : start + HFT.period]}) == 1
    assert len({frozenset(choice) for choice in choices}) == 3
    for choice in choices:
        units = {path.rpartition("/")[0] for path in choice}
        assert choice == {path for path in PATHS if path.rpartition("/")[0] in units}
        frozen = {kind: sum(kind in f"{unit}/" for unit in units) for kind in KINDS}
        assert frozen.pop("embed") + frozen.pop("decoder_norm") == 1
        assert frozen == {kind: KINDS[kind] // 2 for kind in frozen}


def test_the_choice_is_a_function_of_seed_and_period():
    paths = tuple(sorted(PATHS))

    def choices(seed, period, steps):
        hft = HalfFinetuning(optimizer=ADAMW, period=period, seed=seed)
        flags = [hft.frozen(paths, jnp.asarray(step)) for step in steps]
        return [frozenset(p for p in paths if frozen[p]) for frozen in flags]

    assert choices(7, 3, [0, 3, 6]) == [frozenset(frozen_in(s, trained())) for s in (0, 3, 6)]
    assert choices(7, 3, [0, 3, 6]) == choices(7, 5, [4, 9, 10])
    assert len(set(choices(7, 1, range(12)))) > 4
    assert choices(7, 1, range(6)) != choices(8, 1, range(6))


def test_the_others_are_updated_by_adam_with_counts_of_their_own():
    states = trained()
    params = {p: np.asarray(x, np.float64) for p, x in flatten(states[0][0]).items()}
    moments = {path: [0.0, 0.0, 0] for path in params}
    for step in range(STEPS):
        frozen = frozen_in(step, states)
        gradient = {p: x.astype(np.float64) for p, x in drawn(1 + step).items() if p not in frozen}
        norm = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
        for path, g in gradient.items():
            m, v, count = moments[path]
            g = g * min(1.0, CLIP / norm)
            m, v, count = BETAS[0] * m + (1 - BETAS[0]) * g, v * BETAS[1], count + 1
            v = v + (1 - BETAS[1]) * g**2
            moments[path] = [m, v, count]
            unit = m / (1 - BETAS[0] ** count)
            unit = unit / (np.sqrt(v / (1 - BETAS[1] ** count)) + EPSILON)
            rate = RATE * (1 - step / 20)  # of the step, whatever was frozen before
            params[path] = params[path] - rate * (unit + DECAY * params[path])
        for path, leaf in flatten(states[step + 1][0]).items():
            np.testing.assert_allclose(leaf, params[path], rtol=0, atol=1e-5, err_msg=path)


def test_what_is_frozen_keeps_its_optimizer_state():
    states = trained()
    paths = sorted(PATHS)
    for step in range(STEPS):
        for path, before, after in zip(
            paths, states[step][1].states, states[step + 1][1].states, strict=True
        ):
            adam = [jax.tree.leaves(state[1][0]) for state in ((0, before), (0, after))]
            same = all(np.array_equal(a, b) for a, b in zip(*adam, strict=True))
            assert same == (path in frozen_in(step, states)), path


def test_a_skipped_step_counts_for_the_period():
    """`Stage.on_nonfinite` = "skip" keeps the optimizer's state, but not its clock."""
    params, state = trained()[0]

    def step(state, frozen, teacher, batch, rng, anchor=None):
        tx = HFT.build()
        gradient = unflatten({path: jnp.asarray(x) for path, x in drawn(1).items()})
        updates, opt_state = tx.update(gradient, state.opt_state, state.trainable)
        trainable = apply_updates(state.trainable, updates)
        return TrainState(state.step + 1, trainable, opt_state), {"loss": batch}

    begun = TrainState(jnp.zeros((), jnp.int32), params, state)
    after, _, _ = jax.jit(checked(step, skip=True))(begun, {}, None, jnp.nan, jax.random.key(0))
    assert int(after.opt_state.clock.count) == 1 == int(after.step)
    kept = jax.tree.leaves((after.trainable, after.opt_state.states[0][0]))
    before = jax.tree.leaves((params, state.states[0][0]))
    assert all(np.array_equal(a, b) for a, b in zip(kept, before, strict=True))


def test_all_or_nothing():
    for share in (0.0, 1.0):
        hft = HalfFinetuning(optimizer=ADAMW, period=3, share=share)
        assert all(bool(held) == bool(share) for held in hft.frozen(tuple(PATHS), 0).values())
