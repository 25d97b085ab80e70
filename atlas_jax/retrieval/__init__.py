"""Passages, their vectors, and the search over them."""
