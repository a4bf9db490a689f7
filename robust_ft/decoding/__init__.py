"""Decoding from a step function: greedy, sampling and beam search, as pure JAX functions."""

from robust_ft.decoding.beam_search import LENGTH_PENALTIES, beam_search
from robust_ft.decoding.decoder import Decoder
from robust_ft.decoding.greedy import greedy, sample
from robust_ft.decoding.process import banned, chained, forced, min_length, no_repeat_ngrams
from robust_ft.decoding.types import Cache, Decoded, NotANumber, ProcessFn, StepFn, repeat_rows

__all__ = [
    "LENGTH_PENALTIES",
    "Cache",
    "Decoded",
    "Decoder",
    "NotANumber",
    "ProcessFn",
    "StepFn",
    "banned",
    "beam_search",
    "chained",
    "forced",
    "greedy",
    "min_length",
    "no_repeat_ngrams",
    "repeat_rows",
    "sample",
]
