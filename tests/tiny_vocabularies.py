"""Byte-level BPE files small enough to write in a test."""

import json

from tokenizers.pre_tokenizers import ByteLevel

BART_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")


def write_bpe(folder, first=(), last=("<|endoftext|>",), names=("vocab.json", "merges.txt")):
    """Writes a BPE over bytes with two merges, special tokens at its front and end."""
    tokens = [*first, *sorted(ByteLevel.alphabet()), "th", "the", *last]
    folder.mkdir(exist_ok=True)
    (folder / names[0]).write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / names[1]).write_text("#version: 0.2\nt h\nth e\n")
    return folder


def write_bart(folder):
    """Writes BART's vocab.json and merges.txt in small: ids 0 <s>, 1 <pad>, 2 </s>, 3 <unk>."""
    return write_bpe(folder, BART_SPECIAL, ("<mask>",))
