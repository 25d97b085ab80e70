"""Weights in and out: Orbax checkpoints and the published PyTorch files."""
