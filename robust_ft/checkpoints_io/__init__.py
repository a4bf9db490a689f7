"""Checkpoints in and out: Hugging Face, t5x and our own directories, tensor by tensor."""
