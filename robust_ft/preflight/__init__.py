"""Whether a recipe fits a TPU slice, without one: `python -m robust_ft.preflight`.

`topology` describes slices that are not there, `programs` traces what a stage runs, `compiled` and
`flops` measure a program, and `report` makes the rows that the command prints.
"""
