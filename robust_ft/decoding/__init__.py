"""From a step function to sequences: greedy, sampling and beam search, as pure JAX functions."""

from robust_ft.decoding.beam_search import LENGTH_PENALTIES, beam_search
from robust_ft.decoding.decoder import Decoder
from robust_ft.decoding.greedy import greedy, sample
from robust_ft.decoding.types import Cache, Decoded, ProcessFn, StepFn, min_length, repeat_rows

__all__ = [
    "LENGTH_PENALTIES",
    "Cache",
    "Decoded",
    "Decoder",
    "ProcessFn",
    "StepFn",
    "beam_search",
    "greedy",
    "min_length",
    "repeat_rows",
    "sample",
]
