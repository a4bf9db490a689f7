"""Directories as Hugging Face models have them, with the real vocabulary files."""

import json
import os
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_dir():
    """The folder of real data."""
    if "ROBUST_FT_DATA_DIR" not in os.environ:
        pytest.skip("needs the real files: ROBUST_FT_DATA_DIR is not set")
    return Path(os.environ["ROBUST_FT_DATA_DIR"])


@pytest.fixture(scope="session")
def t5_directory(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    shutil.copy(data_dir / "tokenizers" / "t5_vocab.model", folder / "spiece.model")
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def gpt2_directory(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(data_dir / "tokenizers" / "gpt2" / name, folder)
    return folder


@pytest.fixture(scope="session")
def bart_directory(data_dir, gpt2_directory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bart")
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(gpt2_directory / name, folder)
    shutil.copy(data_dir / "tokenizers" / "bart" / "dict.txt", folder)
    return folder
