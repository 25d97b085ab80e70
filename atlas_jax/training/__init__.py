"""Joint training of reader and retriever."""
