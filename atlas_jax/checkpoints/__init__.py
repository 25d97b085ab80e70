"""Reads and writes weights: Orbax checkpoints, PyTorch checkpoints and Hugging Face folders."""
