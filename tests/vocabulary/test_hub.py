"""GPT-2's and BART's vocabularies: known ids, nothing lost, bad files."""

import json
import re

import pytest
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny_vocabularies import write_bart, write_bpe

from robust_ft.errors import UserError
from robust_ft.vocabulary import (
    BpeVocabulary,
    TokenizersVocabulary,
    Vocabulary,
    encode_inputs,
    encode_targets,
    vocabulary_from_directory,
)

SPECIAL = ("<s>", "</s>", "<pad>", "<unk>", "<mask>", "<|endoftext|>")
unspecial = st.text().filter(lambda text: not any(token in text for token in SPECIAL))
quick = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def gpt2(folder, **settings):
    return BpeVocabulary(str(folder / "vocab.json"), str(folder / "merges.txt"), **settings)


def test_gpt2s_known_ids(gpt2_directory):
    vocabulary = vocabulary_from_directory(gpt2_directory)
    # From OpenAI's and the hub's documentation.
    assert vocabulary.encode("Hello world") == [15496, 995]
    assert vocabulary.encode(" Hello world") == [18435, 995]
    assert (vocabulary.vocab_size, vocabulary.eos_id, vocabulary.unk_id) == (50257, 50256, None)
    assert vocabulary.pad_id == vocabulary.eos_id  # it has none of its own
    assert encode_inputs(vocabulary, "Hello world") == [15496, 995]
    assert encode_targets(vocabulary, "Hello world") == [15496, 995, 50256]
    assert vocabulary.decode([15496, 995, 50256, 15496]) == "Hello world"


def test_barts_known_ids(bart_directory):
    vocabulary = vocabulary_from_directory(bart_directory)
    assert encode_inputs(vocabulary, "Hello world") == [0, 31414, 232, 2]
    assert encode_targets(vocabulary, " Hello world") == [0, 20920, 232, 2]
    assert vocabulary.vocab_size == 50265 and vocabulary.encode("<mask>") == [50264]
    assert (vocabulary.bos_id, vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (
        0, 1, 2, 3,
    )  # fmt: skip
    assert vocabulary.decode([0, 31414, 232, 1, 1]) == "Hello world"
    # A text that is too long loses its end.
    assert encode_inputs(vocabulary, "Hello world", 3) == [0, 31414, 2]
    # In GPT-2's numbers, not a special token of BART's.
    text = "a <|endoftext|> b"
    assert vocabulary.decode(vocabulary.encode(text)) == text


@pytest.mark.parametrize("name", ["gpt2_directory", "bart_directory"])
def test_no_text_is_lost(name, request):
    vocabulary = vocabulary_from_directory(request.getfixturevalue(name))

    @given(unspecial)
    @example("  two  spaces ")
    @example("é e\u0301 😀👩‍👧 東京\ufeff\u200b\u00a0\x00\r\n\t")
    @example("")
    @quick
    def survives(text):
        ids = vocabulary.encode(text)
        assert vocabulary.decode([*ids, vocabulary.eos_id, 7]) == text
        assert vocabulary.decode([*vocabulary.target_prefix_ids, *ids]) == text

    survives()


def test_added_tokens_follow_in_order(tmp_path):
    folder = write_bpe(tmp_path / "gpt2")
    plain = gpt2(folder)
    vocabulary = gpt2(folder, pad_token="<|pad|>", added_tokens=["<|pad|>", "<|sep|>"])
    assert plain.vocab_size == 259
    assert (vocabulary.pad_id, vocabulary.token_id("<|sep|>"), vocabulary.vocab_size) == (
        259, 260, 261,
    )  # fmt: skip
    assert vocabulary.encode("the<|sep|>the") == [257, 260, 257]
    assert vocabulary.decode([257, 259, 260, 259]) == "the<|sep|>"
    assert vocabulary.fingerprint != plain.fingerprint
    assert hash(vocabulary) and isinstance(vocabulary, Vocabulary)


def test_bart_from_its_own_files(tmp_path):
    folder = write_bart(tmp_path / "bart")
    vocabulary = BpeVocabulary.bart(str(folder / "vocab.json"), str(folder / "merges.txt"))
    assert encode_inputs(vocabulary, "the") == [0, 261, 2]
    assert vocabulary.encode("<mask><pad>") == [262, 1]
    assert vocabulary.decode([0, 261, 2, 261]) == "the"


def test_template_of_a_file_is_found(tmp_path):
    vocab = {"<s>": 0, "</s>": 1, "a": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="a"))
    file = tmp_path / "tokenizer.json"
    for template, around in (
        (None, ((), ())),
        ("<s> $A", ((0,), ())),
        ("<s> $A </s>", ((0,), (1,))),
        ("$A </s> </s>", ((), (1, 1))),
    ):
        if template:
            tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
                single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
            )
        tokenizer.enable_truncation(1)  # as some files were saved
        tokenizer.save(str(file))
        assert TokenizersVocabulary(str(file)).template() == around
        assert TokenizersVocabulary(str(file)).encode("a") == [2]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"pad_token": "<PAD>"}, r"vocab.json' has no token '<PAD>' \(pad_token\)\."),
        ({"eos_token": "<|end|>"}, r"'<\|end\|>' \(eos_token\)\. Did you mean '<\|endoftext\|>'"),
        ({"input_prefix": ["<s>"]}, r"no token '<s>' \(input_prefix\)"),
    ],
)
def test_special_tokens_must_exist(tmp_path, change, sentence):
    vocabulary = gpt2(write_bpe(tmp_path / "gpt2"), **change)
    with pytest.raises(UserError, match=sentence):
        _ = (vocabulary.pad_id, vocabulary.eos_id, vocabulary.input_prefix_ids)


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("vocab.json", "{", "vocab.json' is not JSON"),
        ("vocab.json", "[]", "is not a JSON object of tokens"),
        ("vocab.json", '{"a": "b"}', "gives 'a' the id 'b'"),
        ("vocab.json", '{"a": 1, "b": 1}', "gives one id to several tokens"),
        ("merges.txt", "t h\nthe\n", "line 2: 'the' is not a pair"),
        ("merges.txt", "t q\n", r"merges.txt' do not fit '.*vocab.json' \(.*out of vocabulary"),
        ("merges.txt", b"\xff\xfe", "merges.txt' is not UTF-8"),
        ("dict.txt", "5 1\n999 2\n", "dict.txt', line 2: '999' is no id of"),
        ("dict.txt", "5 1\n5 2\n", "dict.txt' has a token twice"),
        ("dict.txt", None, "dict.txt' does not exist"),
    ],
)
def test_bad_files(tmp_path, file, content, sentence):
    folder = write_bpe(tmp_path / "model")
    if content is not None:
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    extra = {"dict_path": str(folder / "dict.txt")} if file == "dict.txt" else {}
    with pytest.raises(UserError, match=sentence) as raised:
        _ = gpt2(folder, **extra).vocab_size
    assert "\n" not in str(raised.value)


def test_line_ends_in_tokens_are_no_line_ends(tmp_path):
    folder = write_bpe(tmp_path / "model")
    vocab = json.loads((folder / "vocab.json").read_text())
    # U+0085 is a line end to `str.splitlines`; byte 0x85 is written as U+0107, but files may vary.
    vocab["\u0085t"] = len(vocab)
    vocab["\u0085"] = len(vocab)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("t h\r\nth e\r\n\u0085 t\r\n", newline="")
    assert gpt2(folder).encode("the") == [257]
    assert re.fullmatch("[0-9a-f]{64}", gpt2(folder).fingerprint)
