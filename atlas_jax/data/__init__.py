"""Tokens, rows and fixed shapes."""
