"""Ensembles of models: probabilities mixed at every token, weight interpolation, selection of λ."""
