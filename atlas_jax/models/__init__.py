"""The reader (T5, Fusion-in-Decoder), the retriever (Contriever) and the pair (Atlas): maths only."""
