"""Meta-batches: batches of one task each, query apart from support, tasks at their rates."""

import collections
import json

import numpy as np
import pytest
from test_loader import VOCABULARY, assert_equal, take

from robust_ft.data import loader
from robust_ft.data.meta_batches import MetaBatch
from robust_ft.errors import UserError

META = MetaBatch(tasks=4, batches=3)


def source(toy, task="toy_ab", rows=4, seed=0, meta=META, **options):
    return loader.train_batches(toy(task), rows, seed, meta=meta, **options)


def episodes(batches):
    """Returns the targets' texts of each task of each meta-batch: [episode][batch][row]."""
    tokens = np.concatenate(
        [np.moveaxis(b["decoder_target_tokens"], 0, 2) for b in batches]
    )  # [episodes, batches, rows, length]
    return [[[VOCABULARY.decode(row) for row in rows] for rows in each] for each in tokens]


def test_shapes_and_one_task_in_a_batch(toy):
    batches = take(source(toy), 5)
    for batch in batches:
        assert batch["encoder_input_tokens"].shape == (4, 4, 3, 40)
        assert batch["decoder_loss_weights"].shape == (4, 4, 3, 12)
        assert batch["encoder_input_mask"].shape == (4, 4, 3, 40)
    for episode in episodes(batches):
        texts = [text for rows in episode for text in rows]
        assert len({text[0] for text in texts}) == 1, "one task"
        assert len(set(texts)) == len(texts), "no example twice"


def test_tasks_come_at_the_mixtures_rates(toy):
    found = collections.Counter(e[0][0][0] for e in episodes(take(source(toy), 40)))
    assert found == {"a": 120, "b": 40}


def test_an_epoch_has_each_example_once_and_the_next_another_order(toy):
    """50 examples in episodes of 12: 48 an epoch, and another 2 are left out each time."""
    texts = [t for e in episodes(take(source(toy, "toy_a"), 4)) for rows in e for t in rows]
    epochs = [texts[i : i + 48] for i in range(0, 192, 48)]
    assert all(len(set(epoch)) == 48 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len({frozenset(epoch) for epoch in epochs}) > 1


def test_small_tasks_repeat_support_but_never_the_query(toy):
    """7 examples, batches of 3: 4 are left for two support batches."""
    for support, again, query in episodes(take(source(toy, "toy_c", rows=3), 20)):
        assert len(set(support)) == len(set(again)) == len(set(query)) == 3
        assert not set(query) & {*support, *again}
        assert set(support) != set(again)


@pytest.mark.parametrize(
    ("rows", "batches", "needed"), [(4, 2, "a support batch .* of 4 each need 8"), (8, 1, "8")]
)
def test_too_few_examples_are_refused(toy, rows, batches, needed):
    with pytest.raises(UserError, match=rf"'toy_c' has 7 examples .*{needed}"):
        source(toy, "toy_nested", rows=rows, meta=MetaBatch(2, batches))


@pytest.mark.parametrize("count", [2, 4])
def test_shards_together_are_the_meta_batch_of_one(toy, count):
    whole = take(source(toy), 6)
    parts = [take(source(toy, shard=(i, count)), 6) for i in range(count)]
    joined = [
        {name: np.concatenate([part[step][name] for part in parts]) for name in whole[0]}
        for step in range(6)
    ]
    assert_equal(joined, whole)


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_resumes_exactly(toy, steps):
    first = source(toy, "toy_nested", rows=3)
    take(first, steps)
    state = json.loads(json.dumps(first.get_state()))
    second = source(toy, "toy_nested", rows=3)
    second.set_state(state)
    assert_equal(take(second, 5), take(first, 5))
    with pytest.raises(UserError, match="meta"):
        source(toy, "toy_nested", rows=3, meta=MetaBatch(4, 2)).set_state(state)


def test_examples_and_task_indices_of_a_meta_batch(toy):
    batches = source(toy, task_index={"toy_a": 0, "toy_b": 1}.__getitem__)
    batch = next(batches)
    assert batch["task_index"].shape == (4, 4, 3)
    assert len(batches.named(batches.examples)) == 48
