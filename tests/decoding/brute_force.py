"""Greedy decoding and beam search of one example of a `TableModel`, with Python lists."""

import numpy as np

EOS, PAD = 1, 0


def argmax_loop(model, row, pad=PAD, min_tokens=0, ends=(EOS,)):
    """Greedy decoding of one example in plain Python."""
    tokens, score = [], 0.0
    while len(tokens) < model.length and not set(ends) & set(tokens):
        log_probs = model.log_probs(row, tokens)
        if len(tokens) < min_tokens:
            log_probs[list(ends)] = -np.inf
        tokens.append(int(np.argmax(log_probs)))
        score += log_probs[tokens[-1]]
    return tokens + [pad] * (model.length - len(tokens)), score


def penalised(log_prob, length, alpha, length_penalty):
    return log_prob / ((5 + length) / 6 if length_penalty == "t5x" else length) ** alpha


def best_of(sequences, count, alpha, length_penalty, length, ends=(EOS,)):
    """Ranks [(tokens, log_prob)] and pads them and their list; t5x's search prefers what ended."""
    ranked = sorted(
        (
            (
                length_penalty == "hf" or s[-1] in ends,
                penalised(p, len(s), alpha, length_penalty),
                s,
            )
            for s, p in sequences
            if p > -np.inf
        ),
        reverse=True,
    )
    ranked = [(score, list(s) + [PAD] * (length - len(s))) for _, score, s in ranked[:count]]
    ranked += [(-np.inf, [PAD] * length)] * (count - len(ranked))
    return [tokens for _, tokens in ranked], [score for score, _ in ranked]


def unchanged(log_probs, prefix):
    return log_probs


def every_sequence(model, row, process=unchanged, ends=(EOS,)):
    """All sequences that end within the model's length, and those that reach it unended."""
    live = [((), 0.0)]
    for step in range(model.length):
        extensions = [
            ((*prefix, token), log_prob + gain)
            for prefix, log_prob in live
            for token, gain in enumerate(process(model.log_probs(row, prefix), prefix))
        ]
        last = step + 1 == model.length
        yield from (e for e in extensions if e[0][-1] in ends or last)
        live = [e for e in extensions if e[0][-1] not in ends]


def plain_beam_search(
    model,
    row,
    beam_size,
    alpha,
    length_penalty,
    num_return,
    early_stopping=False,
    ends=(EOS,),
    process=unchanged,
):
    """Beam search of one example with Python lists; t5x's never stops early.

    With n ends, n + 1 extensions of each beam are considered: so enough stay live.
    """

    def score(extension, length=None):
        return penalised(extension[1], length or len(extension[0]), alpha, length_penalty)

    live, ended, like_hf = [((), 0.0)], [], length_penalty == "hf"
    for step in range(model.length):
        extensions = [
            ((*prefix, token), log_prob + gain)
            for prefix, log_prob in live
            for token, gain in enumerate(process(model.log_probs(row, prefix), prefix))
            if gain > -np.inf
        ]
        extensions.sort(key=lambda extension: -extension[1])
        extensions = extensions[: (1 + len(ends)) * beam_size]
        last = step + 1 == model.length
        ended += [
            e
            for e in extensions[: beam_size if like_hf else None]
            if e[0][-1] in ends or (like_hf and last)
        ]
        live = [e for e in extensions if e[0][-1] not in ends][:beam_size]
        if like_hf:
            ended = sorted(ended, key=lambda e: -score(e))[:beam_size]
            ahead = (model.length if alpha > 0 else step + 2) if early_stopping == "never" else None
            if len(ended) == beam_size and (
                early_stopping is True or not live or score(live[0], ahead) <= score(ended[-1])
            ):
                break
    sequences = ended if like_hf else ended + live
    return best_of(sequences, num_return, alpha, length_penalty, model.length, ends)
