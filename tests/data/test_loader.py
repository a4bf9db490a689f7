"""The loader: order, epochs, mixing, shards, packing, and resuming exactly anywhere."""

import collections
import itertools
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robust_ft.data import loader, mixing
from robust_ft.errors import UserError
from robust_ft.vocabulary import ByteVocabulary

VOCABULARY = ByteVocabulary()
PAIRED = [
    "encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights",
]  # fmt: skip
FEATURES = [PAIRED[0], "encoder_input_mask", *PAIRED[1:]]
PACKED = ["encoder_segment_ids", "decoder_segment_ids"]
quick = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def take(source, count):
    """Returns the next `count` batches."""
    return [next(source) for _ in range(count)]


def targets(batches):
    """Returns the target texts of unpacked batches, row by row."""
    return [VOCABULARY.decode(row) for batch in batches for row in batch["decoder_target_tokens"]]


def packed_examples(batches):
    """Returns (input text, target text) of every segment of packed batches, row by row."""
    found = []
    for batch in batches:
        for row in range(len(batch["encoder_input_tokens"])):
            for segment in range(1, batch["decoder_segment_ids"][row].max() + 1):
                inputs = batch["encoder_input_tokens"][row][
                    batch["encoder_segment_ids"][row] == segment
                ]
                answer = batch["decoder_target_tokens"][row][
                    batch["decoder_segment_ids"][row] == segment
                ]
                assert inputs[-1] == answer[-1] == VOCABULARY.eos_id
                found.append((VOCABULARY.decode(inputs), VOCABULARY.decode(answer)))
    return found


def assert_equal(left, right):
    """Asserts that two lists of batches are bit for bit the same."""
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_features_of_a_batch(toy):
    [batch] = take(loader.train_batches(toy(), 8, seed=0), 1)
    assert list(batch) == FEATURES
    assert {name: array.dtype for name, array in batch.items()} == {
        **dict.fromkeys(FEATURES, np.int32), "decoder_loss_weights": np.float32,
        "encoder_input_mask": np.bool_,
    }  # fmt: skip
    assert batch["encoder_input_tokens"].shape == (8, 40)
    for row in range(8):
        wanted = batch["decoder_target_tokens"][row]
        length = np.flatnonzero(wanted)[-1] + 1
        assert wanted[length - 1] == VOCABULARY.eos_id and (wanted[:length] > 0).all()
        assert batch["decoder_input_tokens"][row].tolist() == [0, *wanted[:-1]]
        assert batch["decoder_loss_weights"][row].tolist() == [1] * length + [0] * (12 - length)
        text = VOCABULARY.decode(batch["encoder_input_tokens"][row])
        number = VOCABULARY.decode(wanted).removeprefix("a")
        assert text == f"a train {number} " + "x" * (int(number) * 7 % 23)


def test_every_epoch_has_all_examples_in_another_order(toy):
    seen = targets(take(loader.train_batches(toy(), 5, seed=3), 30))
    epochs = [seen[:50], seen[50:100], seen[100:]]
    assert all(sorted(epoch) == sorted(f"a{i}" for i in range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_order_is_a_function_of_the_seed(toy):
    first = take(loader.train_batches(toy(), 8, seed=1), 12)
    assert_equal(first, take(loader.train_batches(toy(), 8, seed=1), 12))
    # Another seed is another order in every epoch: seed 2 does not begin with seed 1's second.
    other = targets(take(loader.train_batches(toy(), 50, seed=2), 1))
    epochs = targets(take(loader.train_batches(toy(), 50, seed=1), 3))
    assert all(other != epochs[start : start + 50] for start in (0, 50, 100))
    # And batches of another size go through the same order.
    assert targets(take(loader.train_batches(toy(), 25, seed=1), 6)) == epochs


@pytest.mark.parametrize("task", ["toy_b", "toy_ab"])
@pytest.mark.parametrize("count", [2, 4])
def test_shards_are_parts_of_the_one_batch(toy, task, count):
    whole = take(loader.train_batches(toy(task), 8, seed=1), 10)
    parts = [
        take(loader.train_batches(toy(task), 8, seed=1, shard=(index, count)), 10)
        for index in range(count)
    ]
    stacked = [
        {name: np.concatenate([batch[name] for batch in batches]) for name in FEATURES}
        for batches in zip(*parts, strict=True)
    ]
    assert_equal(stacked, whole)


def test_packed_shards_are_disjoint_and_complete(toy):
    # Blocks of 64 examples go to the shards in turn.
    order = targets(take(loader.train_batches(toy("toy_b"), 1, seed=0), 64 * 10))
    blocks = [order[start : start + 64] for start in range(0, len(order), 64)]
    for index in range(2):
        source = loader.train_batches(toy("toy_b"), 4, 0, packing=True, shard=(index, 2))
        seen = [answer for _, answer in packed_examples(take(source, 64))]
        expected = [answer for block in blocks[index::2] for answer in block]
        # 128 rows are two rounds of 64 open rows, and a round takes the next examples whole.
        assert collections.Counter(seen) == collections.Counter(expected[: len(seen)])
        assert len(seen) > 128


def test_mixture_keeps_its_rates(toy):
    seen = targets(take(loader.train_batches(toy("toy_ab"), 8, seed=0), 50))
    for count in (8, 100, 400):  # at any point, not only in the long run
        share = sum(text.startswith("a") for text in seen[:count])
        assert abs(share - 0.75 * count) <= 1
    # Each of them goes through its own examples, epoch by epoch.
    ours = [text for text in seen if text.startswith("a")]
    assert sorted(ours[:50]) == sorted(ours[50:100]) == sorted(f"a{i}" for i in range(50))
    nested = collections.Counter(
        text[0] for text in targets(take(loader.train_batches(toy("toy_nested"), 12, seed=0), 50))
    )
    assert [abs(nested[task] - n) <= 2 for task, n in (("a", 300), ("b", 100), ("c", 200))]


def test_rows_say_which_task_they_are_of(toy):
    index = {"toy_a": 7, "toy_b": 2, "toy_c": 5}
    for task in ("toy_a", "toy_nested"):
        source = loader.train_batches(toy(task), 8, seed=0, task_index=index.__getitem__)
        batches = take(source, 10)
        assert list(batches[0]) == [*FEATURES, "task_index"]
        assert all(b["task_index"].dtype == np.int32 for b in batches)
        found = np.concatenate([b["task_index"] for b in batches])
        assert found.tolist() == [index[f"toy_{text[0]}"] for text in targets(batches)]
        # Nothing else changes, and shards have their part of it.
        plain = take(loader.train_batches(toy(task), 8, seed=0), 10)
        assert_equal([{name: b[name] for name in FEATURES} for b in batches], plain)
        shard = loader.train_batches(
            toy(task), 8, seed=0, shard=(1, 2), task_index=index.__getitem__
        )
        np.testing.assert_array_equal(next(shard)["task_index"], found[4:8])
    assert set(found) == {7, 2, 5}


def test_tasks_without_an_index(toy):
    def task_index(task):
        raise UserError(f"no prompt for {task}")

    with pytest.raises(UserError, match="no prompt for toy_a"):
        loader.train_batches(toy("toy_ab"), 8, seed=0, task_index=task_index)
    with pytest.raises(UserError, match="Packed rows hold examples of several tasks"):
        loader.train_batches(toy("toy_ab"), 8, seed=0, packing=True, task_index=task_index)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9), st.integers(0, 10**12))
@settings(max_examples=60, deadline=None)
def test_mixed_order_counts_every_task_up(rates, start):
    order = mixing.MixedOrder(rates)
    following = collections.defaultdict(set)
    for index in range(start, start + 60):
        task, number = order[index]
        following[task].add(number)
        # Off by one at most a level of the tree.
        assert abs(number - rates[task] / sum(rates) * index) < 5 + 1e-9 * index
    for numbers in following.values():
        assert sorted(numbers) == list(range(min(numbers), min(numbers) + len(numbers)))


def test_packed_rows_hold_whole_examples(toy):
    source = loader.train_batches(toy("toy_b"), 8, seed=0, packing=True)
    batches = take(source, 20)
    assert list(batches[0]) == PAIRED + PACKED
    assert all(batch[name].dtype == np.int32 for batch in batches for name in PACKED)
    for inputs, answer in packed_examples(batches):
        number = int(answer.removeprefix("b"))
        assert inputs == f"b train {number} " + "x" * (number * 7 % 23)
    for batch in batches:
        for side, tokens in (
            ("encoder", "encoder_input_tokens"),
            ("decoder", "decoder_target_tokens"),
        ):
            segments = batch[f"{side}_segment_ids"]
            np.testing.assert_array_equal(segments > 0, batch[tokens] > 0)
            for row in range(8):
                sizes = np.bincount(segments[row])[1:]
                expected = np.repeat(np.arange(len(sizes)) + 1, sizes)
                np.testing.assert_array_equal(segments[row][: len(expected)], expected)
        weights = batch["decoder_loss_weights"]
        np.testing.assert_array_equal(weights, batch["decoder_segment_ids"] > 0)
        segments = batch["decoder_segment_ids"]
        starts = np.diff(segments, axis=1, prepend=0) != 0  # of segments, and of the padding
        shifted = np.roll(batch["decoder_target_tokens"], 1, axis=1)
        np.testing.assert_array_equal(batch["decoder_input_tokens"], np.where(starts, 0, shifted))
    fill = np.mean([(batch["encoder_input_tokens"] > 0).mean() for batch in batches])
    assert fill > 0.8


def test_packing_loses_nothing(toy):
    # Two rounds of 64 open rows take the first so many examples, each of 7 as often as the others.
    source = loader.train_batches(toy("toy_c"), 32, seed=0, packing=True)
    count = collections.Counter(answer for _, answer in packed_examples(take(source, 4)))
    assert len(count) == 7 and sum(count.values()) > 128
    assert max(count.values()) - min(count.values()) <= 1


def real_lengths(batches):
    """Returns the tokens of each row's inputs, by batch."""
    return [(batch["encoder_input_tokens"] > 0).sum(axis=1) for batch in batches]


@pytest.mark.parametrize("count", [1, 2])
def test_batches_by_length_have_the_same_examples_and_less_padding(toy, count):
    window, rows = 5, 10  # a window is half an epoch of 100
    plain = take(loader.train_batches(toy("toy_ab"), rows, seed=2), 2 * window)
    parts = [
        take(loader.train_batches(toy("toy_ab"), rows, 2, shard=(i, count), by_length=window), 10)
        for i in range(count)
    ]
    for batches in zip(*parts, strict=True):  # a step's shape is the same everywhere
        assert len({batch["encoder_input_tokens"].shape for batch in batches}) == 1
    for start in (0, window):
        chosen = slice(start, start + window)
        seen = [text for part in parts for text in targets(part[chosen])]
        assert sorted(seen) == sorted(targets(plain[chosen]))
        lengths = [np.concatenate(group) for group in zip(*map(real_lengths, parts), strict=True)]
        ends = sorted((group.min(), group.max()) for group in lengths[chosen])
        assert all(last <= first for (_, last), (first, _) in itertools.pairwise(ends))
        assert [group.max() for group in lengths[chosen]] != sorted(e for _, e in ends)
    shapes = {batch["encoder_input_tokens"].shape[1] for batch in parts[0]}
    assert shapes <= {5, 10, 20, 40} and len(shapes) > 1
    for batch in parts[0]:
        width = batch["encoder_input_tokens"].shape[1]
        assert batch["decoder_input_tokens"].shape[1] == -(-12 * width // 40)


def test_rows_by_length_say_which_task_they_are_of(toy):
    index = {"toy_a": 3, "toy_b": 8}.__getitem__
    for batch in take(loader.train_batches(toy("toy_ab"), 6, 0, by_length=4, task_index=index), 8):
        tags = [3 if text.startswith("a") else 8 for text in targets([batch])]
        assert batch["task_index"].tolist() == tags


@given(
    st.sampled_from(["toy_a", "toy_b", "toy_ab"]),
    st.sampled_from([{}, {"packing": True}, {"by_length": 3}]),
    st.sampled_from([(0, 1), (1, 2)]),
    st.integers(0, 40),
    st.integers(0, 3),
)
@quick
def test_resuming_is_exact_after_any_batch(toy, task, option, shard, steps, read_on):
    def source():
        return loader.train_batches(toy(task), 6, seed=5, shard=shard, **option)

    first = source()
    take(first, steps)
    state = json.loads(json.dumps(first.get_state()))
    expected = take(first, 5)
    second = source()
    take(second, read_on)  # a used source can go back or on, too
    second.set_state(state)
    assert second.get_state() == state
    assert_equal(take(second, 5), expected)
    first.set_state(state)
    assert_equal(take(first, 5), expected)
    first.close()
    second.close()


def test_position_holds_for_another_number_of_shards(toy):
    whole = loader.train_batches(toy("toy_ab"), 8, seed=1)
    take(whole, 7)
    half = loader.train_batches(toy("toy_ab"), 8, seed=1, shard=(1, 2))
    half.set_state(whole.get_state())
    np.testing.assert_array_equal(
        next(half)["encoder_input_tokens"], next(whole)["encoder_input_tokens"][4:]
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"batch_size": 4}, "its batch_size is 8, but this run's is 4"),
        ({"seed": 1}, "its seed is 0, but this run's is 1"),
        ({"packing": True}, "its packing is False, but this run's is True"),
        ({"by_length": 2}, "its by_length is 0, but this run's is 2"),
        ({"task": "toy_b"}, "its task is 'toy_a', but this run's is 'toy_b'"),
    ],
)
def test_position_of_another_run_is_refused(toy, change, sentence):
    def source(task="toy_a", batch_size=8, seed=0, **options):
        return loader.train_batches(toy(task), batch_size, seed, **options)

    state = source().get_state()
    with pytest.raises(UserError, match=sentence):
        source(**change).set_state(state)


def test_position_in_other_examples_is_refused(toy, toy_folder):
    file = toy_folder / "toy_package" / "files" / "train.jsonl"
    file.parent.mkdir(exist_ok=True)
    states = {}
    for text in ("one", "two"):  # as many examples of as many letters
        file.write_text(json.dumps({"q": text, "a": "1"}) + "\n")
        source = loader.train_batches(toy("toy_files"), 1, seed=0)
        states[text] = source.get_state()
        if text == "one":
            source.close()
    with pytest.raises(UserError, match=r"its content is \{'toy_files': "):
        source.set_state(states["one"])
    del states["two"]["content"]  # of an earlier version
    source.set_state(states["two"])
    source.close()


@pytest.mark.parametrize("option", [{}, {"packing": True}, {"by_length": 3}])
def test_order_does_not_depend_on_the_number_of_workers(toy, monkeypatch, option):
    expected = take(loader.train_batches(toy("toy_ab"), 8, seed=3, **option), 20)
    many = loader.grain.ReadOptions(num_threads=8, prefetch_buffer_size=32)
    monkeypatch.setattr(loader, "_READ_AHEAD", many)
    assert_equal(take(loader.train_batches(toy("toy_ab"), 8, seed=3, **option), 20), expected)


def test_batch_and_shard_must_fit(toy):
    with pytest.raises(UserError, match="by_length=-1 is not a number"):
        loader.train_batches(toy(), 4, 0, by_length=-1)
    with pytest.raises(UserError, match="choose packing or by_length"):
        loader.train_batches(toy(), 4, 0, packing=True, by_length=2)
    with pytest.raises(UserError, match="batch of 9 rows cannot be divided into 2"):
        loader.train_batches(toy(), 9, seed=0, shard=(0, 2))
    with pytest.raises(UserError, match="Shard 2 of 2 does not exist"):
        loader.train_batches(toy(), 8, seed=0, shard=(2, 2))


def test_eval_examples_are_in_order(toy):
    examples = loader.eval_examples(toy("toy_b", split="validation"))
    assert [e.targets_text for e in examples] == [f"b{i}" for i in range(9)]
    assert [e.references for e in examples] == [(f"b{i}",) for i in range(9)]
    assert [e.id for e in examples] == list(range(9))
    for e in examples:
        assert e.inputs.dtype == np.int32
        assert e.inputs.tolist() == [*VOCABULARY.encode(e.inputs_text), 1]
        assert e.targets.tolist() == [*VOCABULARY.encode(e.targets_text), 1]
    limited = loader.eval_examples(toy("toy_b", split="validation"), limit=3)
    assert [e.id for e in limited] == [0, 3, 6]
    assert len(loader.eval_examples(toy("toy_b", split="validation"), limit=99)) == 9


def test_mixtures_are_evaluated_by_task(toy):
    with pytest.raises(UserError, match=r"'toy_ab' cannot be evaluated .*: toy_a, toy_b"):
        loader.eval_examples(toy("toy_ab", split="validation"))


def test_eval_batches_end_in_empty_rows(toy):
    examples = loader.eval_examples(toy("toy_b", split="validation"))
    batches = loader.eval_batches(examples, 4, 40)
    assert [b["example_index"].tolist() for b in batches] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, -1, -1, -1],
    ]  # fmt: skip
    assert all(b["encoder_input_tokens"].shape == (4, 40) for b in batches)
    rows = np.concatenate([b["encoder_input_tokens"] for b in batches])
    masks = np.concatenate([b["encoder_input_mask"] for b in batches])
    for row, mask, example in zip(rows, masks, examples, strict=False):
        assert row[mask].tolist() == example.inputs.tolist()
    assert not rows[9:].any() and not masks[9:].any()
    with pytest.raises(ValueError, match="does not fit"):
        loader.eval_batches(examples, 4, 5)
    assert loader.eval_batches([], 4, 5) == []
