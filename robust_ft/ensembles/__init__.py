"""Several models as one: by probabilities at every token, or by parameters; and by what weights."""
