"""Models: plain functions of parameters and batches, implemented in Flax Linen."""
