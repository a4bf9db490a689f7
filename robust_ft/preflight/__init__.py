"""Says whether a recipe fits a TPU slice, without one: `python -m robust_ft.preflight`."""
