"""The page of settings has all that configs can name, each with a meaning; and checks of values."""

import inspect

import pytest

from robust_ft import settings
from robust_ft.bundled import ROOT
from robust_ft.errors import UserError
from robust_ft.gin_config import REGISTERED
from robust_ft.models.gpt2 import GPT2Config
from robust_ft.models.t5 import T5Config


@pytest.mark.parametrize("name", REGISTERED)
def test_every_setting_has_a_default_or_is_needed_and_a_meaning(name):
    found = settings.settings(name)
    parameters = inspect.signature(REGISTERED[name]).parameters
    assert [setting.name for setting in found] == list(parameters)
    assert settings.summary(name)
    for setting in found:
        assert setting.meaning, f"{name}.{setting.name} has no meaning in its docstring"
        assert bool(setting.default) == (parameters[setting.name].default is not inspect._empty)


def test_the_page_has_all():
    page = settings.on_page_markdown(f"# Settings\n\n{settings.PLACE}\n")
    for name in REGISTERED:
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        rows = [line.split("`")[1] for line in section.splitlines() if line.startswith("| `")]
        assert rows == list(inspect.signature(REGISTERED[name]).parameters)
    assert settings.on_page_markdown("# Another page") == "# Another page"


def test_the_site_has_the_page():
    text = (ROOT / "docs" / "settings.md").read_text()
    assert settings.PLACE in text
    site = (ROOT / "mkdocs.yml").read_text()
    assert "hooks: [robust_ft/settings.py]" in site and "- settings.md" in site


def test_the_command_prints_it(capsys):
    settings.main()
    assert "| `rank` | `8` |" in capsys.readouterr().out


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
@pytest.mark.parametrize(
    ("config", "field"), [(T5Config, "dropout_rate"), (GPT2Config, "attention_dropout_rate")]
)
def test_rates_of_dropout_are_checked(config, field, rate):
    with pytest.raises(UserError, match=rf"{config.__name__}.{field}={rate} must be at least 0"):
        config(**{field: rate})
    config(**{field: 0.999})
