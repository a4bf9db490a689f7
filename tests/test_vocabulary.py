"""Our vocabularies against seqio's own for the same files."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_ft.errors import UserError
from robust_ft.vocabulary import (
    ByteVocabulary,
    SentencePieceVocabulary,
    TokenizersVocabulary,
    Vocabulary,
)

TEXTS = (
    "Is it true or false? answer:",
    "Zürich, Łódź and 東京 — 100%",
    "I like <extra_id_0> and <extra_id_1>.",
    "  two  spaces ",
    "",
)


@pytest.fixture(scope="module")
def t5_file():
    """T5's vocabulary file of 32,000 pieces."""
    if "ROBUST_FT_DATA_DIR" not in os.environ:
        pytest.skip("needs the real files: ROBUST_FT_DATA_DIR is not set")
    return str(Path(os.environ["ROBUST_FT_DATA_DIR"], "tokenizers", "t5_vocab.model"))


@pytest.fixture
def word_file(tmp_path):
    """A word-level tokenizer.json."""
    import tokenizers

    words = ["<pad>", "</s>", "<unk>", "<extra_id_0>", "the", "capital"]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<extra_id_0>"])
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    return str(file)


def test_bytes_are_seqios():
    seqio = pytest.importorskip("seqio")
    ours, theirs = ByteVocabulary(extra_ids=100), seqio.ByteVocabulary(extra_ids=100)
    assert ours.vocab_size == theirs.vocab_size == 359
    assert (ours.pad_id, ours.eos_id, ours.unk_id) == (theirs.pad_id, theirs.eos_id, theirs.unk_id)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        # Behind EOS, on padding, in the extra ids: nothing.
        assert ours.decode([*ids, 300, 1, 70]) == theirs.decode([*ids, 300, 1, 70]) == text


@given(st.text())
@settings(max_examples=50, deadline=None)
def test_bytes_survive_the_round_trip(text):
    vocabulary = ByteVocabulary()
    assert vocabulary.decode([*vocabulary.encode(text), 1, 0, 0]) == text


@pytest.mark.parametrize("extra_ids", [0, 100])
def test_sentencepiece_is_seqios(t5_file, extra_ids):
    seqio = pytest.importorskip("seqio")
    ours = SentencePieceVocabulary(t5_file, extra_ids)
    theirs = seqio.SentencePieceVocabulary(t5_file, extra_ids)
    assert ours.vocab_size == theirs.vocab_size == 32000 + extra_ids
    assert (ours.pad_id, ours.eos_id, ours.unk_id) == (theirs.pad_id, theirs.eos_id, theirs.unk_id)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == list(theirs.encode(text))
        assert ours.decode([*ids, 1, 5]) == theirs.decode([*ids, 1, 5])
    assert ours.decode([40000]) == theirs.decode([40000])


def test_first_sentinel_is_the_last_id(t5_file):
    vocabulary = SentencePieceVocabulary(t5_file, extra_ids=100)
    assert vocabulary.encode("<extra_id_0> <extra_id_99>") == [32099, 32000]
    assert vocabulary.decode([32099, 1, 32000]) == "<extra_id_0>"


def test_tokenizers(word_file):
    vocabulary = TokenizersVocabulary(word_file)
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)
    assert vocabulary.vocab_size == 6
    assert vocabulary.encode("the capital city") == [4, 5, 2]
    assert vocabulary.decode([0, 3, 4, 5, 1, 4]) == "<extra_id_0> the capital"


def test_all_are_vocabularies_that_hash(word_file):
    vocabularies = {ByteVocabulary(), SentencePieceVocabulary("x"), TokenizersVocabulary(word_file)}
    assert len(vocabularies) == 3
    assert isinstance(ByteVocabulary(), Vocabulary)


def test_fingerprint_depends_on_content_and_settings(word_file, tmp_path):
    assert ByteVocabulary(1).fingerprint != ByteVocabulary(2).fingerprint
    copy = tmp_path / "copy.json"
    copy.write_bytes(Path(word_file).read_bytes())
    fingerprint = TokenizersVocabulary(word_file).fingerprint
    assert TokenizersVocabulary(str(copy)).fingerprint == fingerprint
    assert TokenizersVocabulary(str(copy), unk_token="<u>").fingerprint != fingerprint
    copy.write_bytes(copy.read_bytes() + b"\n")
    assert TokenizersVocabulary(str(copy)).fingerprint != fingerprint


@pytest.mark.parametrize("make", [SentencePieceVocabulary, TokenizersVocabulary])
def test_missing_file_names_the_nearest(make, word_file):
    with pytest.raises(UserError, match=r"does not exist\. Did you mean 'tokenizer.json'\?"):
        _ = make(word_file.replace("tokenizer", "tokeniser")).eos_id
    with pytest.raises(UserError, match=r"folder .* does not exist"):
        _ = make("/nowhere/tokenizer.json").fingerprint


@pytest.mark.parametrize("make", [SentencePieceVocabulary, TokenizersVocabulary])
def test_broken_file(make, tmp_path):
    file = tmp_path / "vocabulary"
    file.write_bytes(b"\xff\xfe no vocabulary")
    with pytest.raises(UserError, match="is not a"):
        _ = make(str(file)).vocab_size


def test_missing_special_token(word_file):
    with pytest.raises(UserError, match=r"no token '<PAD>' \(pad_token\)"):
        _ = TokenizersVocabulary(word_file, pad_token="<PAD>").pad_id
