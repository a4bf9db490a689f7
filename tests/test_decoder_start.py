"""Where a target begins, against Python lists: for every length, mask and token id."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_ft.decoder_start import DecoderStart

SOURCE = 6  # one shape, so that nothing is compiled twice
TOKENS = st.integers(0, 9)
STARTS = st.builds(DecoderStart, token=TOKENS, continues=st.booleans())
ROWS = st.lists(
    st.tuples(
        *[st.lists(kind, min_size=SOURCE, max_size=SOURCE) for kind in (TOKENS, st.booleans())]
    ),
    min_size=3,
    max_size=3,
)


def expected(inputs, start):
    """Returns what of a list is read before the decoder's first token, and that token."""
    if start.continues and inputs:
        return inputs[:-1], inputs[-1]
    return inputs, start.token


@given(inputs=st.lists(TOKENS, max_size=SOURCE), start=STARTS)
def test_an_input_is_split_before_its_last_token_if_the_target_continues_it(inputs, start):
    read, first = start.split(np.array(inputs, np.int32))
    assert (read.tolist(), first) == expected(inputs, start)
    assert read.dtype == np.int32


@given(rows=ROWS, start=STARTS)
@settings(max_examples=200, deadline=None)
def test_padded_rows_are_split_like_their_tokens_alone(rows, start):
    """Padding stands anywhere and has ids of tokens; rows may hold nothing else."""
    tokens = np.array([tokens for tokens, _ in rows], np.int32)
    mask = np.array([mask for _, mask in rows])
    read, first = start.split_rows(tokens, mask)
    assert first.dtype == np.int32 and first.shape == (3,)
    for row, kept, row_read, row_first in zip(tokens, mask, np.asarray(read), first, strict=True):
        assert (row[row_read].tolist(), int(row_first)) == expected(row[kept].tolist(), start)
        assert not np.any(row_read & ~kept)


@given(start=STARTS)
@settings(deadline=None)
def test_rows_without_any_place(start):
    read, first = start.split_rows(np.zeros((2, 0), np.int32), np.zeros((2, 0), bool))
    assert read.shape == (2, 0) and first.tolist() == [start.token] * 2
