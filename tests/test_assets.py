"""Files that are shipped with the package."""

import json
from pathlib import Path

import pytest

from robust_ft import assets
from robust_ft.errors import UserError


def test_assets():
    assert assets.resolve("/some/file") == "/some/file"
    resolved = assets.resolve("asset:mini/tokenizer.json")
    assert json.loads(Path(resolved).read_text(encoding="utf-8"))
    with pytest.raises(UserError, match=r"not shipped .* mean 'asset:mini/tokenizer.json'"):
        assets.resolve("asset:mini/tokeniser.json")
