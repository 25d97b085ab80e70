"""The evaluation loop: generation and scores."""
