"""Random directories encode texts as AutoTokenizer does."""

import json

import pytest
from generated import TEXTS, write

from robust_ft.vocabulary import encode_inputs, vocabulary_from_directory

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity
EACH = 20  # directories of a test


def as_it_is(folder):
    """Names the class by which transformers reads a tokenizer.json as we read it anyway."""
    ours = vocabulary_from_directory(folder)
    file = folder / "tokenizer_config.json"
    tokens = {name: getattr(ours, name) for name in ("eos_token", "bos_token", "unk_token")}
    settings = tokens | json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}))


@pytest.mark.parametrize("first", range(0, 400, EACH))
def test_directories(first, tmp_path):
    for seed in range(first, first + EACH):
        folder = tmp_path / str(seed)
        what = write(folder, seed)
        if "digits, GPT2" in what or "digits, Bart" in what:
            as_it_is(folder)
        try:
            theirs = transformers.AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, AttributeError, TypeError):
            continue  # transformers cannot read all that its older versions wrote
        ours = vocabulary_from_directory(folder)
        for text in TEXTS:
            assert encode_inputs(ours, text) == theirs(text).input_ids, (text, what)
            plain = theirs(text, add_special_tokens=False).input_ids
            assert ours.encode(text) == plain, (text, what)
        assert ours.vocab_size == len(theirs), what
        # Without an eos_token config.json's counts, without a pad_token EOS.
        assert theirs.eos_token_id in (None, ours.eos_id), what
        pad = theirs.pad_token_id
        assert ours.pad_id == (ours.eos_id if pad is None else pad), what
