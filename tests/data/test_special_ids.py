"""Batches of a vocabulary whose padding is not 0 and whose texts stand between special tokens."""

import dataclasses

import numpy as np
import pytest
from tiny_vocabularies import write_bart, write_bpe

from robust_ft.data import cache, loader, records
from robust_ft.decoder_start import DecoderStart
from robust_ft.errors import UserError
from robust_ft.vocabulary import encode_inputs, encode_targets, vocabulary_from_directory

BART_START = 2


@pytest.fixture(scope="module")
def bart(tmp_path_factory):
    return vocabulary_from_directory(write_bart(tmp_path_factory.mktemp("bart")))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return vocabulary_from_directory(write_bpe(tmp_path_factory.mktemp("gpt2")))


def padded(ids, length, pad_id):
    return [*ids, *[pad_id] * (length - len(ids))]


def expected(vocabulary, start_id, inputs_text, targets_text, inputs_length, targets_length):
    """Returns one row of a batch, written down anew."""
    pad_id = vocabulary.pad_id
    inputs = encode_inputs(vocabulary, inputs_text, inputs_length)
    targets = encode_targets(vocabulary, targets_text, targets_length)
    row = padded(targets, targets_length, pad_id)
    return {
        "encoder_input_tokens": padded(inputs, inputs_length, pad_id),
        "encoder_input_mask": padded([True] * len(inputs), inputs_length, False),
        "decoder_input_tokens": [start_id, *row[:-1]],
        "decoder_target_tokens": row,
        "decoder_loss_weights": padded([1.0] * len(targets), targets_length, 0.0),
    }


@pytest.mark.parametrize("family", ["bart", "gpt2"])
def test_evaluation_batches(toy, family, request):
    vocabulary = request.getfixturevalue(family)
    data = toy("toy_a", split="validation", vocabulary=vocabulary)
    examples = loader.eval_examples(data)
    assert [e.targets_text for e in examples] == [f"a{i}" for i in range(9)]
    assert examples[3].inputs[-1] == (vocabulary.eos_id if family == "bart" else ord("x") - 33)
    for batch in loader.eval_batches(examples, 4, 40, pad_id=vocabulary.pad_id):
        for row, index in enumerate(batch["example_index"]):
            if index < 0:
                assert set(batch["encoder_input_tokens"][row]) == {vocabulary.pad_id}
                assert not batch["encoder_input_mask"][row].any()
                continue
            texts = (examples[index].inputs_text, examples[index].targets_text)
            wanted = expected(vocabulary, BART_START, *texts, 40, 12)
            for name in ("encoder_input_tokens", "encoder_input_mask"):
                assert batch[name][row].tolist() == wanted[name]


def test_training_batches(toy, bart):
    data = toy("toy_a", vocabulary=bart)
    batch = next(loader.train_batches(data, 8, seed=0, start=DecoderStart(BART_START)))
    for row in range(8):
        inputs = bart.decode(batch["encoder_input_tokens"][row])
        targets = bart.decode(batch["decoder_target_tokens"][row])
        assert inputs.startswith(f"a train {targets[1:]} ")
        for name, value in expected(bart, BART_START, inputs, targets, 40, 12).items():
            assert batch[name][row].tolist() == value
    # Another start is another batch of the same cache.
    other = next(loader.train_batches(data, 8, seed=0, start=DecoderStart(0)))
    assert set(other["decoder_input_tokens"][:, 0]) == {0}
    np.testing.assert_array_equal(other["decoder_target_tokens"], batch["decoder_target_tokens"])


@pytest.mark.parametrize("family", ["bart", "gpt2"])
def test_packed_batches(toy, family, request):
    vocabulary = request.getfixturevalue(family)
    data = toy("toy_a", vocabulary=vocabulary, inputs_length=80, targets_length=30)
    source = loader.train_batches(data, 4, seed=0, packing=True, start=DecoderStart(7))
    batch = next(source)
    source.close()
    segments = batch["decoder_segment_ids"]
    assert segments.max() > 1 and not segments.all()
    np.testing.assert_array_equal(batch["decoder_loss_weights"], segments > 0)
    for side, name in (("encoder", "encoder_input_tokens"), ("decoder", "decoder_target_tokens")):
        padding = batch[name][batch[f"{side}_segment_ids"] == 0]
        assert set(padding.tolist()) == {vocabulary.pad_id}
    for row, segment in [(r, s) for r in range(4) for s in range(1, segments[r].max() + 1)]:
        place = segments[row] == segment
        targets = batch["decoder_target_tokens"][row][place]
        assert batch["decoder_input_tokens"][row][place].tolist() == [7, *targets[:-1]]
        text = vocabulary.decode(targets)
        assert targets.tolist() == encode_targets(vocabulary, text)
        inputs = batch["encoder_input_tokens"][row][batch["encoder_segment_ids"][row] == segment]
        assert inputs.tolist() == encode_inputs(vocabulary, vocabulary.decode(inputs))


def test_a_target_continues_its_input(toy, gpt2):
    data = toy("toy_a", vocabulary=gpt2)
    for read, (inputs, targets), decoder_inputs in _examples(
        data, DecoderStart(99, continues=True)
    ):
        assert read == inputs[:-1]
        assert decoder_inputs == [inputs[-1], *targets[:-1]]


def _examples(data, start):
    """Yields each example's (encoder's tokens, (inputs, targets), decoder's inputs)."""
    tokenized = {
        tuple(encode_targets(data.vocabulary, e.targets_text)): e.inputs.tolist()
        for e in loader.eval_examples(data)
    }
    for packing in (False, True):
        wide = dataclasses.replace(data, inputs_length=80, targets_length=30) if packing else data
        source = loader.train_batches(wide, 4, seed=0, packing=packing, start=start)
        batch = next(source)
        source.close()
        shape = batch["decoder_target_tokens"].shape
        segments = batch.get("decoder_segment_ids", batch["decoder_loss_weights"].astype(int))
        inner = batch.get("encoder_segment_ids", batch.get("encoder_input_mask", 0) * 1)
        assert (segments.max() > 1) == packing
        for row, segment in np.ndindex(shape[0], segments.max() + 1):
            place = segments[row] == segment
            if segment == 0 or not place.any():
                continue
            targets = batch["decoder_target_tokens"][row][place].tolist()
            read = batch["encoder_input_tokens"][row][inner[row] == segment].tolist()
            yield (
                read,
                (tokenized[tuple(targets)], targets),
                batch["decoder_input_tokens"][row][place].tolist(),
            )


def test_inputs_of_one_token_and_of_none():
    empty, one, two = (np.array(ids, np.int32) for ids in ([], [4], [6, 5]))
    targets = [np.array([7, 1])] * 3
    start = DecoderStart(9, continues=True)
    batch = records.model_batch([empty, one, two], targets, 3, 2, pad_id=5, start=start)
    assert batch["decoder_input_tokens"].tolist() == [[9, 7], [4, 7], [5, 7]]
    assert batch["encoder_input_mask"].tolist() == [[False] * 3, [False] * 3, [True, False, False]]
    assert batch["encoder_input_tokens"][2].tolist() == [6, 5, 5]


def test_weights_tell_padding_by_its_place():
    # Here EOS (5) is also the padding, and 5 occurs in the middle of a target too.
    targets = [np.array([5, 4, 5]), np.array([5])]
    batch = records.model_batch(targets, targets, 3, 4, rows=3, pad_id=5, start=DecoderStart(9))
    assert batch["decoder_loss_weights"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert batch["decoder_input_tokens"].tolist() == [[9, 5, 4, 5], [9, 5, 5, 5], [9, 5, 5, 5]]


def test_long_texts_keep_what_stands_around_them(toy, bart):
    data = toy("toy_a", vocabulary=bart, inputs_length=6, targets_length=3)
    [cached] = cache.ensure(data)
    assert cached.info.num_truncated == {"inputs": 50, "targets": 50}
    for e in loader.eval_examples(data):
        assert len(e.inputs) == 6 and (e.inputs[0], e.inputs[-1]) == (0, 2)
        assert len(e.targets) == 3 and (e.targets[0], e.targets[-1]) == (0, 2)


def test_a_task_without_eos_on_inputs_keeps_the_start(toy, bart):
    for e in loader.eval_examples(toy("toy_no_eos", vocabulary=bart)):
        assert e.inputs[0] == 0 and e.inputs[-1] != 2


def test_lengths_that_leave_no_place(toy, bart):
    with pytest.raises(UserError, match="inputs_length of task 'toy_a' is 2, which leaves no"):
        cache.ensure(toy("toy_a", vocabulary=bart, inputs_length=2))


def test_cache_depends_on_what_stands_around(toy, bart):
    other = dataclasses.replace(bart, input_prefix=())
    assert cache.directory(toy(vocabulary=bart)) != cache.directory(toy(vocabulary=other))


@pytest.mark.parametrize("family", ["bart", "gpt2"])
def test_predictor_reads_texts_as_training_did(toy, family, request):
    vocabulary = request.getfixturevalue(family)
    examples = loader.eval_examples(toy("toy_b", split="validation", vocabulary=vocabulary))
    # `Predictor` encodes texts with `encode_inputs`; the cache has to hold the same ids.
    encoded = [encode_inputs(vocabulary, example.inputs_text, 40) for example in examples]
    assert encoded == [example.inputs.tolist() for example in examples]
