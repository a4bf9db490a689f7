"""Decodes with tiny models on meshes of 8 devices and on one; runs in a process of its own.

    python sharded_decoding.py FAMILY [FAMILY ...]

Raises an error unless all meshes write the same, and each device keeps its own rows to itself.
"""

import sys

import jax
import numpy as np
from every_method import small
from sharded_training import SIZES, placed

from robust_ft import predictor
from robust_ft.decoding import Decoder
from robust_ft.partitioning import Partitioner

ROWS, LENGTH = 16, 6
INPUTS = np.random.default_rng(0).integers(3, 40, (ROWS, LENGTH), dtype=np.int32)


def decode(family, partitioner, beam_size):
    """Returns (tokens, scores, the compiled program) of a batch."""
    model = small(family, **SIZES)
    decoder = Decoder(max_decode_len=4, beam_size=beam_size)
    with partitioner.activate():
        params = placed(model, partitioner)
        mask = np.ones(INPUTS.shape, bool)
        batch = partitioner.share_batch(
            {"encoder_input_tokens": INPUTS, "encoder_input_mask": mask}
        )
        compiled = predictor.decode.lower(model, decoder, params, batch, None).compile()
        decoded = compiled(params, batch, None)
    return np.asarray(decoded.tokens), np.asarray(decoded.scores), compiled.as_text()


def main():
    for family in sys.argv[1:]:
        for beam_size in (1, 2):
            one = Partitioner().on(jax.devices()[:1])
            expected, scores, _ = decode(family, one, beam_size)
            for mesh in (Partitioner(), Partitioner(2, 2, 2)):
                tokens, found, program = decode(family, mesh, beam_size)
                np.testing.assert_array_equal(tokens, expected)
                np.testing.assert_allclose(found, scores, rtol=0, atol=1e-5)
                if mesh.batch_shards == 8 and beam_size == 1:
                    assert "all-gather" not in program and "all-to-all" not in program


if __name__ == "__main__":
    main()
