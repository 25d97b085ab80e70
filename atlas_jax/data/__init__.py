"""JSON-lines rows, their order, token ids, and arrays of a few fixed shapes."""
