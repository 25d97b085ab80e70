"""The reader (T5, Fusion-in-Decoder), the retriever (Contriever) and the pair of both (AtlasModel): maths only."""
