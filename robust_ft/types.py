"""The types that all modules share: parameters, batches and sums."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

# A nested dict of arrays. Paths are t5x's own, joined by "/":
# "encoder/layers_0/attention/query/kernel".
Params = Mapping[str, Any]

# What tokens and masks come in: NumPy arrays on the host, JAX's on devices.
AnyArray = jax.Array | np.ndarray

# Named arrays that lead with the batch axis, under t5x's feature names:
#   encoder_input_tokens   int32[batch, source]
#   encoder_input_mask     bool[batch, source]    False at padding; without it, all are tokens
#   decoder_input_tokens   int32[batch, target]   targets shifted right, see `decoder_start`
#   decoder_target_tokens  int32[batch, target]
#   decoder_loss_weights   float32[batch, target]  0 at padding
# Packed batches have int32 encoder_segment_ids and decoder_segment_ids (0 on padding), and no mask.
# Batches of models with a prompt for each task add int32[batch] task_index (`Model.task_index`);
# those with replayed rows (`Replay`) may have bool[batch] without_prompt, where prompts are off.
Batch = Mapping[str, AnyArray]

# Scalar sums over examples or tokens, never means: sums add up over microbatches and hosts.
Sums = dict[str, jax.Array]
