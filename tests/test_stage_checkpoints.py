"""Checkpoints of a stage, and the outcome that names the selected one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from robust_ft.errors import UserError
from robust_ft.optim import Adafactor, AdamW, Schedule
from robust_ft.outcome import Outcome
from robust_ft.restore import load_params
from robust_ft.stage_checkpoints import StageCheckpoints
from robust_ft.train_step import TrainState, init_state

OPTIMIZER = AdamW(Schedule(0.1), clip_norm=1.0)


def make_state(step, optimizer=OPTIMIZER, size=4):
    """Returns a state whose every leaf tells its step."""
    params = {"a": {"kernel": jnp.full((size, 3), step, jnp.float32)}, "b": jnp.full(2, step)}
    state = init_state(optimizer, jax.tree.map(lambda x: x.astype(jnp.float32), params))
    state = jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), state)
    return state._replace(step=jnp.asarray(step, jnp.int32))


def save(folder, scores):
    """Saves {step: score}, waiting after each as a run's evaluations do."""
    checkpoints = StageCheckpoints(folder)
    for step, score in scores.items():
        checkpoints.save(make_state(step), {"position": step}, score)
        checkpoints._manager.wait_until_finished()
    checkpoints.close()


def kept(folder):
    return sorted(int(path.name.removeprefix("checkpoint_")) for path in folder.glob("check*"))


@pytest.mark.parametrize("optimizer", [OPTIMIZER, Adafactor(Schedule(0.1))])
def test_round_trip(tmp_path, optimizer):
    state = make_state(3, optimizer)
    checkpoints = StageCheckpoints(tmp_path)
    assert checkpoints.restore(state) is None and checkpoints.best_step() is None
    checkpoints.save(state, {"position": 7, "nested": {"x": [1, "y"]}}, 5.0)
    checkpoints.close()
    restored, data = StageCheckpoints(tmp_path).restore(make_state(0, optimizer))
    assert isinstance(restored, TrainState) and data == {"position": 7, "nested": {"x": [1, "y"]}}
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for left, right in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert left.dtype == right.dtype and left.sharding == right.sharding
        np.testing.assert_array_equal(left, right)


def test_newest_state_and_parameters_of_any_step(tmp_path):
    save(tmp_path, {2: 9.0, 4: 1.0})
    checkpoints = StageCheckpoints(tmp_path)
    like = make_state(0)
    state, data = checkpoints.restore(like)
    assert int(state.step) == 4 and data == {"position": 4}
    best = checkpoints.restore_params(2, like.trainable)
    toy.assert_same(toy.flat(best), toy.flat(make_state(2).trainable))
    # The same from the outside, without a state to compare with.
    outside = load_params(str(tmp_path / "checkpoint_2"))
    assert all(type(array) is np.ndarray for array in outside.values())
    toy.assert_same(outside, toy.flat(make_state(2).trainable))


@pytest.mark.parametrize(
    ("scores", "best", "left"),
    [
        ({2: 5.0, 4: 7.0, 6: 7.0, 8: 1.0}, 4, [4, 8]),
        ({2: 7.0, 4: 5.0, 6: 6.0}, 2, [2, 6]),
        ({2: 0.0, 4: 0.0}, 2, [2, 4]),
        ({2: -1.0, 4: -3.0}, 2, [2, 4]),
        ({2: float("nan"), 4: 1.0, 6: float("nan")}, 4, [4, 6]),
        ({2: None, 4: None}, None, [4]),
        # Saved on SIGTERM, without evaluation.
        ({2: 1.0, 3: None, 4: 0.5}, 2, [2, 4]),
        ({2: 1.0, 3: None}, 2, [2, 3]),
    ],
)
def test_best_and_newest_are_kept(tmp_path, scores, best, left):
    save(tmp_path, scores)
    assert kept(tmp_path) == left
    checkpoints = StageCheckpoints(tmp_path)
    assert checkpoints.best_step() == best
    assert all(str(checkpoints.score(step)) == str(scores[step]) for step in left)


def test_best_is_remembered_over_restarts(tmp_path):
    save(tmp_path, {2: 9.0, 4: 1.0})
    save(tmp_path, {6: 3.0})
    save(tmp_path, {8: 9.0})
    assert kept(tmp_path) == [2, 8]
    assert StageCheckpoints(tmp_path).best_step() == 2


def test_a_half_written_checkpoint_is_none(tmp_path):
    save(tmp_path, {2: 1.0})
    whole = tmp_path / "checkpoint_2"
    torn = tmp_path / "checkpoint_4.orbax-checkpoint-tmp"
    (torn / "params").mkdir(parents=True)
    (torn / "params" / "d").write_text("torn")
    state, _ = StageCheckpoints(tmp_path).restore(make_state(0))
    assert int(state.step) == 2 and whole.is_dir() and not torn.exists()


def test_a_state_that_does_not_fit(tmp_path):
    save(tmp_path, {2: 1.0})
    checkpoints = StageCheckpoints(tmp_path)
    with pytest.raises(UserError, match=r"step 2 .* \(a/kernel: \(4, 3\), now \(5, 3\)\)"):
        checkpoints.restore(make_state(0, size=5))
    more = make_state(0)
    more = more._replace(trainable={**more.trainable, "c": jnp.ones(1)})
    with pytest.raises(UserError, match=r"\(c: none, now \(1,\)\)"):
        checkpoints.restore(more)
    with pytest.raises(UserError, match="was saved with another optimizer; go on with"):
        checkpoints.restore(make_state(0, Adafactor(Schedule(0.1))))


def test_outcome_round_trip(tmp_path):
    assert Outcome.read(tmp_path) is None
    outcome = Outcome(4, None, ("a", "b/c"), steps=6)
    outcome.write(tmp_path)
    assert Outcome.read(tmp_path) == outcome
    save(tmp_path, {4: 1.0})
    assert outcome.load(tmp_path).keys() == {"a", "b"}
