"""robust_ft: finetune pretrained language models without losing what they could already do.

In Python, `robust_ft.load(directory)` gives a `Predictor`; see docs/howto/notebook.md.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robust_ft.loading import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """Imports what the package offers when it is first asked for, so that importing it is light."""
    if name == "load":
        from robust_ft.loading import load

        return load
    raise AttributeError(f"module 'robust_ft' has no attribute '{name}'")
