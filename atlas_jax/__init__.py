"""ATLAS: retrieval-augmented language models in JAX and Flax (arXiv 2208.03299)."""
